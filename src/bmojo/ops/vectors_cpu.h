// Vectors for the kernels on CPUs, of float and of double.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <type_traits>

namespace bmojo {

template <typename T>
struct Lanes {
  static constexpr int64_t COUNT = 32 / sizeof(T);
  typedef T Vec __attribute__((vector_size(32)));
  typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> Int;
  typedef Int Ints __attribute__((vector_size(32)));
};

template <typename T>
using Vec = typename Lanes<T>::Vec;

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

inline float sum(const Vec<float>& v) {
  const float a = v[0] + v[4], b = v[1] + v[5], c = v[2] + v[6], d = v[3] + v[7];
  return (a + c) + (b + d);
}

inline double sum(const Vec<double>& v) { return (v[0] + v[2]) + (v[1] + v[3]); }

// 2^z for z <= 0, within 1.5 units in the last place; zero below 2^-126
inline Vec<float> exp2_of_negative(Vec<float> z) {
  typedef Lanes<float>::Ints Ints;
  const Vec<float> shift = Vec<float>{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds, and leaves the bits below
  const Vec<float> least = Vec<float>{} - 126.0f;
  const Ints small = z < least;
  z = small ? least : z;
  const Vec<float> whole = z + shift, r = z - (whole - shift);  // r in [-1/2, 1/2]
  Vec<float> p = r * 0.00015353361959569156f + 0.0013398873852565885f;
  p = p * r + 0.00961843691766262f;
  p = p * r + 0.055503323674201965f;
  p = p * r + 0.24022647738456726f;
  p = p * r + 0.6931471824645996f;
  p = p * r + 1.0f;
  return small ? Vec<float>{} : (Vec<float>)((Ints)p + ((Ints)whole << 23));
}

inline Vec<double> exp2_of_negative(Vec<double> z) {
  for (int64_t i = 0; i < Lanes<double>::COUNT; ++i) z[i] = std::exp2(z[i]);
  return z;
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
template <typename T>
struct Tile {
  static constexpr int64_t LANES = Lanes<T>::COUNT, VECTORS = 4, WIDTH = LANES * VECTORS;
  Vec<T> v[VECTORS];

  void load(const T* from, int64_t count) {
    if (count < WIDTH) std::memset(v, 0, sizeof v);
    count < WIDTH ? std::memcpy(v, from, sizeof(T) * count) : std::memcpy(v, from, sizeof v);
  }
  void store(T* to, int64_t count) const {
    count < WIDTH ? std::memcpy(to, v, sizeof(T) * count) : std::memcpy(to, v, sizeof v);
  }
};

template <typename T>
inline T sum(const Tile<T>& tile) {
  return sum((tile.v[0] + tile.v[1]) + (tile.v[2] + tile.v[3]));
}

// sums += recent, which starts anew: sums of sums, because one long sum loses digits
template <typename Tiles>
inline void gather(Tiles& sums, Tiles& recent) {
  for (size_t i = 0; i < sums.size(); ++i)
    for (size_t j = 0; j < std::size(sums[i].v); ++j) sums[i].v[j] += recent[i].v[j];
  std::memset(recent.data(), 0, sizeof(recent[0]) * recent.size());
}

}  // namespace bmojo
