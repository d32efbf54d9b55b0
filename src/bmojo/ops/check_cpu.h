// What the ops on CPUs check before they read memory by its address.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace bmojo {

// check(z, sizes) for the tensors of an op: contiguous, on the CPU, of these sizes, and of the dtype of the first
struct Check {
  const char* op;
  at::ScalarType dtype;

  Check(const char* op, const at::Tensor& first) : op(op), dtype(first.scalar_type()) {}

  void operator()(const at::Tensor& z, at::IntArrayRef sizes) const { (*this)(z, sizes, dtype); }
  void operator()(const at::Tensor& z, at::IntArrayRef sizes, at::ScalarType expected) const {
    TORCH_CHECK(z.sizes() == sizes && z.scalar_type() == expected && z.is_contiguous() && z.is_cpu(), op,
                ": expected a contiguous tensor of ", sizes, ", ", expected, ", on the CPU, got ", z.sizes(), ", ",
                z.scalar_type(), z.is_contiguous() ? "" : ", not contiguous", ", on ", z.device());
  }
  void operator()(const std::optional<at::Tensor>& z, at::IntArrayRef sizes) const {
    if (z) (*this)(*z, sizes);
  }
  void operator()(const std::optional<at::Tensor>& z, at::IntArrayRef sizes, at::ScalarType expected) const {
    if (z) (*this)(*z, sizes, expected);
  }

  void multiple(int64_t whole, int64_t part, const char* what) const {
    TORCH_CHECK(part > 0 && whole % part == 0, op, ": expected a multiple of ", part, " ", what, ", got ", whole);
  }
};

}  // namespace bmojo
