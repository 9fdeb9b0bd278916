// Coverage of one realisation (lane) given its distances, for kThresholds thresholds at one density. Under Rayleigh
// fading a server of gain g is above T times noise and the interference of gains g_i with probability
// exp(-T W / g) * product of 1 / (1 + T g_i / g): Laplace transforms of exponentials.
#pragma once

#include "sinr_field/geometry.cuh"
#include "sinr_field/rayleigh_conditional.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

// A product of numbers from 1 on, as mantissa and exponent. Factors are below 2^61: two of them fit.
template <class V>
struct Product {
  using M = Math<V>;
  V mantissa, exponent;

  TW_MEMBER void clear() {
    mantissa = constant<V>(1.0f);
    exponent = constant<V>(0.0f);
  }
  TW_MEMBER void multiply_one_plus(const V& x) { mantissa = M::multiply_add(mantissa, x, mantissa); }
  TW_MEMBER void normalise() {
    const typename M::Bits bits = M::bits(mantissa);
    exponent = exponent + (M::convert(M::as_ints(bits >> 23)) - 127.0f);
    mantissa = M::from_bits((bits & 0x7fffffu) | 0x3f800000u);
  }
  TW_MEMBER V log2() const { return exponent + log2_of(mantissa); }
};

// `gains`: set(i, v) and get(i) keep log2 gains, for the strongest cell only.
template <class V, int kThresholds, class Tables, class Gains>
struct Rayleigh {
  using M = Math<V>;
  const RayleighParams& p;
  const Tables& tables;
  Gains& gains;
  float scale, log2_density;
  const float* log2_thresholds;

  typename M::Wide coverage[kThresholds];

  TW_MEMBER Rayleigh(const RayleighParams& params, const Tables& of_network, Gains& kept, const float* scales,
                     const float* thresholds)
      : p(params),
        tables(of_network),
        gains(kept),
        scale(scales[0]),
        log2_density(scales[1]),
        log2_thresholds(thresholds) {}

  template <class Use>
  TW_MEMBER V for_each_gain(const Realisations<V>& r, const Use& use) {
    const Seed seed{p.seed_low, p.seed_high};
    V arrival = constant<V>(0.0f), s = constant<V>(0.0f);
    for (int32_t step = 0; step < p.num_points / 4; ++step) {
      const Words<V> words = random_words(seed, r, kArrivals, static_cast<uint32_t>(step));
      TW_UNROLL_4
      for (int w = 0; w < 4; ++w) {
        arrival = arrival + exponential<V>(words.word[w]);
        s = arrival * (scale * kInversePi);
        const V gain = log2_gain(p, tables, s);
        use(4 * step + w, s < p.end2 ? gain : constant<V>(kNothing));
      }
      if (!M::any(s < p.end2)) {
        for (int32_t i = 4 * step + 4; i < p.num_points; ++i) use(i, constant<V>(kNothing));
        break;
      }
    }
    return s;
  }

  // log2 of the probability that a server of log2 gain `server` covers, where `product` holds the stations at hand.
  // Beyond s the stations are averaged: exp(-density * integral of x / (1 + x)), x = T gain / g, by its first two
  // moments m1 and m2 as m1 / (1 + m2 / m1), which never falls below the truth's sign.
  TW_MEMBER V log2_coverage(const V& server, const V& s, const V& far_mean, const V& far_deviation,
                            const Product<V>& product, float log2_threshold) const {
    const V log2_x = log2_threshold - server;
    const V log2_m1 = far_mean + log2_density + log2_x;
    const V log2_m2 = 2.0f * (far_deviation + log2_x) + log2_density;
    const V far = M::divide(exp2_of(log2_m1), exp2_of(log2_m2 - log2_m1) + 1.0f);
    const V noise = p.log2_noise == kNothing ? constant<V>(0.0f) : exp2_of(log2_x + p.log2_noise);
    const V nats = noise + (s < p.end2 ? far : constant<V>(0.0f));
    return -M::multiply_add(nats, constant<V>(kLog2E), product.log2());
  }

  TW_MEMBER void walk(const Realisations<V>& r) {
    if (p.nearest) {
      walk_nearest(r);
    } else {
      walk_strongest(r);
    }
  }

  TW_MEMBER void walk_nearest(const Realisations<V>& r) {
    Product<V> products[kThresholds];
    V thresholds[kThresholds], server = constant<V>(0.0f);
#pragma unroll
    for (int t = 0; t < kThresholds; ++t) {
      products[t].clear();
      thresholds[t] = exp2_of(constant<V>(log2_thresholds[t]));
    }
    const V s = for_each_gain(r, [&](int32_t i, const V& gain) {
      if (i == 0) {
        server = gain;
        return;
      }
      const V ratio = gain == kNothing ? constant<V>(0.0f) : exp2_of(gain - server);
#pragma unroll
      for (int t = 0; t < kThresholds; ++t) {
        products[t].multiply_one_plus(thresholds[t] * ratio);
        if (i % 2 == 1) products[t].normalise();
      }
    });
    const V far_mean = tables.far_mean(s), far_deviation = tables.far_deviation(s);
#pragma unroll
    for (int t = 0; t < kThresholds; ++t) {
      const V found = log2_coverage(server, s, far_mean, far_deviation, products[t], log2_thresholds[t]);
      coverage[t] = exp2_wide(server == kNothing ? constant<V>(kNothing) : found);
    }
  }

  TW_MEMBER void walk_strongest(const Realisations<V>& r) {
    const V s = for_each_gain(r, [&](int32_t i, const V& gain) { gains.set(i, gain); });
    const V far_mean = tables.far_mean(s), far_deviation = tables.far_deviation(s);
    V thresholds[kThresholds];
#pragma unroll
    for (int t = 0; t < kThresholds; ++t) {
      coverage[t] = M::widen(constant<V>(0.0f));
      thresholds[t] = exp2_of(constant<V>(log2_thresholds[t]));
    }
    for (int32_t j = 0; j < p.num_points; ++j) {
      const V server = gains.get(j);
      if (!M::any(server > kNothing)) break;  // nor any after it
      Product<V> products[kThresholds];
#pragma unroll
      for (int t = 0; t < kThresholds; ++t) products[t].clear();
      for (int32_t i = 0; i < p.num_points; ++i) {
        const V gain = gains.get(i);
        const V zero = constant<V>(0.0f), other = gain == kNothing ? zero : exp2_of(gain - server);
        const V ratio = i == j ? zero : other;
#pragma unroll
        for (int t = 0; t < kThresholds; ++t) {
          products[t].multiply_one_plus(thresholds[t] * ratio);
          products[t].normalise();
        }
      }
#pragma unroll
      for (int t = 0; t < kThresholds; ++t) {
        const V found = log2_coverage(server, s, far_mean, far_deviation, products[t], log2_thresholds[t]);
        coverage[t] = coverage[t] + exp2_wide(server == kNothing ? constant<V>(kNothing) : found);
      }
    }
#pragma unroll
    for (int t = 0; t < kThresholds; ++t) coverage[t] = M::at_most_one(coverage[t]);
  }
};

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
