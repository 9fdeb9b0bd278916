// One realisation (lane) of the power domain, for kDensities densities at once. Powers are P_i = L1^-1(Gamma_i /
// density) for the arrivals Gamma_1 < Gamma_2 < ... of a unit Poisson process; interference is kept relative to its
// first term, the strongest interferer.
#pragma once

#include "sinr_field/received.cuh"
#include "sinr_field/sample_power_domain.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

// `tables`: power(g), rest_mean(g), rest_deviation(g), measure(z), each of lanes and as log2.
template <class V, int kDensities, class Tables>
struct PowerDomain {
  using M = Math<V>;
  const PowerDomainParams& p;
  const Tables& tables;
  const float* scales;  // [kDensities, 2]

  V second_arrival;
  V node_offset;  // uniform in (0, 1)
  Received<V, kDensities> received;

  TW_MEMBER PowerDomain(const PowerDomainParams& params, const Tables& of_network, const float* of_densities)
      : p(params), tables(of_network), scales(of_densities) {}

  TW_MEMBER V power(const V& arrival, int d) const {
    const V g = arrival * scales[2 * d];
    return g < p.cut ? tables.power(g) : constant<V>(kNothing);
  }

  TW_MEMBER void walk(const Realisations<V>& r) {
    const Seed seed{p.seed_low, p.seed_high};
    const V zero = constant<V>(0.0f);
    V arrival = zero, reference[kDensities] = {}, sum[kDensities] = {}, found[kDensities] = {};
    const int32_t num_steps = p.num_terms / 4;
    for (int32_t step = 0; step < num_steps; ++step) {
      const Words<V> words = random_words(seed, r, kArrivals, static_cast<uint32_t>(step));
      Words<V> activity{};
      if (!p.all_active) activity = random_words(seed, r, kActivity, static_cast<uint32_t>(step));
      TW_UNROLL_4
      for (int w = 0; w < 4; ++w) {
        arrival = arrival + exponential<V>(words.word[w]);
        const V is_active = activity.word[w] < p.activity_limit ? constant<V>(1.0f) : zero;
        if (step == 0 && w == 1) second_arrival = arrival;
#pragma unroll
        for (int d = 0; d < kDensities; ++d) {
          const V received_power = power(arrival, d);
          if (w == 0 && step == 0) {
            received.signal[d] = received_power;
            continue;
          }
          reference[d] = found[d] == 0.0f ? received_power : reference[d];
          const V counts = received_power == kNothing ? zero : is_active;
          found[d] = at_least(found[d], counts);  // not asked of the sum: the next reference need not wait for it
          sum[d] = sum[d] + counts * exp2_of(received_power - reference[d]);
        }
      }
    }
    const Words<V> words = random_words(seed, r, kResidual, 0);
    const V deviate = normal<V>(words.word[0], words.word[1]);
    node_offset = fraction<V>(words.word[2]);
#pragma unroll
    for (int d = 0; d < kDensities; ++d) {
      const V of_sum = found[d] == 0.0f ? constant<V>(kNothing) : reference[d];
      add_residual(arrival, of_sum, sum[d], deviate, d);
    }
  }

  TW_MEMBER void add_residual(const V& arrival, const V& reference, const V& sum, const V& deviate, int d) {
    const V g = arrival * scales[2 * d];
    const float log2_density = scales[2 * d + 1] + p.log2_activity;
    const Interference<V> found = with_residual<V>(p, sum, reference, g < p.cut, tables.rest_mean(g) + log2_density,
                                                   tables.rest_deviation(g) + 0.5f * log2_density, deviate);
    received.interference[d] = found.log2_power;
    received.residual_share[d] = found.residual_share;
  }

  TW_MEMBER V sinr(int d) const { return log2_sinr(received.signal[d], total(d)); }
  TW_MEMBER V total(int d) const { return log2_with_noise(p, received.interference[d]); }

  // Given everything but the strongest power, whose arrival is uniform below the second: ln(1 + SINR) at arrivals
  // v^4 Gamma_2, one v in each piece of (0, 1). Unbiased for any number of pieces, since one uniform deviate shifts
  // all.
  TW_MEMBER V rate(int d) const {
    const V all = total(d);
    if (p.rate_nodes == 0) return rate_of(received.signal[d], all);
    const float piece = 1.0f / static_cast<float>(p.rate_nodes);
    V sum = constant<V>(0.0f);
    for (int32_t node = 0; node < p.rate_nodes; ++node) {
      const V v = (node_offset + static_cast<float>(node)) * piece, v2 = v * v;
      const V signal = power(v2 * v2 * second_arrival, d);
      sum = M::multiply_add(4.0f * piece * v2 * v, rate_of(signal, all), sum);
    }
    return sum;
  }

  // What coverage is computed from: one number for each density, and one for all.
  TW_MEMBER V kept(int d) const { return total(d); }
  TW_MEMBER V kept_for_all() const { return log2_of(second_arrival); }

  // P(SINR > threshold) given the rest: min(1, density * L1(threshold * (I + W)) / Gamma_2).
  TW_MEMBER static typename M::Wide coverage(const Tables& tables, const V& total, const V& log2_second,
                                             float log2_density, float log2_threshold) {
    const V log2_coverage = tables.measure(total + log2_threshold) + (log2_density - log2_second);
    return exp2_wide(at_most(log2_coverage, constant<V>(0.0f)));
  }
};

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
