// The functions of one real number that the samplers are made of, on lanes of type V (lanes.cuh): the same sequence of
// correctly rounded operations for every V, hence the same bits on every device that multiplies and adds as one. Every
// product that is added is a multiply_add, unless it is exact; a plain a * b + c would be contracted by one compiler
// and not by another. Polynomials: logarithm and 2^f are those of Cephes (Moshier), the sine is Taylor's.
#pragma once

#include "sinr_field/lanes.cuh"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

constexpr float kLn2 = 0x1.62e430p-1f;
constexpr float kLog2E = 0x1.715476p+0f;
constexpr float kNothing = -3.0e38f;  // log2 of a power that is not there; finite, so that differences are no NaN

template <class V>
TW_DEVICE V constant(float value) {
  return V{} + value;
}
template <class V>
TW_DEVICE V at_most(const V& a, const V& b) {
  return a < b ? a : b;
}
template <class V>
TW_DEVICE V at_least(const V& a, const V& b) {
  return a > b ? a : b;
}
template <class V>
TW_DEVICE V magnitude(const V& v) {
  return Math<V>::from_bits(Math<V>::bits(v) & 0x7fffffffu);
}

// ln(1 + f) - f for f in [1/sqrt(2) - 1, sqrt(2) - 1]; relative to ln(1 + f) its error is about 2^-24.
template <class V>
TW_DEVICE V log1p_rest(const V& f) {
  using M = Math<V>;
  V p = M::multiply_add(constant<V>(7.0376836292e-2f), f, constant<V>(-1.1514610310e-1f));
  p = M::multiply_add(p, f, constant<V>(1.1676998740e-1f));
  p = M::multiply_add(p, f, constant<V>(-1.2420140846e-1f));
  p = M::multiply_add(p, f, constant<V>(1.4249322787e-1f));
  p = M::multiply_add(p, f, constant<V>(-1.6668057665e-1f));
  p = M::multiply_add(p, f, constant<V>(2.0000714765e-1f));
  p = M::multiply_add(p, f, constant<V>(-2.4999993993e-1f));
  p = M::multiply_add(p, f, constant<V>(3.3333331174e-1f));
  const V z = f * f;
  return M::multiply_add(constant<V>(-0.5f), z, p * f * z);
}

// u = 2^exponent * (1 + f) with 1 + f in [1/sqrt(2), sqrt(2)), for u > 0 and normal.
template <class V>
struct Split {
  V exponent, f;
};
template <class V>
TW_DEVICE Split<V> split(const V& u) {
  using M = Math<V>;
  const typename M::Bits bits = M::bits(u);
  const typename M::Ints exponent = M::as_ints(bits - 0x3f3504f3u) >> 23;
  return {M::convert(exponent), M::from_bits(bits - (M::as_bits(exponent) << 23)) - 1.0f};
}

// (word + 1/2) 2^-32
template <class V>
TW_DEVICE V fraction(const typename Math<V>::Bits& word) {
  using M = Math<V>;
  return M::multiply_add(M::convert(word), constant<V>(0x1p-32f), constant<V>(0x1p-33f));
}

// An exponential deviate -ln(1 - v) from a random word, v its fraction: to a few units in the last place from 2^-33 to
// 33 ln 2. Near v = 0 the logarithm is taken of v itself, since 1 - v keeps nothing of it.
template <class V>
TW_DEVICE V exponential(const typename Math<V>::Bits& word) {
  using M = Math<V>;
  const V v = fraction<V>(word), u = fraction<V>(M::complement(word));
  Split<V> s = split(u);
  s.f = s.exponent == 0.0f ? -v : s.f;
  const V rest = M::multiply_add(s.exponent, constant<V>(-2.12194440e-4f), log1p_rest(s.f)) + s.f;
  return -M::multiply_add(s.exponent, constant<V>(0.693359375f), rest);
}

// For u > 0 and normal; other u give some finite number.
template <class V>
TW_DEVICE V log2_of(const V& u) {
  const Split<V> s = split(u);
  return Math<V>::multiply_add(s.f + log1p_rest(s.f), constant<V>(kLog2E), s.exponent);
}

// ln(1 + e) for e in [0, 1].
template <class V>
TW_DEVICE V log1p_of(const V& e) {
  using M = Math<V>;
  const auto large = e > 0.41421354f;
  const V f = large ? M::multiply_add(e, constant<V>(0.5f), constant<V>(-0.5f)) : e;
  return f + log1p_rest(f) + (large ? constant<V>(kLn2) : constant<V>(0.0f));
}

// -|v|
template <class V>
TW_DEVICE V minus_magnitude(const V& v) {
  return Math<V>::from_bits(Math<V>::bits(v) | 0x80000000u);
}

// x = whole + f, |f| <= 1/2, and 2^f; for |x| below 2^22.
template <class V>
struct Power {
  V mantissa;
  typename Math<V>::Bits whole;  // as a signed number
};
template <class V>
TW_DEVICE Power<V> power_of_two(const V& x) {
  using M = Math<V>;
  constexpr float kShift = 0x1.8p23f;
  const V shifted = x + kShift;
  const V f = x - (shifted - kShift);
  V p = M::multiply_add(constant<V>(1.535336188319500e-4f), f, constant<V>(1.339887440266574e-3f));
  p = M::multiply_add(p, f, constant<V>(9.618437357674640e-3f));
  p = M::multiply_add(p, f, constant<V>(5.550332471162809e-2f));
  p = M::multiply_add(p, f, constant<V>(2.402264791363012e-1f));
  p = M::multiply_add(p, f, constant<V>(6.931472028550421e-1f));
  return {M::multiply_add(p, f, constant<V>(1.0f)), M::bits(shifted) - bits_of(kShift)};
}

// 2^x for x up to 126; below -126, 2^-126.
template <class V>
TW_DEVICE V exp2_up_to_126(const V& x) {
  using M = Math<V>;
  const Power<V> p = power_of_two(M::not_below(x, -126.0f));
  return M::from_bits(M::bits(p.mantissa) + (p.whole << 23));
}

// 2^x; x is first brought into [-126, 126].
template <class V>
TW_DEVICE V exp2_of(const V& x) {
  return exp2_up_to_126(Math<V>::not_above(x, 126.0f));
}

// 2^x in float64: 0 below 2^-1022, and 2^1023 at most.
template <class V>
TW_DEVICE typename Math<V>::Wide exp2_wide(const V& x) {
  using M = Math<V>;
  const Power<V> p = power_of_two(M::not_above(M::not_below(x, -1022.0f), 1023.0f));
  const V mantissa = x < -1022.0f ? constant<V>(0.0f) : p.mantissa;
  return M::scale(mantissa, M::as_ints(p.whole));
}

// log2(2^a + 2^b); kNothing stands for 2^-inf.
template <class V>
TW_DEVICE V log2_add(const V& a, const V& b) {
  const V large = at_least(a, b), difference = at_most(a, b) - large;
  const V rest = log1p_of(exp2_up_to_126(difference));
  return Math<V>::multiply_add(rest, constant<V>(kLog2E), large);
}

// ln(1 + 2^x), accurate down to 2^-126 and not below.
template <class V>
TW_DEVICE V log_one_plus_exp2(const V& x) {
  const V zero = constant<V>(0.0f);
  return Math<V>::multiply_add(at_least(x, zero), constant<V>(kLn2), log1p_of(exp2_up_to_126(minus_magnitude(x))));
}

// A standard normal deviate (Box and Muller): sin(pi t / 2) for t uniform in (-1, 1) is the cosine of a uniform angle.
template <class V>
TW_DEVICE V normal(const typename Math<V>::Bits& radius_word, const typename Math<V>::Bits& angle_word) {
  using M = Math<V>;
  const V t = M::multiply_add(M::convert(angle_word), constant<V>(0x1p-31f), constant<V>(0x1p-32f - 1.0f));
  const V z = t * t;
  V p = M::multiply_add(constant<V>(-3.5988432e-6f), z, constant<V>(1.6044118e-4f));
  p = M::multiply_add(p, z, constant<V>(-4.6817541e-3f));
  p = M::multiply_add(p, z, constant<V>(7.9692626e-2f));
  p = M::multiply_add(p, z, constant<V>(-6.4596410e-1f));
  p = M::multiply_add(p, z, constant<V>(1.5707963f));
  return M::square_root(2.0f * exponential<V>(radius_word)) * (p * t);
}

// ---------------------------------------------------------------------------------------------------------- randomness

// Which of a realisation's independent sequences of words.
enum Stream : uint32_t { kArrivals = 0, kMarks = 1, kResidual = 3, kActivity = 4 };

struct Seed {
  uint32_t low, high;
};

template <class V>
struct Realisations {
  typename Math<V>::Bits low, high;
};

template <class V>
struct Words {
  typename Math<V>::Bits word[4];
};

template <class V>
TW_DEVICE Words<V> random_words(const Seed& seed, const Realisations<V>& r, Stream stream, uint32_t step) {
  using Bits = typename Math<V>::Bits;
  Words<V> words{{Bits{} + step, r.low, r.high, Bits{} + static_cast<uint32_t>(stream)}};
  Math<V>::philox(words.word, seed.low, seed.high);
  return words;
}

// -------------------------------------------------------------------------------------------------------------- tables

// Functions of a positive number, as _sinr_tables.LogTable: the interval is told by the leading bits of the argument.
struct LogTableKeys {
  int32_t low = 0, high = 0;  // bits of the smallest and largest argument
  int32_t shift = 0;
  int32_t count = 0;  // intervals
};

template <class V>
struct Place {
  typename Math<V>::Bits interval;
  V within;  // [0, 1)
};

// The place of argument bits within an interval: the bits below the key, as the fraction of a float in [1, 2).
template <class V>
TW_DEVICE V place_within(const typename Math<V>::Bits& bits, int32_t shift) {
  return Math<V>::from_bits(((bits << (23 - shift)) & 0x7fffffu) | 0x3f800000u) - 1.0f;
}

template <class V>
TW_DEVICE Place<V> find(const LogTableKeys& keys, const V& argument) {
  using M = Math<V>;
  using Ints = typename M::Ints;
  const Ints bits = M::as_ints(M::bits(argument));
  const Ints low = Ints{} + keys.low, high = Ints{} + keys.high;
  const Ints clamped = at_most(at_least(bits, low), high);
  const auto as_bits = M::as_bits(clamped);
  return {(as_bits >> keys.shift) - static_cast<uint32_t>(keys.low >> keys.shift),
          place_within<V>(as_bits, keys.shift)};
}

// The place of a quantile in a table of two planes, by the fraction of words that lie further out: plane 0 from the
// smallest word up, plane 1 from the largest one down. So both tails are resolved to 2^-33 without a logarithm.
template <class V>
TW_DEVICE Place<V> find_quantile(const LogTableKeys& keys, const typename Math<V>::Bits& word) {
  using M = Math<V>;
  using Bits = typename M::Bits;
  const Bits is_high = M::as_bits(M::as_ints(word) >> 31);  // all bits or none
  Place<V> place = find(keys, fraction<V>(word ^ is_high));
  place.interval = place.interval + (is_high & static_cast<uint32_t>(keys.count));
  return place;
}

// A function of any number, as _sinr_tables.TwoSidedTable.
struct TwoSidedKeys {
  int32_t negative = 0;                          // intervals below 0
  int32_t high_negative = 0, high_positive = 0;  // bits of the largest 1 + |z| on either side
  int32_t shift = 0;
  int32_t count = 0;
};

template <class V>
TW_DEVICE Place<V> find(const TwoSidedKeys& keys, const V& z) {
  using M = Math<V>;
  using Ints = typename M::Ints;
  const auto is_negative = z < 0.0f;
  const Ints high = is_negative ? Ints{} + keys.high_negative : Ints{} + keys.high_positive;
  const Ints bits = at_most(M::as_ints(M::bits(magnitude(z) + 1.0f)), high);
  const Ints step = (bits >> keys.shift) - (0x3f800000 >> keys.shift);
  const Ints interval = is_negative ? keys.negative - 1 - step : keys.negative + step;
  return {M::as_bits(interval), place_within<V>(M::as_bits(bits), keys.shift)};
}

// `read(interval, c)` gives the interval's four coefficients.
template <class V, class Read>
TW_DEVICE V interpolate(const Place<V>& place, const Read& read) {
  using M = Math<V>;
  V c[4];
  read(place.interval, c);
  return M::multiply_add(M::multiply_add(M::multiply_add(c[3], place.within, c[2]), place.within, c[1]), place.within,
                         c[0]);
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
