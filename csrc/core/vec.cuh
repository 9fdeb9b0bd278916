// 16 bytes of elements at a time: Pack<T> is one load's worth (8 of 2 bytes or 4 of 4 bytes), unpacked to fp32 in
// order.
#pragma once

#include "core/numeric.cuh"

namespace tokenweave::inline TOKENWEAVE_BACKEND {

using arch::Vec16;

template <class T>
inline constexpr int kPackSize = 16 / static_cast<int>(sizeof(T));

// Element i of a pack, in memory order (little endian: the low half of a word comes first).
template <class T>
TW_HOST_DEVICE float pack_get(const Vec16& pack, int i) {
  if constexpr (sizeof(T) == 4) {
    return float_of(pack.words[i]);
  } else {
    return to_float(T{static_cast<uint16_t>(pack.words[i / 2] >> (16 * (i % 2)))});
  }
}

// Puts round(value) in element i's place.
template <class T>
TW_HOST_DEVICE void pack_set(Vec16& pack, int i, float value) {
  if constexpr (sizeof(T) == 4) {
    pack.words[i] = bits_of(value);
  } else {
    const int shift = 16 * (i % 2);
    const uint32_t bits = from_float<T>(value).bits;
    pack.words[i / 2] = (pack.words[i / 2] & ~(0xffffu << shift)) | bits << shift;
  }
}

template <class T>
TW_HOST_DEVICE void unpack(const Vec16& pack, float (&values)[kPackSize<T>]) {
#pragma unroll
  for (int i = 0; i < kPackSize<T>; ++i) values[i] = pack_get<T>(pack, i);
}

template <class T>
TW_HOST_DEVICE Vec16 pack(const float (&values)[kPackSize<T>]) {
  Vec16 result;
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    if constexpr (sizeof(T) == 4) {
      result.words[word] = bits_of(values[word]);
    } else {
      const uint32_t low = from_float<T>(values[2 * word]).bits;
      const uint32_t high = from_float<T>(values[2 * word + 1]).bits;
      result.words[word] = low | high << 16;
    }
  }
  return result;
}

// round(a + b), element by element; word by word, so that few fp32 values are alive at once.
template <class T>
TW_HOST_DEVICE Vec16 add_packs(const Vec16& a, const Vec16& b) {
  float values[kPackSize<T>];
#pragma unroll
  for (int i = 0; i < kPackSize<T>; ++i) values[i] = pack_get<T>(a, i) + pack_get<T>(b, i);
  return pack<T>(values);
}

template <class T>
TW_HOST_DEVICE bool is_aligned_16(const T* address) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0;
}

// A pack from any element address: one 16-byte load where aligned, one element at a time elsewhere.
template <class T>
TW_DEVICE Vec16 load_pack(const T* address) {
  if (is_aligned_16(address)) return arch::load_streaming(reinterpret_cast<const Vec16*>(address));
  float values[kPackSize<T>];
#pragma unroll
  for (int i = 0; i < kPackSize<T>; ++i) values[i] = to_float(address[i]);
  return pack<T>(values);
}

template <class T>
TW_DEVICE void store_pack(T* address, const Vec16& value) {
  if (is_aligned_16(address)) {
    arch::store_streaming(reinterpret_cast<Vec16*>(address), value);
    return;
  }
#pragma unroll
  for (int i = 0; i < kPackSize<T>; ++i) address[i] = from_float<T>(pack_get<T>(value, i));
}

}  // namespace tokenweave::inline TOKENWEAVE_BACKEND
