// An op as a plain Python function. It calls through the dispatcher, as torch.ops does, but need not match what it
// is given with a schema and box it first: a third of what a call of thirty arguments costs (bench/README.md). In
// Python's limited API, so that one build serves every version.
#pragma once

#include <Python.h>

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "python_tensor.h"

namespace mac_attn {

// Lets other Python threads run.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() { PyEval_RestoreThread(state_); }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};

inline std::string kind_of(PyObject* object) {
  if (object == Py_None) return "None";
  PyObject* name = PyObject_GetAttrString(reinterpret_cast<PyObject*>(Py_TYPE(object)), "__name__");
  const char* text = name ? PyUnicode_AsUTF8AndSize(name, nullptr) : nullptr;
  const std::string answer = std::string("of type ") + (text ? text : "unknown");
  Py_XDECREF(name);
  PyErr_Clear();
  return answer;
}

// An argument, read from a Python object. Of tensors copies, here and not in the op: the first copy of one that has
// an object needs the GIL, and the op would take it back for each.
template <typename T>
struct Argument;

template <>
struct Argument<at::Tensor> {
  static constexpr const char* kMust = "a Tensor";
  at::Tensor tensor;
  bool read(PyObject* object) {
    const at::Tensor* given = tensor_of(object);
    if (given) tensor = *given;
    return given;
  }
  at::Tensor& value() { return tensor; }
};

template <>
struct Argument<std::optional<at::Tensor>> {
  static constexpr const char* kMust = "a Tensor or None";
  std::optional<at::Tensor> tensor;
  bool read(PyObject* object) {
    const at::Tensor* given = tensor_of(object);
    if (given) tensor = *given;
    return given || object == Py_None;
  }
  std::optional<at::Tensor>& value() { return tensor; }
};

template <>
struct Argument<bool> {
  static constexpr const char* kMust = "True or False";
  bool number;
  bool read(PyObject* object) { return (number = object == Py_True) || object == Py_False; }
  bool value() { return number; }
};

template <>
struct Argument<int64_t> {
  static constexpr const char* kMust = "an int of 64 bits";
  int64_t number;
  bool read(PyObject* object) {
    number = PyLong_AsLongLong(object);
    return number != -1 || !PyErr_Occurred();
  }
  int64_t value() { return number; }
};

template <>
struct Argument<double> {
  static constexpr const char* kMust = "a number";
  double number;
  bool read(PyObject* object) {
    number = PyFloat_AsDouble(object);
    return number != -1 || !PyErr_Occurred();
  }
  double value() { return number; }
};

template <typename... Tensors>
PyObject* to_python(std::tuple<Tensors...>&& tensors) {
  PyObject* answer = PyTuple_New(sizeof...(Tensors));
  Py_ssize_t i = 0;
  const auto add = [&](at::Tensor& tensor) {
    PyObject* object = answer ? to_python(std::move(tensor)) : nullptr;
    if (object) {
      PyTuple_SetItem(answer, i++, object);
    } else {
      Py_CLEAR(answer);
    }
  };
  std::apply([&](auto&... tensor) { (add(tensor), ...); }, tensors);
  return answer;
}

// `kKernel`, one of the op's kernels, tells the types.
template <auto kKernel>
class PlainFunction;

template <typename Result, typename... Args, Result (*kKernel)(Args...)>
class PlainFunction<kKernel> {
 public:
  // Once, when the op is registered; `overload` is that of the op.
  static PyMethodDef of(const char* name, const char* op, const char* overload) {
    op_ = c10::Dispatcher::singleton().findSchemaOrThrow(op, overload).typed<Result(Args...)>();
    return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call)), METH_FASTCALL, nullptr};
  }

 private:
  static PyObject* call(PyObject*, PyObject* const* objects, Py_ssize_t count) {
    return with_python_errors([&] {
      TORCH_CHECK_TYPE(count == sizeof...(Args), op_->schema().name(), " is given ", count, " arguments, must be ",
                       sizeof...(Args));
      return call_with(objects, std::index_sequence_for<Args...>{});
    });
  }

  template <size_t... I>
  static PyObject* call_with(PyObject* const* objects, std::index_sequence<I...>) {
    std::tuple<Argument<std::decay_t<Args>>...> arguments;
    (read(std::get<I>(arguments), objects[I], I), ...);
    return to_python([&]() -> Result {
      const WithoutGil without_gil;
      return op_->call(std::get<I>(arguments).value()...);
    }());
  }

  template <typename T>
  static void read(Argument<T>& argument, PyObject* object, size_t i) {
    if (argument.read(object)) return;
    PyErr_Clear();
    TORCH_CHECK_TYPE(false, op_->schema().arguments()[i].name(), " is ", kind_of(object), ", must be ",
                     Argument<T>::kMust);
  }

  inline static std::optional<c10::TypedOperatorHandle<Result(Args...)>> op_;
};

}  // namespace mac_attn
