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

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
