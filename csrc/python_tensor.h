// Tensors and errors between Python and C++, which libtorch_python has. Its headers want all of Python's API; the
// rest of the extension sees only this, and keeps to the limited one.
#pragma once

#include <Python.h>

#include <ATen/core/Tensor.h>
#include <c10/util/FunctionRef.h>

namespace mac_attn {

// The tensor that a Python tensor holds, for as long as that lives; nullptr of another object.
const at::Tensor* tensor_of(PyObject* object);

// A new reference, or nullptr with Python's error set.
PyObject* to_python(at::Tensor&& tensor);

// What `body` returns; or, if it throws, nullptr and Python's error set, of the kind that torch's own functions
// raise.
PyObject* with_python_errors(c10::function_ref<PyObject*()> body);

}  // namespace mac_attn
