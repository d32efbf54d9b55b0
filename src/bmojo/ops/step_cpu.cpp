// One token on CPUs: what a layer does between its matrix products, without gradients. States are written in place.
// The definitions are the one-token forms in PyTorch of ssd.py, gated_delta.py, innovation.py, attention.py, layers.py.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "check_cpu.h"
#include "vectors_cpu.h"

namespace {

using at::Tensor;
using at::TensorList;
using bmojo::load;
using bmojo::store;
using bmojo::Vec;
constexpr int64_t GRAIN = 1 << 19;  // multiplications, the least that a thread is woken for: some 50 us

int64_t grain(int64_t each) { return std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, each)); }

template <typename T>
inline T dot(const T* a, const T* b, int64_t count) {
  constexpr int64_t L = bmojo::Lanes<T>::COUNT;
  Vec<T> sums = {};
  T rest = 0;
  int64_t i = 0;
  for (; i + L <= count; i += L) sums += load(a + i) * load(b + i);
  for (; i < count; ++i) rest += a[i] * b[i];
  return bmojo::sum(sums) + rest;
}

// y += a x
template <typename T>
inline void add(T* y, T a, const T* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) y[i] += a * x[i];
}

// state [batch, heads, states, width], x [batch, heads, width], dt [batch, heads], B and C [batch, groups, states]
Tensor ssd_step(Tensor& state, const Tensor& x, const Tensor& dt, const Tensor& rate, const Tensor& B,
                const Tensor& C) {
  const int64_t batch = x.size(0), heads = x.size(1), width = x.size(2), groups = B.size(1), states = B.size(2);
  const bmojo::Check check("ssd_step", x);
  check.multiple(heads, groups, "heads");
  check(state, {batch, heads, states, width});
  check(x, {batch, heads, width});
  check(dt, {batch, heads});
  check(rate, {heads});
  check(B, {batch, groups, states});
  check(C, B.sizes());
  Tensor y = at::empty_like(x);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "ssd_step", [&] {
    using T = scalar_t;
    T *h = state.mutable_data_ptr<T>(), *out = y.mutable_data_ptr<T>();
    const T *xs = x.const_data_ptr<T>(), *steps = dt.const_data_ptr<T>(), *rates = rate.const_data_ptr<T>();
    const T *Bs = B.const_data_ptr<T>(), *Cs = C.const_data_ptr<T>();
    at::parallel_for(0, batch * heads, grain(states * width), [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; ++at) {
        const int64_t head = at % heads, shared = (at / heads * groups + head / (heads / groups)) * states;
        const T decay = std::exp(-steps[at] * rates[head]);
        const T* in = xs + at * width;
        T* read = out + at * width;
        std::fill_n(read, width, T(0));
        for (int64_t n = 0; n < states; ++n) {
          T* row = h + (at * states + n) * width;
          const T write = Bs[shared + n] * steps[at], c = Cs[shared + n];
          for (int64_t p = 0; p < width; ++p) {
            row[p] = row[p] * decay + write * in[p];
            read[p] += c * row[p];
          }
        }
      }
    });
  });
  return y;
}

// state [batch, heads, states, width], q and k [batch, heads, states], v [batch, heads, width], beta, g [batch, heads]
Tensor gated_delta_step(Tensor& state, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& beta,
                        const Tensor& g) {
  const int64_t batch = v.size(0), heads = v.size(1), width = v.size(2), states = k.size(2);
  const bmojo::Check check("gated_delta_step", v);
  check(state, {batch, heads, states, width});
  check(q, {batch, heads, states});
  check(k, q.sizes());
  check(v, {batch, heads, width});
  check(beta, {batch, heads});
  check(g, beta.sizes());
  Tensor o = at::empty_like(v);
  AT_DISPATCH_FLOATING_TYPES(v.scalar_type(), "gated_delta_step", [&] {
    using T = scalar_t;
    T *S = state.mutable_data_ptr<T>(), *out = o.mutable_data_ptr<T>();
    const T *qs = q.const_data_ptr<T>(), *ks = k.const_data_ptr<T>(), *vs = v.const_data_ptr<T>();
    const T *rates = beta.const_data_ptr<T>(), *logs = g.const_data_ptr<T>();
    at::parallel_for(0, batch * heads, grain(2 * states * width), [&](int64_t begin, int64_t end) {
      std::vector<T> error(width);
      for (int64_t at = begin; at < end; ++at) {
        const T decay = std::exp(logs[at]), *key = ks + at * states, *query = qs + at * states;
        T *matrix = S + at * states * width, *read = out + at * width;
        std::copy_n(vs + at * width, width, error.data());
        for (int64_t n = 0; n < states; ++n)
          for (int64_t p = 0; p < width; ++p) {
            matrix[n * width + p] *= decay;
            error[p] -= key[n] * matrix[n * width + p];
          }
        std::fill_n(read, width, T(0));
        for (int64_t n = 0; n < states; ++n)
          for (int64_t p = 0; p < width; ++p) {
            matrix[n * width + p] += key[n] * rates[at] * error[p];
            read[p] += query[n] * matrix[n * width + p];
          }
      }
    });
  });
  return o;
}

// tail [batch, lags, channels], the inputs before x [batch, channels], moves on by one
Tensor conv_step(Tensor& tail, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool silu) {
  const int64_t batch = x.size(0), channels = x.size(1), lags = weight.size(1) - 1;
  const bmojo::Check check("conv_step", x);
  TORCH_CHECK(lags >= 0, "conv_step: expected at least one tap, got none");
  check(tail, {batch, lags, channels});
  check(x, {batch, channels});
  check(weight, {channels, lags + 1});
  check(bias, {channels});
  Tensor y = at::empty_like(x);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "conv_step", [&] {
    using T = scalar_t;
    const T *w = weight.const_data_ptr<T>(), *b = bias ? bias->const_data_ptr<T>() : nullptr;
    for (int64_t row = 0; row < batch; ++row) {
      const T* in = x.const_data_ptr<T>() + row * channels;
      T *past = tail.mutable_data_ptr<T>() + row * lags * channels, *out = y.mutable_data_ptr<T>() + row * channels;
      for (int64_t i = 0; i < channels; ++i) {
        const T* taps = w + i * (lags + 1);
        T sum = in[i] * taps[lags] + (b ? b[i] : 0);
        for (int64_t lag = 0; lag < lags; ++lag) sum += past[lag * channels + i] * taps[lag];
        out[i] = silu ? sum / (1 + std::exp(-sum)) : sum;
      }
      if (!lags) continue;
      std::memmove(past, past + channels, sizeof(T) * (lags - 1) * channels);
      std::copy_n(in, channels, past + (lags - 1) * channels);
    }
  });
  return y;
}

// rows [batch, entries, ...]: value [batch, ...] is written to entry index [batch]
void put(Tensor& rows, const Tensor& index, const Tensor& value) {
  const int64_t batch = rows.size(0), entries = rows.size(1);
  const bmojo::Check check("put", rows);
  auto one = rows.sizes().vec();
  one.erase(one.begin() + 1);
  check(rows, rows.sizes());
  check(index, {batch}, at::kLong);
  check(value, one);
  if (!value.numel()) return;
  const int64_t size = value.numel() / batch * value.element_size(), *at = index.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < batch; ++b)
    TORCH_CHECK_INDEX(0 <= at[b] && at[b] < entries, "put: expected an index in [0, ", entries, "), got ", at[b]);
  char* to = static_cast<char*>(rows.mutable_data_ptr());
  const char* from = static_cast<const char*>(value.const_data_ptr());
  for (int64_t b = 0; b < batch; ++b) std::memcpy(to + (b * entries + at[b]) * size, from + b * size, size);
}

// One query a head, q [batch, heads, width], against the visible rows of several sets of keys and values
// [batch, entries, kv_heads, .]; visible [batch, entries] bool. Zero if none is.
Tensor attend_step(const Tensor& q, TensorList k, TensorList v, TensorList visible) {
  TORCH_CHECK(k.size() && k.size() == v.size() && k.size() == visible.size(),
              "attend_step: expected as many keys as values and masks, one at least, got ", k.size(), ", ", v.size(),
              " and ", visible.size());
  const int64_t batch = q.size(0), heads = q.size(1), width = q.size(2);
  const int64_t kv_heads = k[0].size(2), value_width = v[0].size(3);
  const bmojo::Check check("attend_step", q);
  check.multiple(heads, kv_heads, "heads");
  check(q, {batch, heads, width});
  for (size_t part = 0; part < k.size(); ++part) {
    check(k[part], {batch, k[part].size(1), kv_heads, width});
    check(v[part], {batch, k[part].size(1), kv_heads, value_width});
    check(visible[part], {batch, k[part].size(1)}, at::kBool);
  }
  Tensor o = at::empty({batch, heads, value_width}, q.options());
  int64_t entries = 0;
  for (const Tensor& z : k) entries += z.size(1);
  AT_DISPATCH_FLOATING_TYPES(q.scalar_type(), "attend_step", [&] {
    using T = scalar_t;
    const T scale = 1 / std::sqrt(static_cast<T>(width)), none = -std::numeric_limits<T>::infinity();
    at::parallel_for(0, batch * heads, grain(2 * entries * width), [&](int64_t begin, int64_t end) {
      std::vector<T> scores(entries);
      for (int64_t at = begin; at < end; ++at) {
        const int64_t b = at / heads, group = at % heads / (heads / kv_heads);
        const T* query = q.const_data_ptr<T>() + at * width;
        T* out = o.mutable_data_ptr<T>() + at * value_width;
        T top = none, total = 0;
        int64_t i = 0;
        for (size_t part = 0; part < k.size(); ++part) {
          const int64_t rows = k[part].size(1);
          const bool* seen = visible[part].const_data_ptr<bool>() + b * rows;
          const T* keys = k[part].const_data_ptr<T>() + (b * rows * kv_heads + group) * width;
          for (int64_t j = 0; j < rows; ++j, ++i) {
            scores[i] = seen[j] ? dot(query, keys + j * kv_heads * width, width) * scale : none;
            top = std::max(top, scores[i]);
          }
        }
        std::fill_n(out, value_width, T(0));
        i = 0;
        for (size_t part = 0; part < k.size(); ++part) {
          const int64_t rows = k[part].size(1);
          const T* values = v[part].const_data_ptr<T>() + (b * rows * kv_heads + group) * value_width;
          for (int64_t j = 0; j < rows; ++j, ++i) {
            if (scores[i] == none) continue;
            const T weight = std::exp(scores[i] - top);
            total += weight;
            add(out, weight, values + j * kv_heads * value_width, value_width);
          }
        }
        if (total > 0)
          for (int64_t p = 0; p < value_width; ++p) out[p] /= total;
      }
    });
  });
  return o;
}

// The score of k [batch, dim], and A and M [batch, dim, dim] after it
Tensor rls_step(Tensor& A, Tensor& M, const Tensor& k, const Tensor& ends, double forgetting, double ridge,
                double condition) {
  const int64_t batch = k.size(0), dim = k.size(1);
  const bmojo::Check check("rls_step", k);
  check(A, {batch, dim, dim});
  check(M, A.sizes());
  check(k, {batch, dim});
  check(ends, {batch}, at::kBool);
  Tensor score = at::empty({batch}, k.options());
  AT_DISPATCH_FLOATING_TYPES(k.scalar_type(), "rls_step", [&] {
    using T = scalar_t;
    const T g = static_cast<T>(forgetting);
    at::parallel_for(0, batch, grain(dim * dim * dim), [&](int64_t begin, int64_t end) {
      std::vector<T> factor(dim * dim), solved(dim);
      for (int64_t b = begin; b < end; ++b) {
        const T* key = k.const_data_ptr<T>() + b * dim;
        T *sum = A.mutable_data_ptr<T>() + b * dim * dim, *precision = M.mutable_data_ptr<T>() + b * dim * dim;
        // M = L L^T and L z = k row by row: the leverage is |z|^2
        T leverage = 0;
        for (int64_t i = 0; i < dim; ++i) {
          T* row = &factor[i * dim];
          for (int64_t j = 0; j < i; ++j)
            row[j] = (precision[i * dim + j] - dot(row, &factor[j * dim], j)) * factor[j * dim + j];
          row[i] = 1 / std::sqrt(precision[i * dim + i] - dot(row, row, i));  // the inverse of L's diagonal
          solved[i] = (key[i] - dot(row, solved.data(), i)) * row[i];
          leverage += solved[i] * solved[i];
        }
        score.mutable_data_ptr<T>()[b] = leverage / (1 + leverage);
        T trace = 0;
        for (int64_t i = 0; i < dim; ++i) {
          for (int64_t j = 0; j < dim; ++j) {
            sum[i * dim + j] = sum[i * dim + j] * g + key[i] * key[j];
            precision[i * dim + j] += key[i] * key[j];
          }
          trace += sum[i * dim + i];
        }
        if (!ends.const_data_ptr<bool>()[b]) continue;
        for (int64_t i = 0; i < dim * dim; ++i) precision[i] = sum[i] * g;
        for (int64_t i = 0; i < dim; ++i) precision[i * dim + i] += static_cast<T>(ridge + trace / condition);
      }
    });
  });
  return score;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(bmojo, library) {
  library.def("ssd_step(Tensor(a!) state, Tensor x, Tensor dt, Tensor rate, Tensor B, Tensor C) -> Tensor");
  library.def("gated_delta_step(Tensor(a!) state, Tensor q, Tensor k, Tensor v, Tensor beta, Tensor g) -> Tensor");
  library.def("conv_step(Tensor(a!) tail, Tensor x, Tensor weight, Tensor? bias, bool silu) -> Tensor");
  library.def("put(Tensor(a!) rows, Tensor index, Tensor value) -> ()");
  library.def("attend_step(Tensor q, Tensor[] k, Tensor[] v, Tensor[] visible) -> Tensor");
  library.def(
      "rls_step(Tensor(a!) A, Tensor(b!) M, Tensor k, Tensor ends, float forgetting, float ridge, float condition) -> "
      "Tensor");
}

TORCH_LIBRARY_IMPL(bmojo, CPU, library) {
  library.impl("ssd_step", ssd_step);
  library.impl("gated_delta_step", gated_delta_step);
  library.impl("conv_step", conv_step);
  library.impl("put", put);
  library.impl("attend_step", attend_step);
  library.impl("rls_step", rls_step);
}
