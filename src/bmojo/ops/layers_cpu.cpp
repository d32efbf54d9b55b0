// What stands between the matrix products of a block on CPUs, each in one pass over its data: short convolution with
// SiLU, rotary positions, RMS norm, SwiGLU. bmojo/ops/layers.py and rope.py have the mathematics and the shapes.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "check_cpu.h"
#include "vectors_cpu.h"

namespace {

using at::Tensor;
using bmojo::load;
using bmojo::sigmoid;
using bmojo::store;
using bmojo::Tile;
using bmojo::Vec;
constexpr int64_t GRAIN = 16384;  // elements, the least that a thread is woken for
constexpr int64_t BLOCK = 64;     // rows that a task of the convolution takes
constexpr int64_t SUMMED = 128;   // terms of a sum of weights' gradients: one long sum loses digits

int64_t rows_a_task(int64_t width) { return std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, width)); }

// work(begin, vectors) for [0, count) in whole vectors, then work(i, one) for what is left
template <typename T, typename Whole, typename One>
inline void along(int64_t count, const Whole& whole, const One& one) {
  constexpr int64_t L = bmojo::Lanes<T>::COUNT;
  int64_t i = 0;
  for (; i + L <= count; i += L) whole(i);
  for (; i < count; ++i) one(i);
}

// ---- short causal convolution: extended [batch, lags + time, channels], weight [channels, size], oldest first

struct Conv {
  int64_t batch, time, channels, size, lags;
  const int64_t* position;  // [batch, time], where documents are packed

  Conv(const Tensor& extended, const Tensor& weight, const std::optional<Tensor>& position_)
      : batch(extended.size(0)),
        time(extended.size(1) - weight.size(1) + 1),
        channels(extended.size(2)),
        size(weight.size(1)),
        lags(size - 1),
        position(position_ ? position_->const_data_ptr<int64_t>() : nullptr) {}

  void check(const Tensor& extended, const Tensor& weight, const std::optional<Tensor>& bias,
             const std::optional<Tensor>& position_) const {
    const bmojo::Check check("causal_conv", extended);
    TORCH_CHECK(size > 0 && time >= 0, "causal_conv: expected at least ", size, " - 1 inputs and one tap, got ",
                time + lags, " inputs");
    check(extended, {batch, lags + time, channels});
    check(weight, {channels, size});
    check(bias, {channels});
    check(position_, {batch, time}, at::kLong);
  }

  // how many tokens back step t may look
  int64_t reach(int64_t b, int64_t t) const { return position ? std::min(lags, position[b * time + t]) : lags; }
};

template <typename T>
struct Taps {  // of one tile of channels
  const Conv& c;
  int64_t b, first, count;
  std::vector<Tile<T>> weight;  // by lag
  Tile<T> bias = {};
  const T* extended;

  Taps(const Conv& c, int64_t b, int64_t first, const T* weights, const T* biases, const T* extended)
      : c(c),
        b(b),
        first(first),
        count(std::min(Tile<T>::WIDTH, c.channels - first)),
        weight(c.size),
        extended(extended) {
    for (int64_t lag = 0; lag < c.size; ++lag) {
      T one[Tile<T>::WIDTH] = {};
      for (int64_t i = 0; i < count; ++i) one[i] = weights[(first + i) * c.size + c.lags - lag];
      weight[lag].load(one, Tile<T>::WIDTH);
    }
    if (biases) bias.load(biases + first, count);
  }

  Tile<T> input(int64_t t, int64_t lag) const {
    Tile<T> x;
    x.load(extended + (b * (c.time + c.lags) + t + c.lags - lag) * c.channels + first, count);
    return x;
  }

  Tile<T> at(int64_t t) const {
    Tile<T> sum = bias;
    for (int64_t lag = 0; lag <= c.reach(b, t); ++lag) {
      const Tile<T> x = input(t, lag);
      for (int64_t j = 0; j < Tile<T>::VECTORS; ++j) sum.v[j] += x.v[j] * weight[lag].v[j];
    }
    return sum;
  }
};

// work(b, block, first row, row after the last) for blocks of `rows` rows
template <typename Work>
void each_block(const Conv& c, int64_t rows, const Work& work) {
  const int64_t blocks = (rows + BLOCK - 1) / BLOCK;
  at::parallel_for(0, c.batch * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task % blocks * BLOCK;
      work(task / blocks, task, row, std::min(rows, row + BLOCK));
    }
  });
}

// The taps of all tiles. Rows are gone through whole: where they lie a power of two apart, a column of tiles would read
// at the addresses (but for high bits) of what it has just written, and processors wait in that case.
template <typename T>
std::vector<Taps<T>> all_taps(const Conv& c, int64_t b, const T* weights, const T* biases, const T* extended) {
  std::vector<Taps<T>> taps;
  for (int64_t first = 0; first < c.channels; first += Tile<T>::WIDTH)
    taps.emplace_back(c, b, first, weights, biases, extended);
  return taps;
}

Tensor conv_forward(const Tensor& extended, const Tensor& weight, const std::optional<Tensor>& bias,
                    const std::optional<Tensor>& position, bool silu) {
  const Conv c(extended, weight, position);
  c.check(extended, weight, bias, position);
  Tensor y = at::empty({c.batch, c.time, c.channels}, extended.options());
  AT_DISPATCH_FLOATING_TYPES(extended.scalar_type(), "conv", [&] {
    using T = scalar_t;
    const T *x = extended.const_data_ptr<T>(), *w = weight.const_data_ptr<T>();
    const T* b0 = bias ? bias->const_data_ptr<T>() : nullptr;
    T* out = y.mutable_data_ptr<T>();
    each_block(c, c.time, [&](int64_t b, int64_t, int64_t from, int64_t to) {
      const std::vector<Taps<T>> tiles = all_taps(c, b, w, b0, x);
      for (int64_t t = from; t < to; ++t)
        for (const Taps<T>& taps : tiles) {
          Tile<T> z = taps.at(t);
          if (silu)
            for (auto& v : z.v) v *= sigmoid<T>(v);
          z.store(out + (b * c.time + t) * c.channels + taps.first, taps.count);
        }
    });
  });
  return y;
}

// gradients of extended, weight and bias
std::tuple<Tensor, Tensor, Tensor> conv_backward(const Tensor& dy, const Tensor& extended, const Tensor& weight,
                                                 const std::optional<Tensor>& bias,
                                                 const std::optional<Tensor>& position, bool silu) {
  const Conv c(extended, weight, position);
  c.check(extended, weight, bias, position);
  bmojo::Check("causal_conv", extended)(dy, {c.batch, c.time, c.channels});
  Tensor dx = at::empty_like(extended);
  const int64_t inputs = c.time + c.lags, blocks = c.batch * ((inputs + BLOCK - 1) / BLOCK);
  Tensor dw = at::empty({blocks, c.channels, c.size}, weight.options());
  Tensor db = at::empty({blocks, c.channels}, weight.options());
  AT_DISPATCH_FLOATING_TYPES(extended.scalar_type(), "conv", [&] {
    using T = scalar_t;
    constexpr int64_t V = Tile<T>::VECTORS;
    const T *x = extended.const_data_ptr<T>(), *w = weight.const_data_ptr<T>(), *g = dy.const_data_ptr<T>();
    const T* b0 = bias ? bias->const_data_ptr<T>() : nullptr;
    T *out = dx.mutable_data_ptr<T>(), *dweight = dw.mutable_data_ptr<T>(), *dbias = db.mutable_data_ptr<T>();
    each_block(c, inputs, [&](int64_t b, int64_t block, int64_t from, int64_t to) {
      const std::vector<Taps<T>> tiles = all_taps(c, b, w, b0, x);
      const int64_t count = tiles.size();
      std::vector<Tile<T>> slopes(c.size * count, Tile<T>{});      // of the last steps, that of step t at t % size
      std::vector<Tile<T>> sums((c.size + 1) * count, Tile<T>{});  // of the weight, by lag, and of the bias
      for (int64_t t = std::max<int64_t>(0, from - c.lags); t < to; ++t)  // input t is read last by step t
        for (int64_t k = 0; k < count; ++k) {
          const Taps<T>& taps = tiles[k];
          Tile<T>&slope = slopes[t % c.size * count + k], *own = &sums[k * (c.size + 1)];
          slope = Tile<T>{};
          if (t < c.time) {
            slope.load(g + (b * c.time + t) * c.channels + taps.first, taps.count);
            if (silu) {
              const Tile<T> z = taps.at(t);
              for (int64_t j = 0; j < V; ++j) {
                const Vec<T> s = sigmoid<T>(z.v[j]);
                slope.v[j] *= s + z.v[j] * s * (1 - s);
              }
            }
          }
          if (t < from) continue;  // a step of the block before
          if (t < c.time) {
            for (int64_t j = 0; j < V; ++j) own[c.size].v[j] += slope.v[j];
            for (int64_t lag = 0; lag <= c.reach(b, t); ++lag) {
              const Tile<T> in = taps.input(t, lag);
              for (int64_t j = 0; j < V; ++j) own[lag].v[j] += slope.v[j] * in.v[j];
            }
          }
          Tile<T> sum = {};
          for (int64_t step = std::max<int64_t>(0, t - c.lags); step <= std::min(t, c.time - 1); ++step) {
            const int64_t lag = step + c.lags - t;
            if (lag > c.reach(b, step)) continue;
            const Tile<T>& at = slopes[step % c.size * count + k];
            for (int64_t j = 0; j < V; ++j) sum.v[j] += at.v[j] * taps.weight[lag].v[j];
          }
          sum.store(out + (b * inputs + t) * c.channels + taps.first, taps.count);
        }
      for (int64_t k = 0; k < count; ++k) {
        const int64_t first = tiles[k].first;
        T one[Tile<T>::WIDTH];
        sums[k * (c.size + 1) + c.size].store(dbias + block * c.channels + first, tiles[k].count);
        for (int64_t lag = 0; lag < c.size; ++lag) {
          sums[k * (c.size + 1) + lag].store(one, Tile<T>::WIDTH);
          for (int64_t i = 0; i < tiles[k].count; ++i)
            dweight[(block * c.channels + first + i) * c.size + c.lags - lag] = one[i];
        }
      }
    });
  });
  return {dx, dw.sum(0), db.sum(0)};
}

// ---- rotary positions: x [batch, ..., heads, width], cos and sin [batch or 1, ..., 1, width]; `back` turns the other
// way

Tensor rotate(const Tensor& x, const Tensor& cos, const Tensor& sin, bool back) {
  const int64_t width = x.size(-1), half = width / 2, heads = x.size(-2);
  const bmojo::Check check("rotate", x);
  check.multiple(width, 2, "channels");
  auto sizes = x.sizes().vec();
  sizes[x.dim() - 2] = 1;
  if (cos.dim() == x.dim() && x.dim() > 2 && cos.size(0) == 1) sizes[0] = 1;
  check(x, x.sizes());
  check(cos, sizes);
  check(sin, sizes);
  Tensor y = at::empty_like(x);
  if (!x.numel()) return y;
  const int64_t rows = x.numel() / (heads * width), table = cos.numel() / width;
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "rotate", [&] {
    using T = scalar_t;
    const T *in = x.const_data_ptr<T>(), *c = cos.const_data_ptr<T>(), *s = sin.const_data_ptr<T>();
    T* out = y.mutable_data_ptr<T>();
    const T sign = back ? -1 : 1;
    at::parallel_for(0, rows, rows_a_task(heads * width), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T *a = c + row % table * width, *b = s + row % table * width;
        for (int64_t head = 0; head < heads; ++head) {
          const T* from = in + (row * heads + head) * width;
          T* to = out + (row * heads + head) * width;
          along<T>(
              half,
              [&](int64_t i) {
                const Vec<T> first = load(from + i), second = load(from + half + i);
                store(to + i, first * load(a + i) - second * load(b + i) * sign);
                store(to + half + i, second * load(a + half + i) + first * load(b + half + i) * sign);
              },
              [&](int64_t i) {
                to[i] = from[i] * a[i] - from[half + i] * b[i] * sign;
                to[half + i] = from[half + i] * a[half + i] + from[i] * b[half + i] * sign;
              });
        }
      }
    });
  });
  return y;
}

// ---- RMS norm of rows [rows, width]

int64_t rows_of(const Tensor& x, int64_t width) { return width ? x.numel() / width : 0; }

std::tuple<Tensor, Tensor> norm_forward(const Tensor& x, const Tensor& weight, double eps) {
  const int64_t width = x.size(-1), rows = rows_of(x, width);
  const bmojo::Check check("rms_norm", x);
  check(x, x.sizes());
  check(weight, {width});
  Tensor y = at::empty_like(x);
  Tensor inverse = at::empty({rows}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "norm", [&] {
    using T = scalar_t;
    const T *in = x.const_data_ptr<T>(), *w = weight.const_data_ptr<T>();
    T *out = y.mutable_data_ptr<T>(), *r = inverse.mutable_data_ptr<T>();
    at::parallel_for(0, rows, rows_a_task(width), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T* from = in + row * width;
        T* to = out + row * width;
        Vec<T> squares = {};
        T rest = 0;
        along<T>(
            width, [&](int64_t i) { squares += load(from + i) * load(from + i); },
            [&](int64_t i) { rest += from[i] * from[i]; });
        const T by = 1 / std::sqrt((bmojo::sum(squares) + rest) / width + static_cast<T>(eps));
        r[row] = by;
        along<T>(
            width, [&](int64_t i) { store(to + i, load(from + i) * by * load(w + i)); },
            [&](int64_t i) { to[i] = from[i] * by * w[i]; });
      }
    });
  });
  return {y, inverse};
}

// gradients of x and weight
std::tuple<Tensor, Tensor> norm_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                         const Tensor& inverse) {
  const int64_t width = x.size(-1), rows = rows_of(x, width), each = rows_a_task(width);
  const bmojo::Check check("rms_norm", x);
  check(x, x.sizes());
  check(dy, x.sizes());
  check(weight, {width});
  check(inverse, {rows});
  Tensor dx = at::empty_like(x);
  const int64_t tasks = std::min<int64_t>(at::get_num_threads(), (rows + each - 1) / each);
  Tensor dw = at::zeros({tasks, width}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "norm", [&] {
    using T = scalar_t;
    const T *in = x.const_data_ptr<T>(), *w = weight.const_data_ptr<T>(), *g = dy.const_data_ptr<T>();
    const T* r = inverse.const_data_ptr<T>();
    T *out = dx.mutable_data_ptr<T>(), *dweight = dw.mutable_data_ptr<T>();
    at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = rows * task / tasks, last = rows * (task + 1) / tasks;
        std::vector<T> sums(width);
        for (int64_t row = first; row < last; ++row) {
          const T *from = in + row * width, *slope = g + row * width;
          T* to = out + row * width;
          const T by = r[row];
          Vec<T> dots = {};
          T rest = 0;
          along<T>(
              width,
              [&](int64_t i) {
                const Vec<T> product = load(slope + i) * load(from + i);
                dots += product * load(w + i);
                store(&sums[i], load(&sums[i]) + product * by);
              },
              [&](int64_t i) {
                rest += slope[i] * from[i] * w[i];
                sums[i] += slope[i] * from[i] * by;
              });
          const T along_x = (bmojo::sum(dots) + rest) * by * by * by / width;
          along<T>(
              width, [&](int64_t i) { store(to + i, load(slope + i) * load(w + i) * by - load(from + i) * along_x); },
              [&](int64_t i) { to[i] = slope[i] * w[i] * by - from[i] * along_x; });
          if ((row + 1 - first) % SUMMED && row + 1 < last) continue;
          for (int64_t i = 0; i < width; ++i) dweight[task * width + i] += std::exchange(sums[i], T(0));
        }
      }
    });
  });
  return {dx, dw.sum(0)};
}

// ---- SwiGLU: x [rows, 2 width] = [gate, up]

Tensor swiglu_forward(const Tensor& x) {
  const bmojo::Check check("swiglu", x);
  check.multiple(x.size(-1), 2, "channels");
  check(x, x.sizes());
  auto shape = x.sizes().vec();
  const int64_t width = shape.back() /= 2, rows = rows_of(x, 2 * width);
  Tensor y = at::empty(shape, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "swiglu", [&] {
    using T = scalar_t;
    const T* in = x.const_data_ptr<T>();
    T* out = y.mutable_data_ptr<T>();
    at::parallel_for(0, rows, rows_a_task(width), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T *gate = in + 2 * row * width, *up = gate + width;
        T* to = out + row * width;
        along<T>(
            width,
            [&](int64_t i) {
              const Vec<T> z = load(gate + i);
              store(to + i, z * sigmoid<T>(z) * load(up + i));
            },
            [&](int64_t i) { to[i] = gate[i] / (1 + std::exp(-gate[i])) * up[i]; });
      }
    });
  });
  return y;
}

Tensor swiglu_backward(const Tensor& dy, const Tensor& x) {
  const bmojo::Check check("swiglu", x);
  check.multiple(x.size(-1), 2, "channels");
  auto shape = x.sizes().vec();
  const int64_t width = shape.back() /= 2, rows = rows_of(x, 2 * width);
  check(x, x.sizes());
  check(dy, shape);
  Tensor dx = at::empty_like(x);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "swiglu", [&] {
    using T = scalar_t;
    const T *in = x.const_data_ptr<T>(), *g = dy.const_data_ptr<T>();
    T* out = dx.mutable_data_ptr<T>();
    at::parallel_for(0, rows, rows_a_task(width), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T *gate = in + 2 * row * width, *up = gate + width, *slope = g + row * width;
        T *dgate = out + 2 * row * width, *dup = dgate + width;
        along<T>(
            width,
            [&](int64_t i) {
              const Vec<T> z = load(gate + i), s = sigmoid<T>(z), d = load(slope + i);
              store(dup + i, d * z * s);
              store(dgate + i, d * load(up + i) * (s + z * s * (1 - s)));
            },
            [&](int64_t i) {
              const T s = 1 / (1 + std::exp(-gate[i]));
              dup[i] = slope[i] * gate[i] * s;
              dgate[i] = slope[i] * up[i] * (s + gate[i] * s * (1 - s));
            });
      }
    });
  });
  return dx;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(bmojo, library) {
  library.def("conv_forward(Tensor extended, Tensor weight, Tensor? bias, Tensor? position, bool silu) -> Tensor");
  library.def(
      "conv_backward(Tensor dy, Tensor extended, Tensor weight, Tensor? bias, Tensor? position, bool silu) -> (Tensor, "
      "Tensor, Tensor)");
  library.def("rotate(Tensor x, Tensor cos, Tensor sin, bool back) -> Tensor");
  library.def("norm_forward(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)");
  library.def("norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor inverse) -> (Tensor, Tensor)");
  library.def("swiglu_forward(Tensor x) -> Tensor");
  library.def("swiglu_backward(Tensor dy, Tensor x) -> Tensor");
}

TORCH_LIBRARY_IMPL(bmojo, CPU, library) {
  library.impl("conv_forward", conv_forward);
  library.impl("conv_backward", conv_backward);
  library.impl("rotate", rotate);
  library.impl("norm_forward", norm_forward);
  library.impl("norm_backward", norm_backward);
  library.impl("swiglu_forward", swiglu_forward);
  library.impl("swiglu_backward", swiglu_backward);
}
