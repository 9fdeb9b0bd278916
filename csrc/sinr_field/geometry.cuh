// One realisation (lane) of base stations by distance: s_i = Gamma_i / (pi density) for the arrivals Gamma_1 < Gamma_2
// < ... of a unit Poisson process, s = r^2.
#pragma once

#include "sinr_field/received.cuh"
#include "sinr_field/sample_geometry.h"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

constexpr float kInversePi = 0x1.45f306p-2f;

// log2 of the path gain at s. A path loss of increasing slopes is the largest of its lines in log-log coordinates.
template <class V, class Tables>
TW_DEVICE V log2_gain(const GeometryParams& p, const Tables& tables, const V& s) {
  const V distance2 = at_least(s, constant<V>(p.min_distance2)) + p.height2;
  if (p.num_slopes == 0) return tables.gain(distance2);
  const V log2_distance2 = log2_of(distance2);
  if (p.num_slopes == 1) {
    return -Math<V>::multiply_add(constant<V>(p.gain[1]), log2_distance2, constant<V>(p.gain[0]));
  }
  V loss = constant<V>(kNothing);
  for (int32_t slope = 0; slope < p.num_slopes; ++slope) {
    const V line =
        Math<V>::multiply_add(constant<V>(p.gain[2 * slope + 1]), log2_distance2, constant<V>(p.gain[2 * slope]));
    loss = at_least(loss, line);
  }
  return -loss;
}

// A sum of powers in any order, relative to the largest so far.
template <class V>
struct PowerSum {
  V reference, sum;

  TW_MEMBER void clear() {
    reference = constant<V>(kNothing);
    sum = constant<V>(0.0f);
  }
  TW_MEMBER void add(const V& power) {
    const V difference = power - reference, scale = exp2_up_to_126(minus_magnitude(difference));
    sum = difference > 0.0f ? Math<V>::multiply_add(sum, scale, constant<V>(1.0f)) : sum + scale;
    reference = at_least(power, reference);
  }
  template <class Mask>
  TW_MEMBER void add(const V& power, const Mask& counts) {
    const V difference = power - reference, scale = exp2_up_to_126(minus_magnitude(difference));
    const V one = constant<V>(1.0f), added = sum + scale;
    const V larger = difference > 0.0f ? Math<V>::multiply_add(sum, scale, one) : added;
    sum = counts ? larger : sum;
    reference = counts ? at_least(power, reference) : reference;
  }
};

// The largest power, and the sum of the active others. Idle stations may be the largest, but add nothing.
template <class V>
struct StrongestOf {
  V largest, is_active;  // 1 or 0
  PowerSum<V> others;

  TW_MEMBER void clear() {
    largest = constant<V>(kNothing);
    is_active = constant<V>(0.0f);
    others.clear();
  }
  // Before there are two, 2^kNothing is added, which is nothing beside any other.
  TW_MEMBER void add(const V& power) {
    const auto is_larger = power > largest;
    const V smaller = is_larger ? largest : power;
    largest = is_larger ? power : largest;
    others.add(smaller);
  }
  template <class Mask>
  TW_MEMBER void add(const V& power, const V& power_is_active, const Mask& exists) {
    const auto is_larger = power > largest;
    const V smaller = is_larger ? largest : power, smaller_is_active = is_larger ? is_active : power_is_active;
    const V counted = exists ? smaller_is_active : constant<V>(0.0f);
    others.add(smaller, counted > 0.0f);
    const V most = is_larger ? power : largest, most_is_active = is_larger ? power_is_active : is_active;
    largest = exists ? most : largest;
    is_active = exists ? most_is_active : is_active;
  }
};

// `tables`: gain(s), mark(word), far_mean(s), far_deviation(s), each of lanes and as log2.
template <class V, int kDensities, class Tables>
struct Geometry {
  using M = Math<V>;
  const SampleGeometryParams& p;
  const Tables& tables;
  const float* scales;  // [kDensities, 2]

  Received<V, kDensities> received;

  TW_MEMBER Geometry(const SampleGeometryParams& params, const Tables& of_network, const float* of_densities)
      : p(params), tables(of_network), scales(of_densities) {}

  TW_MEMBER V distance2(const V& arrival, int d) const { return arrival * (scales[2 * d] * kInversePi); }

  TW_MEMBER void walk(const Realisations<V>& r) {
    if (p.all_active && p.end2 == __builtin_inff()) {
      walk_stations<true>(r);
    } else {
      walk_stations<false>(r);
    }
  }

  // kAll: every station is active, and there is no rim.
  template <bool kAll>
  TW_MEMBER void walk_stations(const Realisations<V>& r) {
    const Seed seed{p.seed_low, p.seed_high};
    V arrival = constant<V>(0.0f);
    StrongestOf<V> found[kDensities];
#pragma unroll
    for (int d = 0; d < kDensities; ++d) found[d].clear();
    const int32_t num_steps = p.num_points / 4;
    for (int32_t step = 0; step < num_steps; ++step) {
      const Words<V> words = random_words(seed, r, kArrivals, static_cast<uint32_t>(step));
      const Words<V> marks = random_words(seed, r, kMarks, static_cast<uint32_t>(step));
      Words<V> activity{};
      if (!kAll && !p.all_active) activity = random_words(seed, r, kActivity, static_cast<uint32_t>(step));
      bool is_past_rim = !kAll;
      TW_UNROLL_4
      for (int w = 0; w < 4; ++w) {
        arrival = arrival + exponential<V>(words.word[w]);
        const V mark = tables.mark(marks.word[w]);
        const V is_active = activity.word[w] < p.activity_limit ? constant<V>(1.0f) : constant<V>(0.0f);
#pragma unroll
        for (int d = 0; d < kDensities; ++d) {
          const V s = distance2(arrival, d), power = log2_gain(p, tables, s) + mark;
          const bool serves = p.nearest && w == 0 && step == 0;
          if (kAll) {
            add_each(found[d], power, serves);
          } else {
            const auto exists = s < p.end2;
            if (w == 3 && M::any(exists)) is_past_rim = false;
            add(found[d], power, is_active, exists, serves);
          }
        }
      }
      if (is_past_rim) break;
    }
    const Words<V> words = random_words(seed, r, kResidual, 0);
    const V deviate = normal<V>(words.word[0], words.word[1]);
#pragma unroll
    for (int d = 0; d < kDensities; ++d) finish(arrival, found[d].largest, found[d].others, deviate, d);
  }

  TW_MEMBER void add_each(StrongestOf<V>& found, const V& power, bool serves) const {
    if (!p.nearest) {
      found.add(power);
    } else if (serves) {
      found.largest = power;
    } else {
      found.others.add(power);
    }
  }

  template <class Mask>
  TW_MEMBER void add(StrongestOf<V>& found, const V& power, const V& is_active, const Mask& exists, bool serves) const {
    if (!p.nearest) {
      found.add(power, is_active, exists);
    } else if (serves) {
      found.largest = exists ? power : constant<V>(kNothing);
    } else {
      found.others.add(power, (exists ? is_active : constant<V>(0.0f)) > 0.0f);
    }
  }

  TW_MEMBER void finish(const V& arrival, const V& signal, const PowerSum<V>& others, const V& deviate, int d) {
    const V s = distance2(arrival, d);
    const float log2_density = scales[2 * d + 1] + p.log2_activity;
    const Interference<V> found = with_residual<V>(
        p, others.sum, others.reference, s < p.end2, tables.far_mean(s) + (log2_density + p.log2_mark_mean),
        tables.far_deviation(s) + 0.5f * (log2_density + p.log2_mark_second_moment), deviate);
    received.signal[d] = signal;
    received.interference[d] = found.log2_power;
    received.residual_share[d] = found.residual_share;
  }

  TW_MEMBER V total(int d) const { return log2_with_noise(p, received.interference[d]); }
  TW_MEMBER V sinr(int d) const { return log2_sinr(received.signal[d], total(d)); }
  TW_MEMBER V rate(int d) const { return rate_of(received.signal[d], total(d)); }

  // What coverage is computed from: one number for each density, and one for all, which this sampler does not need.
  TW_MEMBER V kept(int d) const { return sinr(d); }
  TW_MEMBER V kept_for_all() const { return constant<V>(0.0f); }

  TW_MEMBER static typename M::Wide coverage(const Tables&, const V& sinr, const V&, float, float log2_threshold) {
    return M::widen(sinr > log2_threshold ? constant<V>(1.0f) : constant<V>(0.0f));
  }
};

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
