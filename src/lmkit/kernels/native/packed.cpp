// Products of rows with weights in bfloat16, by tiles of AMX. Weights lie in blocks of 32 outputs: for each two inputs
// 128 bytes, output by output. An output depends neither on the rows beside it nor on the number of threads.
#if defined(__AMX_BF16__)

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "amx.h"
#include "outputs.h"

namespace {

using namespace lmkit;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t STEP = 32;  // numbers of a row in a tile

void multiply(const uint16_t* input, int64_t rows, int64_t inputs, const uint8_t* weight, const uint16_t* bias,
              int64_t outputs, uint16_t* to) {
  const int64_t planes = rows > TILE ? 2 : 1, groups = (rows + planes * TILE - 1) / (planes * TILE);
  const int64_t each = (rows + planes * groups - 1) / (planes * groups), together = planes * each;
  const int64_t steps = (inputs + STEP - 1) / STEP;
  const Planes lines(groups, planes, each, steps, 0);
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, WORTH_A_THREAD / inputs), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t step = 0; step < steps; ++step) {
        const int64_t count = std::min(STEP, inputs - step * STEP);
        char* there = lines.at(row / together, step, row % together / each, row % each);
        std::memcpy(there, input + row * inputs + step * STEP, count * 2);
        std::memset(there + count * 2, 0, (STEP - count) * 2);
      }
  });
  const auto by = planes == 2 ? multiply_by_tiles<false, 2> : multiply_by_tiles<false, 1>;
  for_blocks(
      weight, steps * STEP_BYTES, (outputs + OUTPUTS - 1) / OUTPUTS, lines, groups, true,
      [&](const uint8_t* block, int64_t group, int32_t* sums, const uint8_t* ahead, int64_t count) {
        by(block, lines, group, sums, ahead, count);
      },
      [&](const int32_t* sums, int64_t group, int64_t first) {
        const Outputs<uint16_t> out(outputs, first, bias);
        for (int64_t row = group * together; row < std::min(rows, (group + 1) * together); ++row)
          out.write(to, row, [&](int64_t at, Floats added) {
            return add(as_floats(load(sums + row % together * OUTPUTS + at)), added);
          });
      });
}

// (…, inputs) to (…, outputs), all bfloat16.
Tensor packed_linear(const Tensor& given, const Tensor& weight, const std::optional<Tensor>& bias, int64_t outputs) {
  const Tensor input = given.is_contiguous() ? given : torch::stable::contiguous(given);
  const bool half = weight.scalar_type() == ScalarType::BFloat16 && input.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(half && (!bias || bias->scalar_type() == ScalarType::BFloat16), "rows and weights are bfloat16");
  STD_TORCH_CHECK(input.dim() > 0, "rows have a length");
  STD_TORCH_CHECK(!bias || (bias->is_contiguous() && bias->numel() == outputs), "the bias is another layer's");
  const int64_t inputs = input.size(input.dim() - 1), blocks = (outputs + OUTPUTS - 1) / OUTPUTS;
  const int64_t size = blocks * OUTPUTS * ((inputs + STEP - 1) / STEP * STEP);
  STD_TORCH_CHECK(weight.is_contiguous() && weight.numel() == size, "the weight has another size");
  STD_TORCH_CHECK(has_tiles(), "the system refuses tiles of AMX");
  std::vector<int64_t> shape(input.sizes().begin(), input.sizes().end());
  shape.back() = outputs;
  Tensor to = torch::stable::new_empty(input, shape);
  if (const int64_t rows = outputs ? to.numel() / outputs : 0)
    multiply(static_cast<const uint16_t*>(input.const_data_ptr()), rows, inputs,
             static_cast<const uint8_t*>(weight.const_data_ptr()),
             bias ? static_cast<const uint16_t*>(bias->const_data_ptr()) : nullptr, outputs,
             static_cast<uint16_t*>(to.mutable_data_ptr()));
  return to;
}

STABLE_TORCH_LIBRARY_FRAGMENT(LMKIT_OPERATORS, library) {
  library.def("packed_linear(Tensor input, Tensor weight, Tensor? bias, int outputs) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(LMKIT_OPERATORS, CPU, library) { library.impl("packed_linear", TORCH_BOX(&packed_linear)); }

}  // namespace

#endif
