// Vectors for the kernels on CPUs, of float and of double.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <type_traits>
#include <vector>

namespace bmojo {

template <typename T, int BYTES = 32>
struct Lanes {
  static constexpr int64_t COUNT = BYTES / sizeof(T);
  typedef T Vec __attribute__((vector_size(BYTES)));
  typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> Int;
  typedef Int Ints __attribute__((vector_size(BYTES)));
};

template <typename T, int BYTES = 32>
using Vec = typename Lanes<T, BYTES>::Vec;

template <typename T>
inline Vec<T> load(const T* from) {
  Vec<T> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <typename T>
inline void store(T* to, Vec<T> v) {
  std::memcpy(to, &v, sizeof v);
}

// the sum over lanes, by halves; FIRST and APART say which part of it
template <size_t FIRST = 0, size_t APART = 1, typename V>
inline auto sum(const V& v) -> std::remove_cvref_t<decltype(v[0])> {
  if constexpr (APART * sizeof v[0] == sizeof v)
    return v[FIRST];
  else
    return sum<FIRST, 2 * APART>(v) + sum<FIRST + APART, 2 * APART>(v);
}

// 2^z for z <= 0, of floats within 1.2 units in the last place and zero below 2^-126
template <typename V>
inline V exp2_of_negative(V z) {
  if constexpr (sizeof z[0] == 8) {
    for (size_t i = 0; i < sizeof z / sizeof z[0]; ++i) z[i] = std::exp2(z[i]);
    return z;
  } else {
    typedef decltype(z < z) Ints;
    const V shift = V{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds, and leaves the bits below
    const V least = V{} - 126.0f;
    const Ints small = z < least;  // not where z is NaN
    z = small ? least : z;
    const V whole = z + shift, r = z - (whole - shift);  // r in [-1/2, 1/2]
    V p = r * 0.00015353361959569156f + 0.0013398873852565885f;
    p = p * r + 0.00961843691766262f;
    p = p * r + 0.055503323674201965f;
    p = p * r + 0.24022647738456726f;
    p = p * r + 0.6931471824645996f;
    p = p * r + 1.0f;
    return small ? V{} : (V)((Ints)p + ((Ints)whole << 23));
  }
}

// 1 / (1 + exp(-z))
template <typename T>
inline Vec<T> sigmoid(const Vec<T>& z) {
  constexpr T log2_e = 1.4426950408889634074;
  const auto positive = z > Vec<T>{};
  const Vec<T> e = exp2_of_negative((positive ? -z : z) * log2_e);
  return (positive ? Vec<T>{} + 1 : e) / (e + 1);
}

// Up to four vectors of channels: those beyond the last one are zero
template <typename T, int BYTES = 32>
struct Tile {
  static constexpr int64_t LANES = Lanes<T, BYTES>::COUNT, VECTORS = 4, WIDTH = LANES * VECTORS;
  Vec<T, BYTES> v[VECTORS];

  void load(const T* from, int64_t count) {
    if (count < WIDTH) std::memset(v, 0, sizeof v);
    count < WIDTH ? std::memcpy(v, from, sizeof(T) * count) : std::memcpy(v, from, sizeof v);
  }
  void store(T* to, int64_t count) const {
    count < WIDTH ? std::memcpy(to, v, sizeof(T) * count) : std::memcpy(to, v, sizeof v);
  }
};

template <typename T, int BYTES>
inline T sum(const Tile<T, BYTES>& tile) {
  return sum((tile.v[0] + tile.v[1]) + (tile.v[2] + tile.v[3]));
}

// sums += recent, which starts anew: sums of sums, because one long sum loses digits
template <typename T, int BYTES>
inline void gather(std::vector<Tile<T, BYTES>>& sums, std::vector<Tile<T, BYTES>>& recent) {
  for (size_t i = 0; i < sums.size(); ++i)
    for (size_t j = 0; j < std::size(sums[i].v); ++j) sums[i].v[j] += recent[i].v[j];
  std::memset(recent.data(), 0, sizeof(recent[0]) * recent.size());
}

}  // namespace bmojo
