// The innovation score of recursive least squares on CPUs; bmojo/ops/innovation.py has the mathematics and the shapes.
//
// Chunks are independent but for the matrices that they start with: what each adds to A is summed chunk by chunk, one
// pass along the row makes the precision M that each starts with, and then each is scored. Scoring factors M = L D L^T
// once; a token k goes through the columns of L, one by one, which gives L^-1 k, thus its leverage sum_j (L^-1 k)_j^2 /
// D_j, and in the same pass the factors of M + k k^T (method C1 of Gill, Golub, Murray and Saunders, 1974). Tokens go
// through a column BLOCK at a time, so that it is read and written once for all of them.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "check_cpu.h"
#include "vectors_cpu.h"

namespace {

using at::Tensor;
constexpr int64_t BLOCK = 4;

using bmojo::Lanes;
using bmojo::load;
using bmojo::store;
using bmojo::Vec;

struct Sizes {
  int64_t batch, chunks, chunk, dim;
  double forgetting, ridge, condition;
  const bool *valid, *resets;  // [batch, chunks, chunk], [batch, chunks] or none

  const bool* alive(int64_t at) const { return valid + at * chunk; }  // of chunk at = b * chunks + c
};

// to = g to + k k^T
template <typename T>
void add_outer(int64_t dim, T* to, T g, const T* k) {
  for (int64_t i = 0; i < dim; ++i) {
    const T ki = k[i];
    for (int64_t j = 0; j < dim; ++j) to[i * dim + j] = g * to[i * dim + j] + ki * k[j];
  }
}

// M = g A + rho I
template <typename T>
void prior(const Sizes& s, const T* A, T* M) {
  const T g = static_cast<T>(s.forgetting);
  T trace = 0;
  for (int64_t i = 0; i < s.dim; ++i) trace += A[i * s.dim + i];
  for (int64_t i = 0; i < s.dim * s.dim; ++i) M[i] = g * A[i];
  const T rho = static_cast<T>(s.ridge) + trace / static_cast<T>(s.condition);
  for (int64_t i = 0; i < s.dim; ++i) M[i * s.dim + i] += rho;
}

// From a row's A and M, which become those after it, and what each chunk adds to A: the M that each starts with
template <typename T>
void run_along(const Sizes& s, int64_t b, const T* k, T* added, T* A, T* M) {
  const int64_t size = s.dim * s.dim;
  for (int64_t at = b * s.chunks; at < (b + 1) * s.chunks; ++at) {
    T* here = added + at * size;
    const bool* alive = s.alive(at);
    if (s.resets && s.resets[at]) {
      std::fill_n(A, size, T(0));
      prior(s, A, M);
    }
    const T shrink = static_cast<T>(std::pow(s.forgetting, std::count(alive, alive + s.chunk, true)));
    for (int64_t i = 0; i < size; ++i) {
      A[i] = shrink * A[i] + here[i];
      here[i] = M[i];
    }
    if (alive[s.chunk - 1])
      prior(s, A, M);
    else
      for (int64_t t = 0; t < s.chunk; ++t)
        if (alive[t]) add_outer(s.dim, M, T(1), k + (at * s.chunk + t) * s.dim);
  }
}

// M = L D L^T: row j of `rows` [dim, width] becomes column j of L (ones at j, zeros before), inverse[j] = 1 / D_j; not
// a number where M is not positive definite. Columns beyond dim are zero.
template <typename T>
void factor(int64_t dim, int64_t width, T* rows, T* inverse) {
  constexpr int64_t L = Lanes<T>::COUNT;
  for (int64_t j = 0; j < dim; ++j) {
    T* row = rows + j * width;
    inverse[j] = row[j] > 0 ? 1 / row[j] : std::numeric_limits<T>::quiet_NaN();
    for (int64_t i = j + 1; i < dim; ++i) {
      const T share = row[i] * inverse[j];
      for (int64_t r = i / L * L; r < width; r += L)
        store(rows + i * width + r, load(rows + i * width + r) - share * load(row + r));
    }
    std::fill_n(row, j, T(0));
    row[j] = 1;
    for (int64_t r = j + 1; r < dim; ++r) row[r] *= inverse[j];
  }
}

// leverage[t] of token t [width], given those before it; L and D become those of M + sum_t k_t k_t^T. What is left of
// a token after column j is zero up to j, because L has ones there.
template <typename T, int N>
void absorb(int64_t dim, int64_t width, T* columns, T* inverse, T* tokens, T* leverage) {
  constexpr int64_t L = Lanes<T>::COUNT;
  T sum[N] = {};
  for (int64_t j = 0; j < dim; ++j) {
    T *column = columns + j * width, along[N], back[N];
    for (int t = 0; t < N; ++t) {
      along[t] = tokens[t * width + j];
      const T scaled = along[t] * inverse[j], before = 1 + sum[t];
      sum[t] += along[t] * scaled;
      const T after = 1 / (1 + sum[t]);
      back[t] = scaled * after;
      inverse[j] *= before * after;
    }
    for (int64_t r = j / L * L; r < width; r += L) {
      Vec<T> l = load(column + r);
      for (int t = 0; t < N; ++t) {
        T* token = tokens + t * width + r;
        const Vec<T> rest = load(token) - along[t] * l;
        store(token, rest);
        l += back[t] * rest;
      }
      store(column + r, l);
    }
  }
  std::copy_n(sum, N, leverage);
}

// Scores [chunk] of chunk `at`, zero at padding, from the M it starts with
template <typename T>
void score_chunk(const Sizes& s, int64_t at, const T* k, const T* M, T* scores) {
  constexpr int64_t L = Lanes<T>::COUNT;
  const int64_t dim = s.dim, width = (dim + L - 1) / L * L;
  std::vector<T> columns(dim * width), inverse(dim), tokens(BLOCK * width);
  for (int64_t j = 0; j < dim; ++j) std::copy_n(M + j * dim, dim, &columns[j * width]);
  factor(dim, width, columns.data(), inverse.data());
  std::vector<int64_t> alive;
  for (int64_t t = 0; t < s.chunk; ++t)
    if (s.alive(at)[t]) alive.push_back(t);
  const int64_t count = alive.size();
  for (int64_t first = 0, taken; first < count; first += taken) {
    taken = first + BLOCK <= count ? BLOCK : 1;
    for (int64_t t = 0; t < taken; ++t)
      std::copy_n(k + (at * s.chunk + alive[first + t]) * dim, dim, &tokens[t * width]);
    T leverage[BLOCK];
    const auto through = taken == BLOCK ? absorb<T, BLOCK> : absorb<T, 1>;
    through(dim, width, columns.data(), inverse.data(), tokens.data(), leverage);
    for (int64_t t = 0; t < taken; ++t) scores[at * s.chunk + alive[first + t]] = leverage[t] / (1 + leverage[t]);
  }
}

template <typename T>
void kernel(const Sizes& s, const T* k, T* M, T* A, T* priors, T* scores) {
  const int64_t size = s.dim * s.dim;
  const auto each_chunk = [&](const auto& work) {
    at::parallel_for(0, s.batch * s.chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; ++at) work(at);
    });
  };
  each_chunk([&](int64_t at) {
    for (int64_t t = 0; t < s.chunk; ++t)
      if (s.alive(at)[t])
        add_outer(s.dim, priors + at * size, static_cast<T>(s.forgetting), k + (at * s.chunk + t) * s.dim);
  });
  at::parallel_for(0, s.batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) run_along(s, b, k, priors, A + b * size, M + b * size);
  });
  each_chunk([&](int64_t at) { score_chunk(s, at, k, priors + at * size, scores); });
}

std::tuple<Tensor, Tensor, Tensor> rls(const Tensor& k, const Tensor& valid, const Tensor& A_before,
                                       const Tensor& M_before, const std::optional<Tensor>& resets, int64_t chunk_size,
                                       double forgetting, double ridge, double condition) {
  const int64_t batch = k.size(0), time = k.size(1), dim = k.size(2);
  const bmojo::Check check("rls", k);
  check.multiple(time, chunk_size, "tokens");
  check(k, {batch, time, dim});
  check(valid, {batch, time}, at::kBool);
  check(A_before, {batch, dim, dim});
  check(M_before, {batch, dim, dim});
  check(resets, {batch, time / chunk_size}, at::kBool);
  const Sizes s{batch,
                time / chunk_size,
                chunk_size,
                dim,
                forgetting,
                ridge,
                condition,
                valid.const_data_ptr<bool>(),
                resets ? resets->const_data_ptr<bool>() : nullptr};
  Tensor A = A_before.clone(), M = M_before.clone(), scores = at::zeros({batch, time}, k.options());
  Tensor priors = at::zeros({batch, s.chunks, dim, dim}, k.options());
  AT_DISPATCH_FLOATING_TYPES(k.scalar_type(), "rls", [&] {
    using T = scalar_t;
    kernel<T>(s, k.const_data_ptr<T>(), M.mutable_data_ptr<T>(), A.mutable_data_ptr<T>(), priors.mutable_data_ptr<T>(),
              scores.mutable_data_ptr<T>());
  });
  return {scores, A, M};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(bmojo, library) {
  library.def(
      "rls(Tensor k, Tensor valid, Tensor A, Tensor M, Tensor? resets, int chunk_size, float forgetting, float ridge, "
      "float condition) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(bmojo, CPU, library) { library.impl("rls", rls); }
