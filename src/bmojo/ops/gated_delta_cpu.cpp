// The gated delta rule on CPUs; bmojo/ops/gated_delta.py has the mathematics and the shapes.
//
// One step at a time on the matrix [state_size, head_dim], which stays in the cache. Its columns don't depend on one
// another: a task is a row and a head, and goes through the columns tile by tile. Forward keeps the matrices at every
// SPAN-th step; backward goes through the spans from the last to the first, and recomputes each from its start.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>

#include "scan_cpu.h"

namespace {

using at::Tensor;
using bmojo::clear;
using bmojo::Scan;
using bmojo::SPAN;
using bmojo::Tile;

// work(b, head, first column, columns)
template <typename T, typename Work>
void parallel(const Scan& s, const Work& work) {
  constexpr int64_t tile = Tile<T>::WIDTH;
  at::parallel_for(0, s.batch * s.heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task)
      for (int64_t first = 0; first < s.width; first += tile)
        work(task / s.heads, task % s.heads, first, std::min(tile, s.width - first));
  });
}

// kept = decay * S; returns v - kept^T k
template <typename T>
Tile<T> shrink(Tile<T>* kept, const Tile<T>* S, const T* k, T decay, Tile<T> error, int64_t states) {
  for (int64_t n = 0; n < states; ++n)
    for (int64_t j = 0; j < Tile<T>::VECTORS; ++j) {
      const auto p = S[n].v[j] * decay;
      kept[n].v[j] = p;
      error.v[j] -= p * k[n];
    }
  return error;
}

template <typename T>
void forward_kernel(const Scan& s, const T* q, const T* k, const T* v, const T* beta, const T* g, const T* state, T* o,
                    T* last, T* starts, bool exclusive) {
  parallel<T>(s, [&](int64_t b, int64_t head, int64_t first, int64_t count) {
    std::vector<Tile<T>> S(s.states);
    load(S, state ? state + s.state(b, head) : nullptr, s, first, count);
    for (int64_t t = 0; t < s.time; ++t) {
      if (starts && t % SPAN == 0) store(S, starts + s.start(b, t / SPAN, head), s, first, count);
      if (s.reset(b, t)) clear(S);
      const int64_t at = s.step(b, t, head);
      const T *qt = q + at * s.states, *kt = k + at * s.states;
      Tile<T> u, out = {};
      if (exclusive)
        for (int64_t n = 0; n < s.states; ++n)
          for (int64_t j = 0; j < Tile<T>::VECTORS; ++j) out.v[j] += S[n].v[j] * qt[n];
      u.load(v + at * s.width + first, count);
      u = shrink(S.data(), S.data(), kt, std::exp(g[at]), u, s.states);
      for (auto& part : u.v) part *= beta[at];
      for (int64_t n = 0; n < s.states; ++n)
        for (int64_t j = 0; j < Tile<T>::VECTORS; ++j) {
          const auto now = S[n].v[j] + u.v[j] * kt[n];
          S[n].v[j] = now;
          if (!exclusive) out.v[j] += now * qt[n];
        }
      out.store(o + at * s.width + first, count);
    }
    store(S, last + s.state(b, head), s, first, count);
  });
}

// dq, dk, dbeta and dg are added to, tile by tile
template <typename T>
void backward_kernel(const Scan& s, const T* go, const T* dlast, const T* q, const T* k, const T* v, const T* beta,
                     const T* g, const T* starts, T* dq, T* dk, T* dv, T* dbeta, T* dg, T* dstate) {
  parallel<T>(s, [&](int64_t b, int64_t head, int64_t first, int64_t count) {
    std::vector<Tile<T>> S(s.states), dS(s.states), kept(SPAN * s.states);  // kept: exp(g) S_{t-1} of every step
    Tile<T> error[SPAN];                                                    // v - kept^T k
    load(dS, dlast + s.state(b, head), s, first, count);
    for (int64_t span = s.spans - 1; span >= 0; --span) {
      const int64_t begin = span * SPAN, steps = std::min(SPAN, s.time - begin);
      load(S, starts + s.start(b, span, head), s, first, count);
      for (int64_t i = 0; i < steps; ++i) {
        const int64_t t = begin + i, at = s.step(b, t, head);
        if (s.reset(b, t)) clear(S);
        const T* kt = k + at * s.states;
        Tile<T>* here = &kept[i * s.states];
        error[i].load(v + at * s.width + first, count);
        error[i] = shrink(here, S.data(), kt, std::exp(g[at]), error[i], s.states);
        for (int64_t n = 0; n < s.states; ++n)
          for (int64_t j = 0; j < Tile<T>::VECTORS; ++j) S[n].v[j] = here[n].v[j] + error[i].v[j] * (beta[at] * kt[n]);
      }
      for (int64_t i = steps - 1; i >= 0; --i) {
        const int64_t t = begin + i, at = s.step(b, t, head);
        const T *qt = q + at * s.states, *kt = k + at * s.states, decay = std::exp(g[at]);
        T *dqt = dq + at * s.states, *dkt = dk + at * s.states;
        const Tile<T>* here = &kept[i * s.states];
        Tile<T> dot, u, du = {}, along = {};
        dot.load(go + at * s.width + first, count);
        for (int64_t j = 0; j < Tile<T>::VECTORS; ++j) u.v[j] = error[i].v[j] * beta[at];
        for (int64_t n = 0; n < s.states; ++n) {
          bmojo::Vec<T> sum_q = {}, sum_k = {};
          for (int64_t j = 0; j < Tile<T>::VECTORS; ++j) {
            const auto d = dS[n].v[j] + dot.v[j] * qt[n];
            dS[n].v[j] = d;
            sum_q += dot.v[j] * (here[n].v[j] + u.v[j] * kt[n]);
            sum_k += d * u.v[j];
            du.v[j] += d * kt[n];
          }
          dqt[n] += bmojo::sum(sum_q);
          dkt[n] += bmojo::sum(sum_k);
        }
        Tile<T> product;
        for (int64_t j = 0; j < Tile<T>::VECTORS; ++j) {
          product.v[j] = du.v[j] * error[i].v[j];
          du.v[j] *= beta[at];  // now the gradient of v, and the negative of that of kept^T k
        }
        dbeta[at] += bmojo::sum(product);
        du.store(dv + at * s.width + first, count);
        for (int64_t n = 0; n < s.states; ++n) {
          bmojo::Vec<T> sum_k = {};
          for (int64_t j = 0; j < Tile<T>::VECTORS; ++j) {
            const auto p = here[n].v[j], d = dS[n].v[j] - du.v[j] * kt[n];
            sum_k += p * du.v[j];
            along.v[j] += p * d;
            dS[n].v[j] = d * decay;
          }
          dkt[n] -= bmojo::sum(sum_k);
        }
        dg[at] += bmojo::sum(along);
        if (s.reset(b, t)) clear(dS);
      }
    }
    store(dS, dstate + s.state(b, head), s, first, count);
  });
}

void check(const Scan& s, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& beta, const Tensor& g,
           const std::optional<Tensor>& resets) {
  const bmojo::Check check("gated_delta", v);
  check(v, {s.batch, s.time, s.heads, s.width});
  check(q, {s.batch, s.time, s.heads, s.states});
  check(k, q.sizes());
  check(beta, {s.batch, s.time, s.heads});
  check(g, beta.sizes());
  s.check(check, resets);
}

// o, the final state, and the states before every SPAN-th step if `keep`
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& beta,
                                           const Tensor& g, const std::optional<Tensor>& state,
                                           const std::optional<Tensor>& resets, int64_t chunk_size, bool exclusive,
                                           bool keep) {
  const Scan s(v, v.size(2), k.size(3), resets, chunk_size);
  check(s, q, k, v, beta, g, resets);
  bmojo::Check("gated_delta", v)(state, {s.batch, s.heads, s.states, s.width});
  Tensor o = at::empty_like(v), last = at::empty({s.batch, s.heads, s.states, s.width}, v.options());
  Tensor starts = at::empty({s.batch, keep ? s.spans : 0, s.heads, s.states, s.width}, v.options());
  AT_DISPATCH_FLOATING_TYPES(v.scalar_type(), "gated_delta", [&] {
    using T = scalar_t;
    forward_kernel<T>(s, q.const_data_ptr<T>(), k.const_data_ptr<T>(), v.const_data_ptr<T>(), beta.const_data_ptr<T>(),
                      g.const_data_ptr<T>(), bmojo::data<T>(state), o.mutable_data_ptr<T>(), last.mutable_data_ptr<T>(),
                      keep ? starts.mutable_data_ptr<T>() : nullptr, exclusive);
  });
  return {o, last, starts};
}

// gradients of q, k, v, beta, g and the state
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& go, const Tensor& dlast, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& beta,
    const Tensor& g, const Tensor& starts, const std::optional<Tensor>& resets, int64_t chunk_size) {
  const Scan s(v, v.size(2), k.size(3), resets, chunk_size);
  check(s, q, k, v, beta, g, resets);
  const bmojo::Check check("gated_delta", v);
  check(go, v.sizes());
  check(dlast, {s.batch, s.heads, s.states, s.width});
  check(starts, {s.batch, s.spans, s.heads, s.states, s.width});
  Tensor dq = at::zeros_like(q), dk = at::zeros_like(k), dv = at::empty_like(v);
  Tensor dbeta = at::zeros_like(beta), dg = at::zeros_like(g);
  Tensor dstate = at::empty({s.batch, s.heads, s.states, s.width}, v.options());
  AT_DISPATCH_FLOATING_TYPES(v.scalar_type(), "gated_delta", [&] {
    using T = scalar_t;
    backward_kernel<T>(s, go.const_data_ptr<T>(), dlast.const_data_ptr<T>(), q.const_data_ptr<T>(),
                       k.const_data_ptr<T>(), v.const_data_ptr<T>(), beta.const_data_ptr<T>(), g.const_data_ptr<T>(),
                       starts.const_data_ptr<T>(), dq.mutable_data_ptr<T>(), dk.mutable_data_ptr<T>(),
                       dv.mutable_data_ptr<T>(), dbeta.mutable_data_ptr<T>(), dg.mutable_data_ptr<T>(),
                       dstate.mutable_data_ptr<T>());
  });
  return {dq, dk, dv, dbeta, dg, dstate};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(bmojo, library) {
  library.def(
      "gated_delta_forward(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor g, Tensor? state, Tensor? resets, int "
      "chunk_size, "
      "bool exclusive, bool keep) -> (Tensor, Tensor, Tensor)");
  library.def(
      "gated_delta_backward(Tensor dout, Tensor dlast, Tensor q, Tensor k, Tensor v, Tensor beta, Tensor g, "
      "Tensor starts, Tensor? resets, int chunk_size) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(bmojo, CPU, library) {
  library.impl("gated_delta_forward", forward);
  library.impl("gated_delta_backward", backward);
}
