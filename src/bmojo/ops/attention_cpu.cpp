// Reading window, fading tokens and eidetic slots in one softmax on CPUs; bmojo/memory/read.py says who sees what.
//
// A task is a row and a head of keys. It takes BLOCK queries of one chunk at a time, against the keys that some of them
// see and no others: nothing is copied together, and no mask is made. Scores lie transposed, [keys, BLOCK], so that
// maxima, sums and masks work on whole vectors over queries, and matrix products need no packing but that of a block of
// queries. Scores are made again for the gradients, from their log-sum-exp.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

#include "check_cpu.h"
#include "vectors_cpu.h"

namespace {

using at::Tensor;
using at::TensorList;
constexpr int64_t BLOCK = 16;  // queries

using bmojo::exp2_of_negative;
using bmojo::Lanes;
using bmojo::load;
using bmojo::store;
using bmojo::Vec;

// C[m, n] += sum_k A[m, k] B[k, n] for M rows and V vectors of columns; the elements of A lie a_m and a_k apart
template <typename T, int M, int V>
inline void product(int64_t K, const T* A, int64_t a_m, int64_t a_k, const T* B, int64_t b_k, T* C, int64_t c_m) {
  constexpr int64_t L = Lanes<T>::COUNT;
  Vec<T> sum[M][V];
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) sum[m][v] = load(C + m * c_m + v * L);
  for (int64_t k = 0; k < K; ++k) {
    Vec<T> b[V];
    for (int v = 0; v < V; ++v) b[v] = load(B + k * b_k + v * L);
    for (int m = 0; m < M; ++m) {
      const T a = A[m * a_m + k * a_k];
      for (int v = 0; v < V; ++v) sum[m][v] += a * b[v];
    }
  }
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) store(C + m * c_m + v * L, sum[m][v]);
}

template <typename T, int M>
inline void product_rows(int64_t N, int64_t K, const T* A, int64_t a_m, int64_t a_k, const T* B, int64_t b_k, T* C,
                         int64_t c_m) {
  constexpr int64_t L = Lanes<T>::COUNT;
  int64_t n = 0;
  for (; n + 2 * L <= N; n += 2 * L) product<T, M, 2>(K, A, a_m, a_k, B + n, b_k, C + n, c_m);
  for (; n + L <= N; n += L) product<T, M, 1>(K, A, a_m, a_k, B + n, b_k, C + n, c_m);
  for (; n < N; ++n)
    for (int64_t m = 0; m < M; ++m) {
      T sum = 0;
      for (int64_t k = 0; k < K; ++k) sum += A[m * a_m + k * a_k] * B[k * b_k + n];
      C[m * c_m + n] += sum;
    }
}

template <typename T>
void add_product(int64_t M, int64_t N, int64_t K, const T* A, int64_t a_m, int64_t a_k, const T* B, int64_t b_k, T* C,
                 int64_t c_m) {
  int64_t m = 0;
  for (; m + 6 <= M; m += 6) product_rows<T, 6>(N, K, A + m * a_m, a_m, a_k, B, b_k, C + m * c_m, c_m);
  for (; m < M; ++m) product_rows<T, 1>(N, K, A + m * a_m, a_m, a_k, B, b_k, C + m * c_m, c_m);
}

// A source of keys, as the sizes say it is laid out: (entries before slot 0, stride, nearest, span) of a `Source`, or
// (slots a chunk, 0, 0, 0) of the eidetic slots.
struct Part {
  int64_t size, stride, nearest, span, entries, rows;
  const int64_t *first, *last;  // [rows, entries]: the slots of queries from which, and up to which, a key is seen

  // the entries that may be seen by the queries [begin, end) of a chunk
  std::pair<int64_t, int64_t> within(int64_t chunk, int64_t begin, int64_t end) const {
    if (!stride) return {chunk * size, (chunk + 1) * size};
    const int64_t ahead = stride - 1 + nearest - size * stride;  // of entry 0: the first slot that sees it
    const auto from = [&](int64_t slot) { return std::max<int64_t>(0, (slot - ahead + stride - 1) / stride); };
    return {std::min(entries, from(std::max(ahead, begin - span + 1))), std::min(entries, from(std::max(ahead, end)))};
  }
};

struct Sizes {
  int64_t batch, time, heads, kv_heads, width, value_width, chunk;
  std::vector<Part> parts;
  int64_t most = 0;  // keys of a block

  Sizes(const Tensor& q, TensorList k, TensorList v, TensorList first, TensorList last, at::IntArrayRef geometry,
        int64_t chunk_size)
      : batch(q.size(0)),
        time(q.size(1)),
        heads(q.size(2)),
        kv_heads(k.at(0).size(2)),
        width(q.size(3)),
        value_width(v.at(0).size(3)),
        chunk(chunk_size) {
    const bmojo::Check check("read", q);
    const size_t count = k.size();
    TORCH_CHECK(v.size() == count && first.size() == count && last.size() == count && geometry.size() == 4 * count,
                "read: expected values, spans and a geometry for each of ", count, " sets of keys");
    check.multiple(heads, kv_heads, "heads");
    check.multiple(time, chunk, "tokens");
    check(q, {batch, time, heads, width});
    for (size_t i = 0; i < count; ++i) {
      const int64_t *g = geometry.data() + 4 * i, entries = k[i].size(1), rows = first[i].size(0);
      TORCH_CHECK(g[1] > 0 ? g[3] >= 0 : g[1] == 0 && g[0] >= 0 && entries == time / chunk * g[0], "read: ", entries,
                  " keys do not fit the geometry ", at::IntArrayRef(g, 4));
      TORCH_CHECK(rows == 1 || rows == batch, "read: expected spans of 1 or ", batch, " rows, got ", rows);
      check(k[i], {batch, entries, kv_heads, width});
      check(v[i], {batch, entries, kv_heads, value_width});
      check(first[i], {rows, entries}, at::kLong);
      check(last[i], {rows, entries}, at::kLong);
      parts.push_back({g[0], g[1], g[2], g[3], entries, rows, first[i].const_data_ptr<int64_t>(),
                       last[i].const_data_ptr<int64_t>()});
      most += g[1] ? (std::min(BLOCK, chunk) + g[3]) / g[1] + 2 : g[0];
    }
  }
};

// The keys of one part that a block of queries is compared with, from row `at` of the scores on
struct Keys {
  int64_t part, begin, count, at;
};

template <typename T>
struct Block {
  const Sizes& s;
  std::vector<const T*> k, v;
  int64_t b = 0, group = 0, head = 0, begin = 0, count = 0, keys = 0;  // queries [begin, begin + count)
  std::vector<Keys> spans;
  std::vector<T> scores, turned;  // [keys, BLOCK], [width, BLOCK]

  Block(const Sizes& s, TensorList k_, TensorList v_)
      : s(s), scores(s.most * BLOCK), turned(std::max(s.width, s.value_width) * BLOCK) {
    for (const Tensor& z : k_) k.push_back(z.const_data_ptr<T>());
    for (const Tensor& z : v_) v.push_back(z.const_data_ptr<T>());
  }

  void take(int64_t b_, int64_t group_, int64_t begin_) {
    b = b_, group = group_, begin = begin_, keys = 0;
    const int64_t chunk = begin / s.chunk;
    count = std::min(BLOCK, (chunk + 1) * s.chunk - begin);
    spans.clear();
    for (size_t i = 0; i < s.parts.size(); ++i) {
      const auto [from, to] = s.parts[i].within(chunk, begin, begin + count);
      if (from >= to) continue;
      spans.push_back({static_cast<int64_t>(i), from, to - from, keys});
      keys += to - from;
    }
  }

  int64_t key_row(const Keys& z) const {  // of a tensor [batch, entries, kv_heads, .]
    return (b * s.parts[z.part].entries + z.begin) * s.kv_heads + group;
  }
  int64_t query_row() const { return (b * s.time + begin) * s.heads + head; }

  // rows [count, size] of queries as [size, BLOCK], times `scale`, zero beyond the last
  void turn(const T* rows, int64_t size, T scale) {
    const int64_t apart = s.heads * size;
    for (int64_t p = 0; p < size; ++p) {
      T* to = &turned[p * BLOCK];
      for (int64_t i = 0; i < count; ++i) to[i] = rows[i * apart + p] * scale;
      for (int64_t i = count; i < BLOCK; ++i) to[i] = 0;
    }
  }

  // to[key, query] = row of `from` . query as turned
  void compare(const std::vector<const T*>& from, int64_t size, std::vector<T>& to) const {
    std::memset(to.data(), 0, sizeof(T) * keys * BLOCK);
    for (const Keys& z : spans)
      add_product<T>(z.count, BLOCK, size, from[z.part] + key_row(z) * size, s.kv_heads * size, 1, turned.data(), BLOCK,
                     &to[z.at * BLOCK], BLOCK);
  }

  // scores in units of log 2, -inf where a query does not see a key
  void score(const T* q) {
    const T scale = 1 / std::sqrt(static_cast<T>(s.width));
    turn(q + query_row() * s.width, s.width, scale * static_cast<T>(1.4426950408889634074));
    compare(k, s.width, scores);
    for (const Keys& z : spans) {
      const Part& part = s.parts[z.part];
      const int64_t row = (part.rows > 1 ? b : 0) * part.entries + z.begin;
      for (int64_t j = 0; j < z.count; ++j) {
        const int64_t low = part.first[row + j] - begin, high = std::min(part.last[row + j] - begin, count - 1);
        if (low > 0 || high < BLOCK - 1) hide(&scores[(z.at + j) * BLOCK], low, high);
      }
    }
  }

  static void hide(T* row, int64_t low, int64_t high) {  // all but [low, high]
    constexpr int64_t L = Lanes<T>::COUNT;
    typedef typename Lanes<T>::Int Int;
    typename Lanes<T>::Ints lane;
    for (int64_t i = 0; i < L; ++i) lane[i] = i;
    const Int a = std::clamp<int64_t>(low, -1, BLOCK), z = std::clamp<int64_t>(high, -1, BLOCK);
    const Vec<T> none = Vec<T>{} - std::numeric_limits<T>::infinity();
    for (int64_t i = 0; i < BLOCK; i += L, lane += static_cast<Int>(L))
      store(row + i, ((lane >= a) & (lane <= z)) ? load(row + i) : none);
  }
};

template <typename T, typename Work>
void each_block(const Sizes& s, TensorList k, TensorList v, const Work& work) {
  at::parallel_for(0, s.batch * s.kv_heads, 1, [&](int64_t first, int64_t last) {
    Block<T> block(s, k, v);
    for (int64_t task = first; task < last; ++task)
      for (int64_t chunk = 0; chunk < s.time; chunk += s.chunk)
        for (int64_t begin = chunk; begin < chunk + s.chunk; begin += BLOCK) {
          block.take(task / s.kv_heads, task % s.kv_heads, begin);
          for (int64_t head = 0; head < s.heads / s.kv_heads; ++head) {
            block.head = block.group * (s.heads / s.kv_heads) + head;
            work(block);
          }
        }
  });
}

template <typename T>
void forward_kernel(const Sizes& s, TensorList k, TensorList v, const T* q, T* o, T* lse, T* used) {
  constexpr int64_t L = Lanes<T>::COUNT;
  each_block<T>(s, k, v, [&](Block<T>& block) {
    block.score(q);
    T top[BLOCK], total[BLOCK], inverse[BLOCK];
    for (int64_t i = 0; i < BLOCK; i += L) {
      T* column = &block.scores[i];
      Vec<T> most = Vec<T>{} - std::numeric_limits<T>::infinity(), sum = {};
      for (int64_t j = 0; j < block.keys; ++j) {
        const Vec<T> z = load(column + j * BLOCK);
        most = z > most ? z : most;
      }
      const Vec<T> base = most > -std::numeric_limits<T>::infinity() ? most : Vec<T>{};
      for (int64_t j = 0; j < block.keys; ++j) {
        const Vec<T> w = exp2_of_negative(load(column + j * BLOCK) - base);
        store(column + j * BLOCK, w);
        sum += w;
      }
      store(top + i, base);
      store(total + i, sum);
    }
    const int64_t apart = s.heads * s.value_width;
    T* out = o + block.query_row() * s.value_width;
    for (const Keys& z : block.spans)
      add_product<T>(block.count, s.value_width, z.count, &block.scores[z.at * BLOCK], 1, BLOCK,
                     block.v[z.part] + block.key_row(z) * s.value_width, s.kv_heads * s.value_width, out, apart);
    for (int64_t i = 0; i < BLOCK; ++i) inverse[i] = total[i] > 0 ? 1 / total[i] : 0;
    for (int64_t i = 0; i < block.count; ++i) {
      for (int64_t p = 0; p < s.value_width; ++p) out[i * apart + p] *= inverse[i];
      lse[block.query_row() + i * s.heads] =
          total[i] > 0 ? top[i] + std::log2(total[i]) : std::numeric_limits<T>::infinity();
    }
    if (!used) return;
    const Keys& z = block.spans.back();
    T* row = used + (block.b * s.kv_heads + block.group) * s.parts.back().entries + z.begin;
    for (int64_t j = 0; j < z.count; ++j) {
      Vec<T> most = {};
      for (int64_t i = 0; i < BLOCK; i += L) {
        const Vec<T> w = load(&block.scores[(z.at + j) * BLOCK + i]) * load(inverse + i);
        most = w > most ? w : most;
      }
      for (int64_t i = 0; i < L; ++i) row[j] = std::max(row[j], most[i]);
    }
  });
}

template <typename T>
void backward_kernel(const Sizes& s, TensorList k, TensorList v, const T* q, const T* o, const T* go, const T* lse,
                     T* dq, const std::vector<T*>& dk, const std::vector<T*>& dv) {
  constexpr int64_t L = Lanes<T>::COUNT;
  const T scale = 1 / std::sqrt(static_cast<T>(s.width));
  each_block<T>(s, k, v, [&](Block<T>& block) {
    block.score(q);
    std::vector<T> change(block.keys * BLOCK);
    const int64_t row = block.query_row(), apart = s.heads * s.value_width;
    T base[BLOCK], along[BLOCK];
    for (int64_t i = 0; i < BLOCK; ++i) {
      base[i] = i < block.count ? lse[row + i * s.heads] : std::numeric_limits<T>::infinity();
      along[i] = 0;
      if (i < block.count)
        for (int64_t p = 0; p < s.value_width; ++p)
          along[i] += o[row * s.value_width + i * apart + p] * go[row * s.value_width + i * apart + p];
    }
    block.turn(go + row * s.value_width, s.value_width, 1);
    block.compare(block.v, s.value_width, change);
    for (int64_t j = 0; j < block.keys; ++j)
      for (int64_t i = 0; i < BLOCK; i += L) {
        T *score = &block.scores[j * BLOCK + i], *d = &change[j * BLOCK + i];
        const Vec<T> w = exp2_of_negative(load(score) - load(base + i));
        store(score, w);
        store(d, w * (load(d) - load(along + i)) * scale);
      }
    for (const Keys& z : block.spans) {
      const int64_t key = block.key_row(z);
      const T *weights = &block.scores[z.at * BLOCK], *changes = &change[z.at * BLOCK];
      add_product<T>(block.count, s.width, z.count, changes, 1, BLOCK, block.k[z.part] + key * s.width,
                     s.kv_heads * s.width, dq + row * s.width, s.heads * s.width);
      add_product<T>(z.count, s.width, block.count, changes, BLOCK, 1, q + row * s.width, s.heads * s.width,
                     dk[z.part] + key * s.width, s.kv_heads * s.width);
      add_product<T>(z.count, s.value_width, block.count, weights, BLOCK, 1, go + row * s.value_width, apart,
                     dv[z.part] + key * s.value_width, s.kv_heads * s.value_width);
    }
  });
}

// o, the log-sum-exp of each query in units of log 2 (inf where it sees nothing), and the largest weight that a query
// gives to each key of the last part, if `usage`. q [batch, time, heads, width]; k, v [batch, entries, kv_heads, .].
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& q, TensorList k, TensorList v, TensorList first,
                                           TensorList last, at::IntArrayRef geometry, int64_t chunk_size, bool usage) {
  const Sizes s(q, k, v, first, last, geometry, chunk_size);
  TORCH_CHECK(!usage || (!s.parts.back().stride && s.parts.back().size), "read: the last keys have no usage");
  Tensor o = at::zeros({s.batch, s.time, s.heads, s.value_width}, q.options());
  Tensor lse = at::empty({s.batch, s.time, s.heads}, q.options());
  Tensor used = at::zeros({s.batch, s.kv_heads, usage ? s.parts.back().entries : 0}, q.options());
  AT_DISPATCH_FLOATING_TYPES(q.scalar_type(), "read", [&] {
    using T = scalar_t;
    forward_kernel<T>(s, k, v, q.const_data_ptr<T>(), o.mutable_data_ptr<T>(), lse.mutable_data_ptr<T>(),
                      usage ? used.mutable_data_ptr<T>() : nullptr);
  });
  return {o, lse, used.amax(1)};
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> backward(const Tensor& go, const Tensor& o,
                                                                      const Tensor& lse, const Tensor& q, TensorList k,
                                                                      TensorList v, TensorList first, TensorList last,
                                                                      at::IntArrayRef geometry, int64_t chunk_size) {
  const Sizes s(q, k, v, first, last, geometry, chunk_size);
  const bmojo::Check check("read", q);
  check(o, {s.batch, s.time, s.heads, s.value_width});
  check(go, o.sizes());
  check(lse, {s.batch, s.time, s.heads});
  Tensor dq = at::zeros_like(q);
  std::vector<Tensor> dk, dv;
  for (const Tensor& z : k) dk.push_back(at::zeros_like(z));
  for (const Tensor& z : v) dv.push_back(at::zeros_like(z));
  AT_DISPATCH_FLOATING_TYPES(q.scalar_type(), "read", [&] {
    using T = scalar_t;
    std::vector<T*> dk_, dv_;
    for (Tensor& z : dk) dk_.push_back(z.mutable_data_ptr<T>());
    for (Tensor& z : dv) dv_.push_back(z.mutable_data_ptr<T>());
    backward_kernel<T>(s, k, v, q.const_data_ptr<T>(), o.const_data_ptr<T>(), go.const_data_ptr<T>(),
                       lse.const_data_ptr<T>(), dq.mutable_data_ptr<T>(), dk_, dv_);
  });
  return {dq, dk, dv};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(bmojo, library) {
  library.def(
      "read_forward(Tensor q, Tensor[] k, Tensor[] v, Tensor[] first, Tensor[] last, int[] geometry, int chunk_size, "
      "bool usage) -> (Tensor, Tensor, Tensor)");
  library.def(
      "read_backward(Tensor go, Tensor o, Tensor lse, Tensor q, Tensor[] k, Tensor[] v, Tensor[] first, Tensor[] last, "
      "int[] geometry, int chunk_size) -> (Tensor, Tensor[], Tensor[])");
}

TORCH_LIBRARY_IMPL(bmojo, CPU, library) {
  library.impl("read_forward", forward);
  library.impl("read_backward", backward);
}
