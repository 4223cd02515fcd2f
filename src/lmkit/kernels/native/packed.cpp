// Products of rows with weights in bfloat16, by tiles of AMX. Weights lie in blocks of 32 outputs: for each two inputs
// 128 bytes, output by output. An output depends neither on the rows beside it nor on the number of threads. Weights in
// 4 bits are widened to that, block by block.
#if defined(__AMX_BF16__)

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <vector>

#include "amx.h"
#include "outputs.h"
#include "tiles.h"

namespace {

using namespace lmkit;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t STEP = 32;  // numbers of a row in a tile

// A weight of bfloat16, or of what `open` widens to it.
struct Weight {
  const uint8_t* data;
  int64_t block_bytes, room;
  const uint16_t* bias;
  int64_t inputs, outputs;
};

template <typename Open> void multiply(const Weight& weight, Open open, const uint16_t* input, int64_t rows, uint16_t* to) {
  const int64_t inputs = weight.inputs, planes = rows > TILE ? 2 : 1;
  const int64_t groups = (rows + planes * TILE - 1) / (planes * TILE);
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
      weight.data, weight.block_bytes, (weight.outputs + OUTPUTS - 1) / OUTPUTS, lines, groups, true, weight.room, open,
      [&](const uint8_t* block, int64_t group, int32_t* sums, const uint8_t* ahead, int64_t count) {
        by(block, lines, group, sums, ahead, count);
      },
      [&](const int32_t* sums, int64_t group, int64_t first) {
        const Outputs<uint16_t> out(weight.outputs, first, weight.bias);
        for (int64_t row = group * together; row < std::min(rows, (group + 1) * together); ++row)
          out.write(to, row, [&](int64_t at, Floats added) {
            return add(as_floats(load(sums + row % together * OUTPUTS + at)), added);
          });
      });
}

// Widen 32 inputs of 16 outputs: eight at a time are the halves of four bytes of each output.
void widen(const uint8_t* from, Floats scale, Floats least, uint8_t* to) {
  alignas(64) static const auto together = [] {
    std::array<uint16_t, 32> found{};
    for (uint16_t at = 0; at < 32; ++at) found[at] = at / 2 + at % 2 * 16;
    return found;
  }();
  const Ints order = load(together.data());
  for (int64_t eight = 0; eight < STEP / 8; ++eight, from += 4 * OUTPUTS) {
    const Ints loaded = load(from);
    for (const Ints four : {loaded, right<4>(loaded)}) {
      const auto number = [&](Ints moved) { return fused(converted(both(moved, splat(15))), scale, least); };
      const Floats first = number(four), second = number(right<8>(four));
      const Floats third = number(right<16>(four)), fourth = number(right<24>(four));
      store(to, _mm512_permutexvar_epi16(order, (Ints)_mm512_cvtne2ps_pbh(second, first)));
      store(to + 2 * LINE, _mm512_permutexvar_epi16(order, (Ints)_mm512_cvtne2ps_pbh(fourth, third)));
      to += 4 * LINE;
    }
  }
}

// (…, inputs) to (…, outputs), all bfloat16.
Tensor packed_linear(const Tensor& given, const Tensor& weight, const std::optional<Tensor>& bias, int64_t outputs) {
  const Tensor input = given.is_contiguous() ? given : torch::stable::contiguous(given);
  const bool half = weight.scalar_type() == ScalarType::BFloat16 && input.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(half && (!bias || bias->scalar_type() == ScalarType::BFloat16), "rows and weights are bfloat16");
  STD_TORCH_CHECK(input.dim() > 0 && input.size(input.dim() - 1) > 0, "rows have a length");
  STD_TORCH_CHECK(!bias || (bias->is_contiguous() && bias->numel() == outputs), "the bias is another layer's");
  const int64_t inputs = input.size(input.dim() - 1), blocks = (outputs + OUTPUTS - 1) / OUTPUTS;
  const int64_t size = blocks * OUTPUTS * ((inputs + STEP - 1) / STEP * STEP);
  STD_TORCH_CHECK(weight.is_contiguous() && weight.numel() == size, "the weight has another size");
  STD_TORCH_CHECK(has_tiles(), "the system refuses tiles of AMX");
  std::vector<int64_t> shape(input.sizes().begin(), input.sizes().end());
  shape.back() = outputs;
  Tensor to = torch::stable::new_empty(input, shape);
  if (const int64_t rows = outputs ? to.numel() / outputs : 0)
    multiply({static_cast<const uint8_t*>(weight.const_data_ptr()), size / blocks * 2, 0,
              bias ? static_cast<const uint16_t*>(bias->const_data_ptr()) : nullptr, inputs, outputs},
             as_it_lies, static_cast<const uint16_t*>(input.const_data_ptr()), rows,
             static_cast<uint16_t*>(to.mutable_data_ptr()));
  return to;
}

STABLE_TORCH_LIBRARY_FRAGMENT(LMKIT_OPERATORS, library) {
  library.def("packed_linear(Tensor input, Tensor weight, Tensor? bias, int outputs) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(LMKIT_OPERATORS, CPU, library) { library.impl("packed_linear", TORCH_BOX(&packed_linear)); }

}  // namespace

void lmkit::multiply_widened(const Tiled<uint16_t>& layer, const uint16_t* input, int64_t rows, uint16_t* to) {
  const int64_t groups = layer.inputs / STEP;
  const auto open = [&](const uint8_t* from, int64_t number, uint8_t* room) {
    const uint16_t* pairs = layer.scales + number * groups * OUTPUTS * 2;
    for (int64_t group = 0; group < groups; ++group, pairs += OUTPUTS * 2)
      for (int64_t half = 0; half < 2; ++half) {
        const Ints both_halves = load(pairs + half * 2 * LANES);
        const Floats scale = as_floats(left<16>(both_halves));
        const Floats offset = as_floats(both(both_halves, splat(static_cast<int32_t>(0xffff0000))));
        widen(from + group * STEP_BYTES / 4 + half * LINE, scale, fused(scale, splat(-8.0f), offset),
              room + group * STEP_BYTES + half * LINE);
      }
    return static_cast<const uint8_t*>(room);
  };
  multiply({layer.weight, groups * STEP_BYTES / 4, groups * STEP_BYTES, layer.bias, layer.inputs, layer.outputs}, open,
           input, rows, to);
}

#endif
