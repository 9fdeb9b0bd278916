// Argument checks of the glue. Every message reads `op: argument must ..., got ... (dtype, device)`; text is made only
// once a check has failed, so that a good call pays a few comparisons.
#pragma once

#include <cstdio>
#include <stdexcept>
#include <string>

#include "torch/backend.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

[[noreturn]] inline void raise(const std::string& message) { throw std::runtime_error(message); }

inline void raise_unless(const Status& status, const char* op) {
  if (!status.is_ok()) raise(std::string(op) + ": " + status.message());
}

// A tensor's facts, read once through the C shims.
struct TensorInfo {
  const char* name;  // the argument's name in the schema
  void* data = nullptr;
  int64_t dim = 0;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;
  int32_t dtype = 0;
  int32_t device_type = 0;
  int32_t device_index = 0;

  TensorInfo(const char* argument_name, const Tensor& tensor) : name(argument_name) {
    AtenTensorHandle handle = tensor.get();
    int64_t* sizes_pointer = nullptr;
    int64_t* strides_pointer = nullptr;
    if (aoti_torch_get_data_ptr(handle, &data) != 0) {  // None, which the dispatcher lets through, or a sparse tensor
      raise(std::string(name) + " must be a tensor with memory of its own, got None or one without");
    }
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dim));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes_pointer));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &strides_pointer));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &dtype));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &device_type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &device_index));
    sizes = sizes_pointer;
    strides = strides_pointer;
  }

  int64_t size(int64_t axis) const { return sizes[axis < 0 ? axis + dim : axis]; }
  int64_t stride(int64_t axis) const { return strides[axis < 0 ? axis + dim : axis]; }
  int64_t numel() const {
    int64_t count = 1;
    for (int64_t axis = 0; axis < dim; ++axis) count *= sizes[axis];
    return count;
  }
};

inline std::string join(const int64_t* values, int64_t count) {
  std::string text = "[";
  for (int64_t i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  return text + "]";
}

// A number as short as it can be said: -1e-09 and not -0.000000.
inline std::string shortest(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g", value);
  return text;
}

inline const char* name_of_torch_dtype(int32_t dtype) {
  if (dtype == aoti_torch_dtype_bfloat16()) return "bf16";
  if (dtype == aoti_torch_dtype_float16()) return "fp16";
  if (dtype == aoti_torch_dtype_float32()) return "fp32";
  if (dtype == aoti_torch_dtype_float64()) return "fp64";
  if (dtype == aoti_torch_dtype_int32()) return "int32";
  if (dtype == aoti_torch_dtype_int64()) return "int64";
  if (dtype == aoti_torch_dtype_bool()) return "bool";
  return "another dtype";
}

inline std::string describe_device(const TensorInfo& t) {
  if (t.device_type == aoti_torch_device_type_cpu()) return "cpu";
  return (t.device_type == aoti_torch_device_type_cuda() ? "cuda:" : "device:") + std::to_string(t.device_index);
}

// `got` is what was found; dtype and device are always added, since they explain most surprises.
[[noreturn]] inline void fail(const char* op, const TensorInfo& t, const std::string& expected,
                              const std::string& got) {
  raise(std::string(op) + ": " + t.name + " must " + expected + ", got " + got + " (dtype " +
        name_of_torch_dtype(t.dtype) + ", device " + describe_device(t) + ")");
}

inline DType check_dtype(const char* op, const TensorInfo& t) {
  static const int32_t kBf16 = aoti_torch_dtype_bfloat16(), kFp16 = aoti_torch_dtype_float16(),
                       kFp32 = aoti_torch_dtype_float32();
  if (t.dtype == kBf16) return DType::bf16;
  if (t.dtype == kFp16) return DType::fp16;
  if (t.dtype == kFp32) return DType::fp32;
  fail(op, t, "be bf16, fp16 or fp32", name_of_torch_dtype(t.dtype));
}

inline void check_same_dtype(const char* op, const TensorInfo& t, const TensorInfo& reference) {
  if (t.dtype == reference.dtype) return;
  fail(op, t, std::string("have the dtype of ") + reference.name + ", " + name_of_torch_dtype(reference.dtype),
       name_of_torch_dtype(t.dtype));
}

inline void check_same_device(const char* op, const TensorInfo& t, const TensorInfo& reference) {
  if (t.device_type == reference.device_type && t.device_index == reference.device_index) return;
  fail(op, t, std::string("be on the device of ") + reference.name + ", " + describe_device(reference),
       describe_device(t));
}

inline void check_same_shape(const char* op, const TensorInfo& t, const TensorInfo& reference) {
  bool same = t.dim == reference.dim;
  for (int64_t axis = 0; same && axis < t.dim; ++axis) same = t.sizes[axis] == reference.sizes[axis];
  if (!same) {
    fail(op, t, std::string("have the shape of ") + reference.name + ", " + join(reference.sizes, reference.dim),
         join(t.sizes, t.dim));
  }
}

// A vector [length], contiguous. `meaning` names the length in the message.
inline void check_vector(const char* op, const TensorInfo& t, const char* meaning, int64_t length) {
  if (t.dim != 1 || t.sizes[0] != length) {
    fail(op, t, std::string("have shape [") + meaning + "]=[" + std::to_string(length) + "]", join(t.sizes, t.dim));
  }
  if (length > 1 && t.strides[0] != 1) fail(op, t, "be contiguous", "stride " + std::to_string(t.strides[0]));
}

inline void check_contiguous(const char* op, const TensorInfo& t) {
  int64_t expected = 1;
  for (int64_t axis = t.dim - 1; axis >= 0; --axis) {
    if (t.sizes[axis] != 1 && t.strides[axis] != expected && t.numel() != 0) {
      fail(op, t, "be contiguous", "strides " + join(t.strides, t.dim));
    }
    expected *= t.sizes[axis];
  }
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
