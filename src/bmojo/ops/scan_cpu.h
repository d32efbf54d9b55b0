// What the scans on CPUs share: tiles of channels, states that are kept, and how a row's steps are found.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "check_cpu.h"
#include "vectors_cpu.h"

namespace bmojo {

constexpr int64_t SPAN = 64;  // steps between states that forward keeps for backward

template <typename T>
const T* data(const std::optional<at::Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

// Of x [batch, time, heads, width] and a state [batch, heads, states, width]
struct Scan {
  int64_t batch, time, heads, width, states, chunk, spans;
  const bool* resets;  // [batch, time / chunk]

  Scan(const at::Tensor& x, int64_t heads, int64_t states, const std::optional<at::Tensor>& resets_, int64_t chunk_size,
       int64_t span = SPAN)
      : batch(x.size(0)),
        time(x.size(1)),
        heads(heads),
        width(x.size(-1)),
        states(states),
        chunk(chunk_size),
        spans((time + span - 1) / span),
        resets(data<bool>(resets_)) {}
  void check(const Check& check, const std::optional<at::Tensor>& given) const {
    if (given) check.multiple(time, chunk, "tokens");
    if (given) check(*given, {batch, time / chunk}, at::kBool);
  }
  bool reset(int64_t b, int64_t t) const { return resets && t % chunk == 0 && resets[b * (time / chunk) + t / chunk]; }
  int64_t step(int64_t b, int64_t t, int64_t head) const { return (b * time + t) * heads + head; }
  int64_t state(int64_t b, int64_t head) const { return (b * heads + head) * states * width; }
  int64_t start(int64_t b, int64_t span, int64_t head) const { return state(b * spans + span, head); }
};

template <typename T, int BYTES>
void clear(std::vector<Tile<T, BYTES>>& tiles) {
  std::memset(tiles.data(), 0, sizeof(Tile<T, BYTES>) * tiles.size());
}

// `count` channels, from `first` on, of a state [states, width]; zero if there is none
template <typename T, int BYTES>
void load(std::vector<Tile<T, BYTES>>& to, const T* from, const Scan& s, int64_t first, int64_t count) {
  if (!from) return clear(to);
  for (int64_t n = 0; n < s.states; ++n) to[n].load(from + n * s.width + first, count);
}

template <typename T, int BYTES>
void store(const std::vector<Tile<T, BYTES>>& from, T* to, const Scan& s, int64_t first, int64_t count) {
  for (int64_t n = 0; n < s.states; ++n) from[n].store(to + n * s.width + first, count);
}

}  // namespace bmojo
