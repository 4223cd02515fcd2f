// Norms by the root mean square, rounded where transformers' round: to the dtype of the input before the weight.
#include <cmath>

#include "attention.h"

namespace {

using namespace lmkit;

constexpr int64_t WORTH = 1 << 15;  // numbers that make it worth to wake a thread

template <typename T> void norm_row(const T* row, const T* weight, int64_t size, float eps, T* to) {
  Floats squares = splat(0.0f);
  int64_t at = 0;
  for (; at + LANES <= size; at += LANES) {
    const Floats part = load_widened(row + at);
    squares = fused(part, part, squares);
  }
  float total = sum(squares);
  for (; at < size; ++at) total += widened(row[at]) * widened(row[at]);
  const float by = 1 / std::sqrt(total / size + eps);
  for (at = 0; at < size; ++at) {
    T rounded;
    narrow(widened(row[at]) * by, rounded);
    narrow(widened(rounded) * widened(weight[at]), to[at]);
  }
}

template <typename T> void norm(const Tensor& input, const Tensor& weight, float eps, Tensor& to) {
  const int64_t size = weight.numel(), rows = size ? to.numel() / size : 0;
  const T* from = static_cast<const T*>(input.const_data_ptr());
  const T* by = static_cast<const T*>(weight.const_data_ptr());
  T* found = static_cast<T*>(to.mutable_data_ptr());
  if (rows)
    torch::stable::parallel_for(0, rows, std::max<int64_t>(1, WORTH / size), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) norm_row(from + row * size, by, size, eps, found + row * size);
    });
}

// (…, size), of the dtype of the weight, to the same.
Tensor rms_norm(const Tensor& given, const Tensor& weight, double eps) {
  const Tensor input = given.is_contiguous() ? given : torch::stable::contiguous(given);
  const ScalarType dtype = input.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "rows are float32 or bfloat16");
  STD_TORCH_CHECK(weight.scalar_type() == dtype && weight.dim() == 1 && weight.is_contiguous() && input.dim() &&
                      input.size(input.dim() - 1) == weight.numel(), "the weight is another norm's");
  Tensor to = torch::stable::new_empty(input, input.sizes());
  (dtype == ScalarType::Float ? norm<float> : norm<uint16_t>)(input, weight, static_cast<float>(eps), to);
  return to;
}

STABLE_TORCH_LIBRARY_FRAGMENT(LMKIT_OPERATORS, library) {
  library.def("rms_norm(Tensor input, Tensor weight, float eps) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(LMKIT_OPERATORS, CPU, library) { library.impl("rms_norm", TORCH_BOX(&rms_norm)); }

}  // namespace
