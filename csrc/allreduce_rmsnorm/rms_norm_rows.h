// The two passes over a row that every CPU kernel with an RMSNorm makes. Sharing them keeps the bits of the fused forms
// equal to those of rms_norm: the order of additions depends on nothing but the column.
#pragma once

#include "core/cpu.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND::inline TOKENWEAVE_ISA {

// The sum of the squares of value_at(i, load, store) for i = 0, 32, ...: see for_each_vector.
template <class ValueAt>
TW_CPU float sum_of_squares(int64_t hidden, const ValueAt& value_at) {
  // A lane adds up 32 squares, then the lanes' sums are added with compensation. Adding up to 2,048 squares in a row,
  // as one level would, loses digits that torch keeps, most of all in rows of nearly equal squares.
  Lanes total{}, lost{}, sum{};
  const auto fold = [&]() __attribute__((always_inline)) {
    const Lanes next = total + sum;
    lost = lost + ((total - next) + sum);
    total = next;
    sum = Lanes{};
  };
  for_each_vector(hidden, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
    if (i % (32 * kLanes) == 0) fold();
    const Lanes value = value_at(i, load, store);
    sum = sum + value * value;
  });
  fold();
  const float plain = sum_lanes(total);
  return std::isfinite(plain) ? sum_lanes(total + lost) : plain;  // infinity - infinity is lost as NaN
}

TW_CPU float rstd_of(float sum_of_squares, int64_t hidden, float eps) {
  return 1.0f / std::sqrt(sum_of_squares / static_cast<float>(hidden) + eps);
}

// put(i, store, h * rstd * (weight + weight_bias)) for i = 0, 32, ...
template <class T, class Put>
TW_CPU void scale(const T* h, const T* weight, int64_t hidden, float rstd, float weight_bias, const Put& put) {
  const Lanes factor = broadcast(rstd), bias = broadcast(weight_bias);
  for_each_vector(hidden, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
    put(i, store, load(h) * factor * (load(weight) + bias));
  });
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND::inline TOKENWEAVE_ISA
