// The streaming top-E on CPUs: `select` of bmojo/memory/eidetic.py, a row at a time.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "check_cpu.h"

namespace {

using at::Tensor;

// Entries of a row: the slots held at the start, then the tokens of the call
struct Sizes {
  int64_t batch, entries, slots, chunk, chunks;
  double rate;                    // -log(decay)
  const int64_t* position;        // [batch, entries]; -1: an empty slot
  const bool *complete, *resets;  // [batch, chunks]
};

template <typename T>
struct Ranked {
  T value;
  int64_t place;  // among the candidates

  // the order of a stable torch.sort, descending: what is not a number comes first
  bool operator<(const Ranked& other) const {
    if (value > other.value) return true;
    if (value < other.value) return false;
    const bool nan = std::isnan(value);
    return nan != std::isnan(other.value) ? nan : place < other.place;
  }
};

struct Token {
  int64_t entry, position;
};

// value [batch, entries]: log scores, -inf for what is inadmissible. kept, where [batch, chunks + 1, slots]: entries
// and positions of the set before each chunk, and after the last one
template <typename T>
void select_rows(const Sizes& s, int64_t begin, int64_t end, const T* value, int64_t* kept, int64_t* where) {
  const T rate = static_cast<T>(s.rate), least = -std::numeric_limits<T>::infinity();
  std::vector<Token> set(s.slots), candidates(s.chunk + s.slots);
  std::vector<Ranked<T>> order(candidates.size());
  for (int64_t b = begin; b < end; ++b) {
    const int64_t *position = s.position + b * s.entries, at = b * (s.chunks + 1) * s.slots;
    for (int64_t e = 0; e < s.slots; ++e) set[e] = {e, position[e]};
    for (int64_t c = 0; c <= s.chunks; ++c) {
      if (c < s.chunks && s.resets && s.resets[b * s.chunks + c])
        for (Token& token : set) token.position = -1;
      for (int64_t e = 0; e < s.slots; ++e) {
        kept[at + c * s.slots + e] = set[e].entry;
        where[at + c * s.slots + e] = set[e].position;
      }
      if (c == s.chunks || !s.complete[b * s.chunks + c]) continue;
      const int64_t newest = s.slots + (c + 1) * s.chunk - 1, now = position[newest] + 1;
      for (int64_t i = 0; i < s.chunk; ++i) candidates[i] = {newest - i, position[newest - i]};
      std::copy(set.begin(), set.end(), candidates.begin() + s.chunk);
      for (size_t i = 0; i < candidates.size(); ++i) {
        const Token& token = candidates[i];
        const volatile T faded = static_cast<T>(now - token.position) * rate;  // rounded: PyTorch fuses no operations
        order[i] = {token.position < 0 ? least : value[b * s.entries + token.entry] - faded, static_cast<int64_t>(i)};
      }
      const auto held = order.begin() + s.chunk;
      std::sort(order.begin(), held);
      if (!std::is_sorted(held, order.end())) std::sort(held, order.end());  // rounding, or a reset
      std::inplace_merge(order.begin(), held, order.end());
      for (int64_t e = 0; e < s.slots; ++e) {
        set[e] = candidates[order[e].place];
        if (!(order[e].value > least)) set[e].position = -1;
      }
    }
  }
}

std::tuple<Tensor, Tensor> select_best(const Tensor& value, const Tensor& position, const Tensor& complete,
                                       const std::optional<Tensor>& resets, int64_t slots, int64_t chunk_size,
                                       double rate) {
  const int64_t batch = value.size(0), chunks = complete.size(1), entries = slots + chunks * chunk_size;
  const bmojo::Check check("select", value);
  TORCH_CHECK(slots >= 0 && chunk_size > 0, "select: expected chunks of one token at least, got ", slots,
              " slots and chunks of ", chunk_size);
  check(value, {batch, entries});
  check(position, {batch, entries}, at::kLong);
  check(complete, {batch, chunks}, at::kBool);
  check(resets, {batch, chunks}, at::kBool);
  const Sizes s{batch,
                entries,
                slots,
                chunk_size,
                chunks,
                rate,
                position.const_data_ptr<int64_t>(),
                complete.const_data_ptr<bool>(),
                resets ? resets->const_data_ptr<bool>() : nullptr};
  Tensor kept = at::empty({s.batch, s.chunks + 1, slots}, position.options()), where = at::empty_like(kept);
  AT_DISPATCH_FLOATING_TYPES(value.scalar_type(), "select", [&] {
    const scalar_t* values = value.const_data_ptr<scalar_t>();
    int64_t *tokens = kept.mutable_data_ptr<int64_t>(), *positions = where.mutable_data_ptr<int64_t>();
    at::parallel_for(0, s.batch, 1, [&](int64_t begin, int64_t end) {
      select_rows<scalar_t>(s, begin, end, values, tokens, positions);
    });
  });
  return {kept, where};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(bmojo, library) {
  library.def(
      "select(Tensor value, Tensor position, Tensor complete, Tensor? resets, int slots, int chunk_size, float rate) "
      "-> "
      "(Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(bmojo, CPU, library) { library.impl("select", select_best); }
