// What the scans on CPUs share: tiles of channels, states that are kept, and how a row's steps are found.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

namespace bmojo {

constexpr int64_t SPAN = 64;  // steps between states that forward keeps for backward

// VECTORS vectors of LANES scalars: up to WIDTH channels, those beyond the last one zero
template <typename T>
struct Tile {
  static constexpr int64_t LANES = 32 / sizeof(T), VECTORS = 4, WIDTH = LANES * VECTORS;
  typedef T Vec __attribute__((vector_size(32)));
  Vec v[VECTORS];

  void load(const T* from, int64_t count) {
    if (count < WIDTH) std::memset(v, 0, sizeof v);
    count < WIDTH ? std::memcpy(v, from, sizeof(T) * count) : std::memcpy(v, from, sizeof v);
  }
  void store(T* to, int64_t count) const {
    count < WIDTH ? std::memcpy(to, v, sizeof(T) * count) : std::memcpy(to, v, sizeof v);
  }
};

template <typename T>
inline T sum(const typename Tile<T>::Vec& v) {
  typedef T Half __attribute__((vector_size(16)));
  Half low, high;
  std::memcpy(&low, &v, sizeof low);
  std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
  low += high;
  if constexpr (sizeof(T) == 4)
    return (low[0] + low[2]) + (low[1] + low[3]);
  else
    return low[0] + low[1];
}

template <typename T>
inline T sum(const Tile<T>& tile) {
  return sum<T>((tile.v[0] + tile.v[1]) + (tile.v[2] + tile.v[3]));
}

template <typename T>
const T* data(const std::optional<at::Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

// Of x [batch, time, heads, width] and a state [batch, heads, states, width]
struct Scan {
  int64_t batch, time, heads, width, states, chunk, spans;
  const bool* resets;  // [batch, time / chunk]

  Scan(const at::Tensor& x, int64_t states_, const std::optional<at::Tensor>& resets_, int64_t chunk_size)
      : batch(x.size(0)),
        time(x.size(1)),
        heads(x.size(2)),
        width(x.size(3)),
        states(states_),
        chunk(chunk_size),
        spans((time + SPAN - 1) / SPAN),
        resets(data<bool>(resets_)) {}
  bool reset(int64_t b, int64_t t) const { return resets && t % chunk == 0 && resets[b * (time / chunk) + t / chunk]; }
  int64_t step(int64_t b, int64_t t, int64_t head) const { return (b * time + t) * heads + head; }
  int64_t state(int64_t b, int64_t head) const { return (b * heads + head) * states * width; }
  int64_t start(int64_t b, int64_t span, int64_t head) const { return state(b * spans + span, head); }
};

template <typename T>
void clear(std::vector<Tile<T>>& tiles) {
  std::memset(tiles.data(), 0, sizeof(Tile<T>) * tiles.size());
}

// `count` channels, from `first` on, of a state [states, width]; zero if there is none
template <typename T>
void load(std::vector<Tile<T>>& to, const T* from, const Scan& s, int64_t first, int64_t count) {
  if (!from) return clear(to);
  for (int64_t n = 0; n < s.states; ++n) to[n].load(from + n * s.width + first, count);
}

template <typename T>
void store(const std::vector<Tile<T>>& from, T* to, const Scan& s, int64_t first, int64_t count) {
  for (int64_t n = 0; n < s.states; ++n) from[n].store(to + n * s.width + first, count);
}

}  // namespace bmojo
