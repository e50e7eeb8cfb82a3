// torch's header does not compile with the limited API. What is used of it here is all the same to every Python:
// fields behind PyObject_HEAD, and functions of libtorch_python. build_support/wheels.py looks at the result.
#undef Py_LIMITED_API
#include "python_tensor.h"

#include <torch/csrc/autograd/python_variable.h>

namespace mac_attn {

const at::Tensor* tensor_of(PyObject* object) {
  const bool is_tensor = THPVariable_CheckExact(object) ||
                         PyType_IsSubtype(Py_TYPE(object), reinterpret_cast<PyTypeObject*>(THPVariableClass));
  return is_tensor ? &reinterpret_cast<THPVariable*>(object)->cdata : nullptr;
}

PyObject* to_python(at::Tensor&& tensor) {
  return THPVariable_Wrap(std::move(tensor));
}

PyObject* with_python_errors(c10::function_ref<PyObject*()> body) {
  HANDLE_TH_ERRORS
  return body();
  END_HANDLE_TH_ERRORS
}

}  // namespace mac_attn
