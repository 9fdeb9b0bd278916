// What the samplers do with received powers, whichever way they were drawn. Powers are log2, kNothing where there is
// none.
#pragma once

#include "sinr_field/arithmetic.cuh"
#include "sinr_field/sampler.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

// What a realisation looks like at each density: powers as log2, kNothing where there is none.
template <class V, int kDensities>
struct Received {
  V signal[kDensities];
  V interference[kDensities];
  V residual_share[kDensities];
};

// As callers see it: -inf where there is none.
TW_DEVICE float shown(float log2_power) { return log2_power == kNothing ? -__builtin_inff() : log2_power; }

// log2 of SINR: kNothing without a signal, above 1e38 without interference and noise.
template <class V>
TW_DEVICE V log2_sinr(const V& signal, const V& total) {
  return signal == kNothing ? constant<V>(kNothing) : signal - total;
}

// Powers summed one by one, and what lies beyond them.
template <class V>
struct Interference {
  V log2_power;      // kNothing where there is none
  V residual_share;  // of the residual's standard deviation in it
};

// A part of a sum relative to it; 0 where log2_of_sum says that the sum is none.
template <class V>
TW_DEVICE V share_of(const V& part, const V& sum) {
  return sum > 0x1p-126f ? Math<V>::divide(part, at_least(sum, constant<V>(0x1p-126f))) : constant<V>(0.0f);
}

// log2 of a sum relative to `reference`; sums this small are none.
template <class V>
TW_DEVICE V log2_of_sum(const V& sum, const V& reference) {
  return sum > 0x1p-126f ? reference + log2_of(at_least(sum, constant<V>(0x1p-126f))) : constant<V>(kNothing);
}

// The residual is `mean + deviation * normal`, never below 0. `sum` is relative to a power of log2 `reference`,
// kNothing if there is none; the total to that or to the residual's mean, whichever is more, so that neither is lost.
template <class V, class Mask>
TW_DEVICE Interference<V> with_residual(const SamplerParams& p, const V& sum, const V& reference, const Mask& exists,
                                        const V& log2_mean, const V& log2_deviation, const V& deviate) {
  const V zero = constant<V>(0.0f);
  if (p.residual == kNoResidual) return {log2_of_sum(sum, reference), zero};
  const V beyond = exists ? log2_mean : constant<V>(kNothing), most = at_least(reference, beyond);
  const V near = sum * exp2_up_to_126(reference - most);
  const V mean = exists ? exp2_up_to_126(beyond - most) : zero;
  if (p.residual == kMeanResidual) return {log2_of_sum(near + mean, most), zero};
  const V deviation = exists ? exp2_of(log2_deviation - most) : zero;
  const V total = near + at_least(Math<V>::multiply_add(deviation, deviate, mean), zero);
  return {log2_of_sum(total, most), share_of(deviation, total)};
}

// log2(I + W)
template <class V>
TW_DEVICE V log2_with_noise(const SamplerParams& p, const V& interference) {
  return p.log2_noise == kNothing ? interference : log2_add(interference, constant<V>(p.log2_noise));
}

// ln(1 + signal / total)
template <class V>
TW_DEVICE V rate_of(const V& signal, const V& total) {
  const V finite = log_one_plus_exp2(signal - total);
  const V rate = total == kNothing ? constant<V>(__builtin_inff()) : finite;
  return signal == kNothing ? constant<V>(0.0f) : rate;
}

// The bin of a probability.
TW_DEVICE int meta_bin(double coverage) {
  const int bin = static_cast<int>(coverage * kMetaBins);
  return bin < kMetaBins ? bin : kMetaBins - 1;
}

// 1 / SINR
template <class V>
TW_DEVICE typename Math<V>::Wide inverse_sinr(const V& sinr) {
  return Math<V>::where(sinr == kNothing, Math<V>::widen(constant<V>(__builtin_inff())), exp2_wide(-sinr));
}

// The bin of log2 SINR; the outer bins take the rest.
template <class V>
TW_DEVICE typename Math<V>::Ints histogram_bin(const V& sinr) {
  const V place = (sinr - kHistogramLow) * kHistogramPerOctave;
  const V inside = at_most(at_least(place, constant<V>(0.0f)), constant<V>(kHistogramBins - 0.5f));
  return Math<V>::truncate(inside);
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
