// Mamba-1's selective scan on CPUs; bmojo/ops/s6.py has the mathematics, s6_cpu.py the shapes.
//
// A task is a tile of TILE channels of one row, so that each step works on whole vectors over channels while the state
// [state_size, TILE] stays in the cache. Forward keeps the states at every SPAN-th step; backward goes through the
// spans from the last to the first, and recomputes each from the state at its start.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "check_cpu.h"

namespace {

using at::Tensor;
#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
#elif defined(__AVX__)
constexpr int64_t LANES = 8;
#else
constexpr int64_t LANES = 4;
#endif
constexpr int64_t VECTORS = 4, TILE = LANES * VECTORS, SPAN = 32;
typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

// 2^z for z <= 0, within 1 unit in the last place; exactly 1 at 0, and 2^-126 in place of anything smaller.
inline Vec exp2_of_negative(Vec z) {
  const Vec shift = Vec{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, kept in the low bits
  const Vec least = Vec{} - 126.0f;
  z = z < least ? least : z;  // so that NaN stays NaN
  const Vec whole = z + shift;
  const Vec r = z - (whole - shift);  // in [-1/2, 1/2]
  Vec p = r * 0.00015353361959569156f + 0.0013398873852565885f;
  p = p * r + 0.00961843691766262f;
  p = p * r + 0.055503323674201965f;
  p = p * r + 0.24022647738456726f;
  p = p * r + 0.6931471824645996f;
  p = p * r + 1.0f;
  return (Vec)((Ints)p + ((Ints)whole << 23));
}

// the sum over lanes, by halves
inline float sum(Vec v) {
  float part[LANES];
  std::memcpy(part, &v, sizeof v);
  for (int64_t width = LANES / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; ++i) part[i] += part[i + width];
  return part[0];
}

// Up to TILE channels of a row; those beyond the last one are zero. A whole tile moves in copies of known size: bytes
// copied one way and read another wait for one another in the processor, which costs more than the scan.
struct Tile {
  Vec v[VECTORS];
  void load(const float* from, int64_t count) {
    if (count == TILE) {
      std::memcpy(v, from, sizeof v);
      return;
    }
    std::memset(v, 0, sizeof v);
    std::memcpy(v, from, sizeof(float) * count);
  }
  void store(float* to, int64_t count) const {
    if (count == TILE)
      std::memcpy(to, v, sizeof v);
    else
      std::memcpy(to, v, sizeof(float) * count);
  }
};

struct Sizes {
  int64_t batch, time, channels, states, chunk, tiles, spans;
  const bool* resets;  // [batch, time / chunk]

  Sizes(const Tensor& x, const Tensor& B, const std::optional<Tensor>& resets_, int64_t chunk_size)
      : batch(x.size(0)),
        time(x.size(1)),
        channels(x.size(2)),
        states(B.size(2)),
        chunk(chunk_size),
        tiles((channels + TILE - 1) / TILE),
        spans((time + SPAN - 1) / SPAN),
        resets(resets_ ? resets_->const_data_ptr<bool>() : nullptr) {}

  bool reset(int64_t b, int64_t t) const { return resets && t % chunk == 0 && resets[b * (time / chunk) + t / chunk]; }
  int64_t width(int64_t tile) const { return std::min(TILE, channels - tile * TILE); }
  int64_t row(int64_t b, int64_t t, int64_t tile) const { return (b * time + t) * channels + tile * TILE; }
};

void check(const Sizes& s, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
           const std::optional<Tensor>& resets) {
  const bmojo::Check check("s6", x);
  check(x, {s.batch, s.time, s.channels});
  check(dt, {s.batch, s.time, s.channels});
  check(A, {s.states, s.channels});
  check(B, {s.batch, s.time, s.states});
  check(C, {s.batch, s.time, s.states});
  if (resets) check.multiple(s.time, s.chunk, "tokens");
  if (resets) check(*resets, {s.batch, s.time / s.chunk}, at::kBool);
}

void load_states(std::vector<Tile>& to, const float* from, const Sizes& s, int64_t tile) {
  for (int64_t n = 0; n < s.states; ++n) to[n].load(from + n * s.channels + tile * TILE, s.width(tile));
}

void store_states(const std::vector<Tile>& from, float* to, const Sizes& s, int64_t tile) {
  for (int64_t n = 0; n < s.states; ++n) from[n].store(to + n * s.channels + tile * TILE, s.width(tile));
}

void clear(std::vector<Tile>& tiles) { std::memset(tiles.data(), 0, sizeof(Tile) * tiles.size()); }

void scale(std::vector<Tile>& tiles, float by) {
  for (Tile& tile : tiles)
    for (Vec& v : tile.v) v *= by;
}

constexpr float LOG2_E = 1.4426950408889634f;

// y, the final state, and the states before every SPAN-th step if `keep`
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x_, const Tensor& dt_, const Tensor& A_, const Tensor& B_,
                                           const Tensor& C_, const std::optional<Tensor>& state_,
                                           const std::optional<Tensor>& resets_, int64_t chunk_size, bool exclusive,
                                           bool keep) {
  const Sizes s(x_, B_, resets_, chunk_size);
  const int64_t N = s.states, block = N * s.channels;
  check(s, x_, dt_, A_, B_, C_, resets_);
  bmojo::Check("s6", x_)(state_, {s.batch, N, s.channels});
  Tensor y_ = at::empty({s.batch, s.time, s.channels}, x_.options());
  Tensor final_ = at::empty({s.batch, N, s.channels}, x_.options());
  Tensor starts_ = at::empty({s.batch, keep ? s.spans : 0, N, s.channels}, x_.options());
  const float *x = x_.const_data_ptr<float>(), *dt = dt_.const_data_ptr<float>(), *A = A_.const_data_ptr<float>();
  const float *B = B_.const_data_ptr<float>(), *C = C_.const_data_ptr<float>();
  const float* state = state_ ? state_->const_data_ptr<float>() : nullptr;
  float *y = y_.mutable_data_ptr<float>(), *last = final_.mutable_data_ptr<float>();
  float* starts = starts_.mutable_data_ptr<float>();

  at::parallel_for(0, s.batch * s.tiles, 1, [&](int64_t begin, int64_t end) {
    std::vector<Tile> h(N), rate(N);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / s.tiles, tile = task % s.tiles, width = s.width(tile);
      load_states(rate, A, s, tile);
      scale(rate, LOG2_E);
      if (state)
        load_states(h, state + b * block, s, tile);
      else
        clear(h);
      for (int64_t t = 0; t < s.time; ++t) {
        if (keep && t % SPAN == 0) store_states(h, starts + (b * s.spans + t / SPAN) * block, s, tile);
        if (s.reset(b, t)) clear(h);
        Tile xs, dts, out = {};
        xs.load(x + s.row(b, t, tile), width);
        dts.load(dt + s.row(b, t, tile), width);
        for (int64_t j = 0; j < VECTORS; ++j) xs.v[j] *= dts.v[j];
        const float *Bt = B + (b * s.time + t) * N, *Ct = C + (b * s.time + t) * N;
        for (int64_t n = 0; n < N; ++n)
          for (int64_t j = 0; j < VECTORS; ++j) {
            const Vec before = h[n].v[j];
            const Vec now = before * exp2_of_negative(dts.v[j] * rate[n].v[j]) + xs.v[j] * Bt[n];
            h[n].v[j] = now;
            out.v[j] += (exclusive ? before : now) * Ct[n];
          }
        out.store(y + s.row(b, t, tile), width);
      }
      store_states(h, last + b * block, s, tile);
    }
  });
  return {y_, final_, starts_};
}

// gradients of x, dt, A, B, C and the state; a task has its own part of those of A, B and C
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& dy_, const Tensor& dfinal_, const Tensor& x_, const Tensor& dt_, const Tensor& A_, const Tensor& B_,
    const Tensor& C_, const Tensor& starts_, const std::optional<Tensor>& resets_, int64_t chunk_size) {
  const Sizes s(x_, B_, resets_, chunk_size);
  const int64_t N = s.states, block = N * s.channels;
  check(s, x_, dt_, A_, B_, C_, resets_);
  const bmojo::Check check("s6", x_);
  check(dy_, x_.sizes());
  check(dfinal_, {s.batch, N, s.channels});
  check(starts_, {s.batch, s.spans, N, s.channels});
  Tensor dx_ = at::empty({s.batch, s.time, s.channels}, x_.options());
  Tensor ddt_ = at::empty({s.batch, s.time, s.channels}, x_.options());
  Tensor dA_ = at::empty({s.batch, N, s.channels}, x_.options());
  Tensor dB_ = at::empty({s.tiles, s.batch, s.time, N}, x_.options());
  Tensor dC_ = at::empty({s.tiles, s.batch, s.time, N}, x_.options());
  Tensor dstate_ = at::empty({s.batch, N, s.channels}, x_.options());
  const float *x = x_.const_data_ptr<float>(), *dt = dt_.const_data_ptr<float>(), *A = A_.const_data_ptr<float>();
  const float *B = B_.const_data_ptr<float>(), *C = C_.const_data_ptr<float>();
  const float *dy = dy_.const_data_ptr<float>(), *dfinal = dfinal_.const_data_ptr<float>();
  const float* starts = starts_.const_data_ptr<float>();
  float *dx = dx_.mutable_data_ptr<float>(), *ddt = ddt_.mutable_data_ptr<float>();
  float *dA = dA_.mutable_data_ptr<float>(), *dstate = dstate_.mutable_data_ptr<float>();
  float *dB = dB_.mutable_data_ptr<float>(), *dC = dC_.mutable_data_ptr<float>();

  at::parallel_for(0, s.batch * s.tiles, 1, [&](int64_t begin, int64_t end) {
    std::vector<Tile> h(N), rate(N), log2_rate(N), g(N), drate(N), drate_of_span(N);
    std::vector<Tile> decay(SPAN * N), kept(SPAN * N);  // of every step: exp(dt A), and exp(dt A) h_{t-1}
    Tile xs[SPAN], dts[SPAN], written[SPAN];            // written: dt x
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / s.tiles, tile = task % s.tiles, width = s.width(tile);
      load_states(rate, A, s, tile);
      log2_rate = rate;
      scale(log2_rate, LOG2_E);
      load_states(g, dfinal + b * block, s, tile);
      clear(drate);
      for (int64_t span = s.spans - 1; span >= 0; --span) {
        const int64_t first = span * SPAN, steps = std::min(SPAN, s.time - first);
        load_states(h, starts + (b * s.spans + span) * block, s, tile);
        clear(drate_of_span);  // sums of sums: one long sum loses digits
        for (int64_t i = 0; i < steps; ++i) {
          const int64_t t = first + i;
          xs[i].load(x + s.row(b, t, tile), width);
          dts[i].load(dt + s.row(b, t, tile), width);
          for (int64_t j = 0; j < VECTORS; ++j) written[i].v[j] = xs[i].v[j] * dts[i].v[j];
          if (s.reset(b, t)) clear(h);
          const float* Bt = B + (b * s.time + t) * N;
          for (int64_t n = 0; n < N; ++n)
            for (int64_t j = 0; j < VECTORS; ++j) {
              const Vec e = exp2_of_negative(dts[i].v[j] * log2_rate[n].v[j]), p = h[n].v[j] * e;
              decay[i * N + n].v[j] = e;
              kept[i * N + n].v[j] = p;
              h[n].v[j] = p + written[i].v[j] * Bt[n];
            }
        }
        for (int64_t i = steps - 1; i >= 0; --i) {
          const int64_t t = first + i, at = (b * s.time + t) * N;
          const float *Bt = B + at, *Ct = C + at;
          float *dBt = dB + tile * s.batch * s.time * N + at, *dCt = dC + tile * s.batch * s.time * N + at;
          Tile dys, dwritten = {}, ddts = {};
          dys.load(dy + s.row(b, t, tile), width);
          for (int64_t n = 0; n < N; ++n) {
            Vec sum_B = {}, sum_C = {};
            for (int64_t j = 0; j < VECTORS; ++j) {
              const Vec p = kept[i * N + n].v[j], dh = g[n].v[j] + dys.v[j] * Ct[n], dp = dh * p;
              sum_C += dys.v[j] * (p + written[i].v[j] * Bt[n]);
              sum_B += dh * written[i].v[j];
              dwritten.v[j] += dh * Bt[n];
              ddts.v[j] += dp * rate[n].v[j];
              drate_of_span[n].v[j] += dp * dts[i].v[j];
              g[n].v[j] = dh * decay[i * N + n].v[j];
            }
            dBt[n] = sum(sum_B);
            dCt[n] = sum(sum_C);
          }
          for (int64_t j = 0; j < VECTORS; ++j) {
            ddts.v[j] += dwritten.v[j] * xs[i].v[j];
            dwritten.v[j] *= dts[i].v[j];
          }
          dwritten.store(dx + s.row(b, t, tile), width);
          ddts.store(ddt + s.row(b, t, tile), width);
          if (s.reset(b, t)) clear(g);
        }
        for (int64_t n = 0; n < N; ++n)
          for (int64_t j = 0; j < VECTORS; ++j) drate[n].v[j] += drate_of_span[n].v[j];
      }
      store_states(drate, dA + b * block, s, tile);
      store_states(g, dstate + b * block, s, tile);
    }
  });
  return {dx_, ddt_, at::sum(dA_, 0), at::sum(dB_, 0), at::sum(dC_, 0), dstate_};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(bmojo, library) {
  library.def(
      "s6_forward(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? state, Tensor? resets, int chunk_size, "
      "bool exclusive, bool keep) -> (Tensor, Tensor, Tensor)");
  library.def(
      "s6_backward(Tensor dy, Tensor dfinal, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor starts, "
      "Tensor? resets, int chunk_size) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(bmojo, CPU, library) {
  library.impl("s6_forward", forward);
  library.impl("s6_backward", backward);
}
