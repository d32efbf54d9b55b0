// Mamba-2's selective scan on CPUs; bmojo/ops/ssd.py has the mathematics and the shapes.
//
// One step at a time on the state [state_size, head_dim], which stays in the cache: for the sizes that CPUs train,
// fewer operations than the matmuls of the chunked form take, and one pass over the data. A task is a row, a group of
// heads and a share of these heads; it goes through the head's channels tile by tile. Forward keeps the states at every
// SPAN-th step; backward goes through the spans from the last to the first, and recomputes each from the state at its
// start.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>

#include "scan_cpu.h"

namespace {

using at::Tensor;
using bmojo::clear;
using bmojo::SPAN;
using bmojo::Tile;

struct Sizes : bmojo::Scan {
  int64_t groups, shares;

  Sizes(const Tensor& x, const Tensor& B, const std::optional<Tensor>& resets, int64_t chunk_size)
      : Scan(x, x.size(2), B.size(3), resets, chunk_size), groups(B.size(2)) {
    const int64_t rows = std::max<int64_t>(1, batch * groups);
    bmojo::Check("ssd", x).multiple(heads, groups, "heads");
    shares = std::min(heads / groups, (at::get_num_threads() + rows - 1) / rows);
  }
  int64_t shared(int64_t b, int64_t t, int64_t group) const { return ((b * time + t) * groups + group) * states; }

  // work(b, group, share, head) for all heads, those of one share one after the other
  template <typename Work>
  void parallel(const Work& work) const {
    const int64_t each = heads / groups;
    at::parallel_for(0, batch * groups * shares, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t share = task % shares, group = task / shares % groups, b = task / shares / groups;
        for (int64_t i = each * share / shares; i < each * (share + 1) / shares; ++i)
          work(b, group, share, group * each + i);
      }
    });
  }
};

template <typename T>
void forward_kernel(const Sizes& s, const T* x, const T* dt, const T* rate, const T* B, const T* C, const T* state,
                    T* y, T* last, T* starts, bool exclusive) {
  s.parallel([&](int64_t b, int64_t group, int64_t, int64_t head) {
    std::vector<Tile<T>> h(s.states);
    for (int64_t first = 0; first < s.width; first += Tile<T>::WIDTH) {
      const int64_t count = std::min(Tile<T>::WIDTH, s.width - first);
      load(h, state ? state + s.state(b, head) : nullptr, s, first, count);
      for (int64_t t = 0; t < s.time; ++t) {
        if (starts && t % SPAN == 0) store(h, starts + s.start(b, t / SPAN, head), s, first, count);
        if (s.reset(b, t)) clear(h);
        const int64_t at = s.step(b, t, head);
        const T step = dt[at], decay = std::exp(-step * rate[head]);
        const T *Bt = B + s.shared(b, t, group), *Ct = C + s.shared(b, t, group);
        Tile<T> xs, out = {};
        xs.load(x + at * s.width + first, count);
        for (auto& v : xs.v) v *= step;
        for (int64_t n = 0; n < s.states; ++n)
          for (int64_t j = 0; j < Tile<T>::VECTORS; ++j) {
            const auto before = h[n].v[j];
            const auto now = before * decay + xs.v[j] * Bt[n];
            h[n].v[j] = now;
            out.v[j] += (exclusive ? before : now) * Ct[n];
          }
        out.store(y + at * s.width + first, count);
      }
      store(h, last + s.state(b, head), s, first, count);
    }
  });
}

template <typename T>
void backward_kernel(const Sizes& s, const T* dy, const T* dlast, const T* x, const T* dt, const T* rate, const T* B,
                     const T* C, const T* starts, T* dx, T* ddt, T* drate, T* dB, T* dC, T* dstate) {
  const int64_t shared = s.batch * s.time * s.groups * s.states;
  s.parallel([&](int64_t b, int64_t group, int64_t share, int64_t head) {
    std::vector<Tile<T>> h(s.states), g(s.states), kept(SPAN * s.states);  // kept: exp(-dt rate) h_{t-1}, every step
    Tile<T> xs[SPAN], written[SPAN];                                       // written: dt x
    T decay[SPAN];
    T total = 0;
    for (int64_t first = 0; first < s.width; first += Tile<T>::WIDTH) {
      const int64_t count = std::min(Tile<T>::WIDTH, s.width - first);
      load(g, dlast + s.state(b, head), s, first, count);
      for (int64_t span = s.spans - 1; span >= 0; --span) {
        const int64_t begin = span * SPAN, steps = std::min(SPAN, s.time - begin);
        T recent = 0;  // of the span: one long sum loses digits
        load(h, starts + s.start(b, span, head), s, first, count);
        for (int64_t i = 0; i < steps; ++i) {
          const int64_t t = begin + i, at = s.step(b, t, head);
          if (s.reset(b, t)) clear(h);
          decay[i] = std::exp(-dt[at] * rate[head]);
          xs[i].load(x + at * s.width + first, count);
          for (int64_t j = 0; j < Tile<T>::VECTORS; ++j) written[i].v[j] = xs[i].v[j] * dt[at];
          const T* Bt = B + s.shared(b, t, group);
          for (int64_t n = 0; n < s.states; ++n)
            for (int64_t j = 0; j < Tile<T>::VECTORS; ++j) {
              const auto p = h[n].v[j] * decay[i];
              kept[i * s.states + n].v[j] = p;
              h[n].v[j] = p + written[i].v[j] * Bt[n];
            }
        }
        for (int64_t i = steps - 1; i >= 0; --i) {
          const int64_t t = begin + i, at = s.step(b, t, head), bc = s.shared(b, t, group);
          const T *Bt = B + bc, *Ct = C + bc;
          T *dBt = dB + share * shared + bc, *dCt = dC + share * shared + bc;
          Tile<T> dys, dwritten = {}, along = {};  // along: what changes with the log of the decay
          dys.load(dy + at * s.width + first, count);
          for (int64_t n = 0; n < s.states; ++n) {
            bmojo::Vec<T> sum_B = {}, sum_C = {};
            for (int64_t j = 0; j < Tile<T>::VECTORS; ++j) {
              const auto p = kept[i * s.states + n].v[j], dh = g[n].v[j] + dys.v[j] * Ct[n];
              sum_C += dys.v[j] * (p + written[i].v[j] * Bt[n]);
              sum_B += dh * written[i].v[j];
              dwritten.v[j] += dh * Bt[n];
              along.v[j] += dh * p;
              g[n].v[j] = dh * decay[i];
            }
            dBt[n] += bmojo::sum(sum_B);
            dCt[n] += bmojo::sum(sum_C);
          }
          const T slope = bmojo::sum(along);
          Tile<T> product;
          for (int64_t j = 0; j < Tile<T>::VECTORS; ++j) {
            product.v[j] = dwritten.v[j] * xs[i].v[j];
            dwritten.v[j] *= dt[at];
          }
          dwritten.store(dx + at * s.width + first, count);
          ddt[at] += bmojo::sum(product) - slope * rate[head];
          recent -= slope * dt[at];
          if (s.reset(b, t)) clear(g);
        }
        total += recent;
      }
      store(g, dstate + s.state(b, head), s, first, count);
    }
    drate[b * s.heads + head] = total;
  });
}

void check(const Sizes& s, const Tensor& x, const Tensor& dt, const Tensor& rate, const Tensor& B, const Tensor& C,
           const std::optional<Tensor>& resets) {
  const bmojo::Check check("ssd", x);
  check(x, {s.batch, s.time, s.heads, s.width});
  check(dt, {s.batch, s.time, s.heads});
  check(rate, {s.heads});
  check(B, {s.batch, s.time, s.groups, s.states});
  check(C, B.sizes());
  s.check(check, resets);
}

// y, the final state, and the states before every SPAN-th step if `keep`; rate [heads] = exp(A_log)
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& dt, const Tensor& rate, const Tensor& B,
                                           const Tensor& C, const std::optional<Tensor>& state,
                                           const std::optional<Tensor>& resets, int64_t chunk_size, bool exclusive,
                                           bool keep) {
  const Sizes s(x, B, resets, chunk_size);
  check(s, x, dt, rate, B, C, resets);
  bmojo::Check("ssd", x)(state, {s.batch, s.heads, s.states, s.width});
  Tensor y = at::empty_like(x), last = at::empty({s.batch, s.heads, s.states, s.width}, x.options());
  Tensor starts = at::empty({s.batch, keep ? s.spans : 0, s.heads, s.states, s.width}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "ssd", [&] {
    using T = scalar_t;
    forward_kernel<T>(s, x.const_data_ptr<T>(), dt.const_data_ptr<T>(), rate.const_data_ptr<T>(), B.const_data_ptr<T>(),
                      C.const_data_ptr<T>(), bmojo::data<T>(state), y.mutable_data_ptr<T>(), last.mutable_data_ptr<T>(),
                      keep ? starts.mutable_data_ptr<T>() : nullptr, exclusive);
  });
  return {y, last, starts};
}

// gradients of x, dt, rate, B, C and the state
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& dy, const Tensor& dlast, const Tensor& x, const Tensor& dt, const Tensor& rate, const Tensor& B,
    const Tensor& C, const Tensor& starts, const std::optional<Tensor>& resets, int64_t chunk_size) {
  const Sizes s(x, B, resets, chunk_size);
  check(s, x, dt, rate, B, C, resets);
  const bmojo::Check check("ssd", x);
  check(dy, x.sizes());
  check(dlast, {s.batch, s.heads, s.states, s.width});
  check(starts, {s.batch, s.spans, s.heads, s.states, s.width});
  Tensor dx = at::empty_like(x), ddt = at::zeros_like(dt), drate = at::empty({s.batch, s.heads}, x.options());
  Tensor dB = at::zeros({s.shares, s.batch, s.time, s.groups, s.states}, x.options()), dC = at::zeros_like(dB);
  Tensor dstate = at::empty({s.batch, s.heads, s.states, s.width}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "ssd", [&] {
    using T = scalar_t;
    backward_kernel<T>(s, dy.const_data_ptr<T>(), dlast.const_data_ptr<T>(), x.const_data_ptr<T>(),
                       dt.const_data_ptr<T>(), rate.const_data_ptr<T>(), B.const_data_ptr<T>(), C.const_data_ptr<T>(),
                       starts.const_data_ptr<T>(), dx.mutable_data_ptr<T>(), ddt.mutable_data_ptr<T>(),
                       drate.mutable_data_ptr<T>(), dB.mutable_data_ptr<T>(), dC.mutable_data_ptr<T>(),
                       dstate.mutable_data_ptr<T>());
  });
  return {dx, ddt, drate.sum(0), dB.sum(0), dC.sum(0), dstate};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(bmojo, library) {
  library.def(
      "ssd_forward(Tensor x, Tensor dt, Tensor rate, Tensor B, Tensor C, Tensor? state, Tensor? resets, int "
      "chunk_size, "
      "bool exclusive, bool keep) -> (Tensor, Tensor, Tensor)");
  library.def(
      "ssd_backward(Tensor dy, Tensor dlast, Tensor x, Tensor dt, Tensor rate, Tensor B, Tensor C, Tensor starts, "
      "Tensor? resets, int chunk_size) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(bmojo, CPU, library) {
  library.impl("ssd_forward", forward);
  library.impl("ssd_backward", backward);
}
