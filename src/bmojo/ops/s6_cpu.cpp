// Mamba-1's selective scan on CPUs; bmojo/ops/s6.py has the mathematics, s6_cpu.py the shapes.
//
// A task is a tile of TILE channels of one row, so that each step works on whole vectors over channels while the state
// [state_size, TILE] stays in the cache. Forward keeps the states at every SPAN-th step; backward goes through the
// spans from the last to the first, and recomputes each from the state at its start.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "scan_cpu.h"

namespace {

using at::Tensor;
using bmojo::clear;
using bmojo::exp2_of_negative;
#ifdef __AVX512F__
constexpr int BYTES = 64;
#else
constexpr int BYTES = 32;
#endif
using Tile = bmojo::Tile<float, BYTES>;
using Vec = bmojo::Vec<float, BYTES>;
constexpr int64_t VECTORS = Tile::VECTORS, TILE = Tile::WIDTH, SPAN = 32;

struct Sizes : bmojo::Scan {  // the channels are one head
  int64_t tiles;

  Sizes(const Tensor& x, const Tensor& B, const std::optional<Tensor>& resets, int64_t chunk_size)
      : Scan(x, 1, B.size(2), resets, chunk_size, SPAN), tiles((width + TILE - 1) / TILE) {}
};

void check(const Sizes& s, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
           const std::optional<Tensor>& resets) {
  const bmojo::Check check("s6", x);
  TORCH_CHECK(x.scalar_type() == at::kFloat, "s6: expected Float, got ", x.scalar_type());
  check(x, {s.batch, s.time, s.width});
  check(dt, x.sizes());
  check(A, {s.states, s.width});
  check(B, {s.batch, s.time, s.states});
  check(C, B.sizes());
  s.check(check, resets);
}

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
  const int64_t N = s.states;
  check(s, x_, dt_, A_, B_, C_, resets_);
  bmojo::Check("s6", x_)(state_, {s.batch, N, s.width});
  Tensor y_ = at::empty({s.batch, s.time, s.width}, x_.options());
  Tensor final_ = at::empty({s.batch, N, s.width}, x_.options());
  Tensor starts_ = at::empty({s.batch, keep ? s.spans : 0, N, s.width}, x_.options());
  const float *x = x_.const_data_ptr<float>(), *dt = dt_.const_data_ptr<float>(), *A = A_.const_data_ptr<float>();
  const float *B = B_.const_data_ptr<float>(), *C = C_.const_data_ptr<float>();
  const float* state = state_ ? state_->const_data_ptr<float>() : nullptr;
  float *y = y_.mutable_data_ptr<float>(), *last = final_.mutable_data_ptr<float>();
  float* starts = starts_.mutable_data_ptr<float>();

  at::parallel_for(0, s.batch * s.tiles, 1, [&](int64_t begin, int64_t end) {
    std::vector<Tile> h(N), rate(N);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / s.tiles, tile = task % s.tiles, first = tile * TILE,
                    count = std::min(TILE, s.width - first);
      load(rate, A, s, first, count);
      scale(rate, LOG2_E);
      load(h, state ? state + s.state(b, 0) : nullptr, s, first, count);
      for (int64_t t = 0; t < s.time; ++t) {
        if (keep && t % SPAN == 0) store(h, starts + s.start(b, t / SPAN, 0), s, first, count);
        if (s.reset(b, t)) clear(h);
        Tile xs, dts, out = {};
        xs.load(x + s.step(b, t, 0) * s.width + first, count);
        dts.load(dt + s.step(b, t, 0) * s.width + first, count);
        for (int64_t j = 0; j < VECTORS; ++j) xs.v[j] *= dts.v[j];
        const float *Bt = B + (b * s.time + t) * N, *Ct = C + (b * s.time + t) * N;
        for (int64_t n = 0; n < N; ++n)
          for (int64_t j = 0; j < VECTORS; ++j) {
            const Vec before = h[n].v[j];
            const Vec now = before * exp2_of_negative(dts.v[j] * rate[n].v[j]) + xs.v[j] * Bt[n];
            h[n].v[j] = now;
            out.v[j] += (exclusive ? before : now) * Ct[n];
          }
        out.store(y + s.step(b, t, 0) * s.width + first, count);
      }
      store(h, last + s.state(b, 0), s, first, count);
    }
  });
  return {y_, final_, starts_};
}

// gradients of x, dt, A, B, C and the state; a task has its own part of those of A, B and C
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& dy_, const Tensor& dfinal_, const Tensor& x_, const Tensor& dt_, const Tensor& A_, const Tensor& B_,
    const Tensor& C_, const Tensor& starts_, const std::optional<Tensor>& resets_, int64_t chunk_size) {
  const Sizes s(x_, B_, resets_, chunk_size);
  const int64_t N = s.states;
  check(s, x_, dt_, A_, B_, C_, resets_);
  const bmojo::Check check("s6", x_);
  check(dy_, x_.sizes());
  check(dfinal_, {s.batch, N, s.width});
  check(starts_, {s.batch, s.spans, N, s.width});
  Tensor dx_ = at::empty({s.batch, s.time, s.width}, x_.options());
  Tensor ddt_ = at::empty({s.batch, s.time, s.width}, x_.options());
  Tensor dA_ = at::empty({s.batch, N, s.width}, x_.options());
  Tensor dB_ = at::empty({s.tiles, s.batch, s.time, N}, x_.options());
  Tensor dC_ = at::empty({s.tiles, s.batch, s.time, N}, x_.options());
  Tensor dstate_ = at::empty({s.batch, N, s.width}, x_.options());
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
      const int64_t b = task / s.tiles, tile = task % s.tiles, first = tile * TILE,
                    count = std::min(TILE, s.width - first);
      load(rate, A, s, first, count);
      log2_rate = rate;
      scale(log2_rate, LOG2_E);
      load(g, dfinal + s.state(b, 0), s, first, count);
      clear(drate);
      clear(drate_of_span);
      for (int64_t span = s.spans - 1; span >= 0; --span) {
        const int64_t from = span * SPAN, steps = std::min(SPAN, s.time - from);
        load(h, starts + s.start(b, span, 0), s, first, count);
        for (int64_t i = 0; i < steps; ++i) {
          const int64_t t = from + i;
          xs[i].load(x + s.step(b, t, 0) * s.width + first, count);
          dts[i].load(dt + s.step(b, t, 0) * s.width + first, count);
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
          const int64_t t = from + i, at = (b * s.time + t) * N;
          const float *Bt = B + at, *Ct = C + at;
          float *dBt = dB + tile * s.batch * s.time * N + at, *dCt = dC + tile * s.batch * s.time * N + at;
          Tile dys, dwritten = {}, ddts = {};
          dys.load(dy + s.step(b, t, 0) * s.width + first, count);
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
            dBt[n] = bmojo::sum(sum_B);
            dCt[n] = bmojo::sum(sum_C);
          }
          for (int64_t j = 0; j < VECTORS; ++j) {
            ddts.v[j] += dwritten.v[j] * xs[i].v[j];
            dwritten.v[j] *= dts[i].v[j];
          }
          dwritten.store(dx + s.step(b, t, 0) * s.width + first, count);
          ddts.store(ddt + s.step(b, t, 0) * s.width + first, count);
          if (s.reset(b, t)) clear(g);
        }
        gather(drate, drate_of_span);
      }
      store(drate, dA + s.state(b, 0), s, first, count);
      store(g, dstate + s.state(b, 0), s, first, count);
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
