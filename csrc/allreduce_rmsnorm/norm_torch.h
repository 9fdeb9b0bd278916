// Checks that the glue of every norm in this family shares.
#pragma once

#include <cmath>

#include "torch/check.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

inline void check_scalars(const char* op, double eps, double weight_bias) {
  if (!(eps >= 0.0) || !std::isfinite(eps)) {
    raise(std::string(op) + ": eps must be finite and at least 0, got " + shortest(eps));
  }
  if (!std::isfinite(static_cast<float>(weight_bias))) {
    raise(std::string(op) + ": weight_bias must be finite in fp32, got " + shortest(weight_bias));
  }
}

// The weight is read after rows have been written, so bytes [begin, end) of a written tensor must not be among its own.
inline void check_apart_from_weight(const char* op, const TensorInfo& written, const char* begin, const char* end,
                                    const TensorInfo& weight, int64_t weight_bytes) {
  const char* weight_begin = static_cast<const char*>(weight.data);
  if (begin < weight_begin + weight_bytes && weight_begin < end) {
    fail(op, written, "not overlap weight", "memory that is shared with it");
  }
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
