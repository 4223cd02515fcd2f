// Products of rows with weights in 8 or 4 bits. Rows are rounded to 8 bits, with a scale for SHARE numbers, so that
// nearly all sums are of integers. An output depends neither on the rows beside it nor on the number of threads. With
// AMX it is tiles that multiply by 8 bits, and MANY rows or more by 4 (`tiles.h`).
//
// Weights lie in blocks of 32 outputs. 8 bits, plus 128: for each four inputs 128 bytes, output by output. 4 bits: the
// same for eight inputs, the first four in the low halves of bytes. Their scales and offsets: a pair for each output of
// a block and each group, group by group.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <optional>
#include <vector>

#include "amx.h"
#include "tiles.h"
#include "vectors.h"

namespace {

using namespace lmkit;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t GROUP = 32, BLOCK = 32;
template <int BITS> constexpr int64_t SHARE = BITS == 4 ? 16 : 32;  // numbers of a row that share a scale
template <int BITS> constexpr int64_t SHARES = GROUP / SHARE<BITS>;
constexpr int VECTORS = 2, PART = VECTORS * LANES;  // outputs that are computed at a time, a block or half of one
constexpr int MOST_ROWS = LANES == 16 ? 4 : 3;      // and rows: as many sums as there are registers for
constexpr int64_t CACHED = 3 << 17;                 // bytes of rows that stay in a core's cache beside a block
constexpr int64_t WORTH = 1 << 17;                  // multiplications that make it worth to wake a thread

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr int ZERO = 128;  // the byte of an 8-bit weight of 0
template <int BITS> inline Ints dot(Ints sums, Ints weights, Ints row) {
#if defined(__AVX512VNNI__)
  return _mm512_dpbusd_epi32(sums, weights, row);
#else
  return _mm256_dpbusd_avx_epi32(sums, weights, row);
#endif
}
#else
constexpr int ZERO = 0;  // signs are moved from weights to rows: no pair of products is beyond 16 bits then
template <int BITS> inline Ints dot(Ints sums, Ints weights, Ints row) {
  if constexpr (BITS == 8) {
    const Ints numbers = _mm256_xor_si256(weights, _mm256_set1_epi8(-128));
    row = _mm256_sign_epi8(row, numbers);
    weights = _mm256_abs_epi8(numbers);
  }
  return add(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(weights, row), _mm256_set1_epi16(1)));
}
#endif

// What numbers of a rounded row that share a scale have beside their bytes.
struct Share {
  float scale;
  float total;    // their sum, scaled; the first of a group has that of all of it
  int32_t start;  // what a sum with weights begins at, for their offset
};

template <typename T> struct Layer {
  const uint8_t* weight;
  const T* scales;
  const T* bias;
  int64_t inputs, outputs, groups;
};

template <int BITS, typename T> void round_row(const T* row, int64_t inputs, int8_t* bytes, Share* found) {
  constexpr int32_t offset = BITS == 4 ? 8 : ZERO;
  constexpr int64_t size = SHARE<BITS>;
  for (int64_t first = 0; first < inputs; first += size, bytes += size, ++found) {
    T padded[size] = {};
    const T* part = row + first;
    if (inputs - first < size) {
      std::memcpy(padded, part, (inputs - first) * sizeof(T));
      part = padded;
    }
    Ints most = splat(0);
    for (int at = 0; at < size; at += LANES)
      most = greater(most, both(as_ints(load_widened(part + at)), splat(0x7fffffff)));
    const int32_t bits = greatest(most);
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    const bool finite = bits < 0x7f800000;
    const float inverse = finite && magnitude > 1e-36f ? 127 / magnitude : 0;
    Ints total = splat(0);
    for (int at = 0; at < size; at += LANES) {
      const Ints numbers = finite ? rounded(times(load_widened(part + at), splat(inverse))) : splat(0);
      store_bytes(bytes + at, numbers);
      total = add(total, numbers);
    }
    const int32_t whole = sum(total);
    const float scale = finite ? magnitude / 127 : std::numeric_limits<float>::quiet_NaN();
    *found = {scale, scale * whole, -offset * whole};
    if (first % GROUP) found[-1].total += found->total;
  }
}

template <typename T> inline void load_pairs(const T* from, Floats& scale, Floats& offset) {
  if constexpr (sizeof(T) == 2) {
    const Ints pairs = load(from);
    scale = as_floats(left<16>(pairs));
    offset = as_floats(both(pairs, splat(static_cast<int32_t>(0xffff0000))));
  } else {
    const Floats a = load_floats(from), b = load_floats(from + LANES);
    scale = firsts(a, b);
    offset = seconds(a, b);
  }
}

// Multiply some rows with PART outputs of a block.
template <int BITS, int ROWS, typename T>
void multiply(const uint8_t* weight, const T* scales, const int8_t* bytes, const Share* shares, int64_t groups,
              float* to, const uint8_t* ahead, int64_t lines) {
  Floats sums[ROWS][VECTORS];
  for (auto& row : sums)
    for (auto& sum : row) sum = splat(0.0f);
  for (int64_t at = 0; at < groups; ++at, bytes += GROUP, shares += SHARES<BITS>) {
    for (int64_t line = 0; line < lines; ++line, ahead += 64)
      _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T1);
    Floats parts[ROWS][VECTORS];  // of the sums, by this group
    for (int64_t share = 0; share < SHARES<BITS>; ++share) {
      Ints dots[ROWS][VECTORS];
      for (int row = 0; row < ROWS; ++row)
        for (int v = 0; v < VECTORS; ++v) dots[row][v] = splat(shares[row * groups * SHARES<BITS> + share].start);
#pragma GCC unroll 2
      for (int64_t quad = 0; quad < SHARE<BITS> / 4; quad += BITS == 4 ? 2 : 1, weight += 4 * BLOCK) {
        Ints loaded[VECTORS];
        for (int v = 0; v < VECTORS; ++v) loaded[v] = load(weight + v * LANES * 4);
        for (int half = 0; half < (BITS == 4 ? 2 : 1); ++half) {
          Ints weights[VECTORS];
          for (int v = 0; v < VECTORS; ++v) {
            weights[v] = loaded[v];
            if constexpr (BITS == 4) weights[v] = both(half ? right<4>(loaded[v]) : loaded[v], splat(0x0f0f0f0f));
          }
          for (int row = 0; row < ROWS; ++row) {
            int32_t four;
            std::memcpy(&four, bytes + row * groups * GROUP + share * SHARE<BITS> + (quad + half) * 4, 4);
            for (int v = 0; v < VECTORS; ++v) dots[row][v] = dot<BITS>(dots[row][v], weights[v], splat(four));
          }
        }
      }
      for (int row = 0; row < ROWS; ++row) {
        const Floats by = splat(shares[row * groups * SHARES<BITS> + share].scale);
        for (int v = 0; v < VECTORS; ++v) {
          const Floats dot = converted(dots[row][v]);
          if constexpr (BITS == 8) sums[row][v] = fused(dot, by, sums[row][v]);
          else parts[row][v] = share ? fused(dot, by, parts[row][v]) : times(dot, by);
        }
      }
    }
    if constexpr (BITS == 4) {
      for (int v = 0; v < VECTORS; ++v) {
        Floats scale, offset;
        load_pairs(scales + (at * BLOCK + v * LANES) * 2, scale, offset);
        for (int row = 0; row < ROWS; ++row) {
          sums[row][v] = fused(offset, splat(shares[row * groups * SHARES<BITS>].total), sums[row][v]);
          sums[row][v] = fused(parts[row][v], scale, sums[row][v]);
        }
      }
    }
  }
  for (int row = 0; row < ROWS; ++row)
    for (int v = 0; v < VECTORS; ++v) store(to + row * PART + v * LANES, sums[row][v]);
}

template <int BITS, typename T> using Multiply = decltype(&multiply<BITS, 1, T>);
template <int BITS, typename T> constexpr Multiply<BITS, T> MULTIPLY[] = {
    multiply<BITS, 1, T>, multiply<BITS, 2, T>, multiply<BITS, 3, T>,
#if defined(__AVX512VNNI__)
    multiply<BITS, 4, T>,
#endif
};

template <int BITS, typename T>
inline void finish(const float* from, const Layer<T>& layer, int64_t first, int64_t count, T* to) {
  for (int at = 0; at < count; ++at) {
    float value = from[at];
    if constexpr (BITS == 8) value *= widened(layer.scales[first + at]);
    if (layer.bias) value += widened(layer.bias[first + at]);
    narrow(value, to[at]);
  }
}

// Multiply rows with a block of outputs.
template <int BITS, typename T>
void block(const Layer<T>& layer, int64_t number, const int8_t* bytes, const Share* found, int64_t rows, T* to) {
  const int64_t size = layer.groups * GROUP * BLOCK * BITS / 8;
  const uint8_t* weight = layer.weight + number * size;
  const T* scales = layer.scales + (BITS == 4 ? number * layer.groups * BLOCK * 2 : 0);
  const int64_t tiles = (rows + MOST_ROWS - 1) / MOST_ROWS;
  const int64_t lines = (size / 64 / layer.groups + tiles - 1) / tiles;  // of the next block, fetched for each group
  const bool last = (number + 1) * BLOCK >= layer.outputs;
  for (int64_t tile = 0, row = 0; tile < tiles; ++tile) {
    const int64_t count = (rows - row + tiles - tile - 1) / (tiles - tile);
    const uint8_t* ahead = weight + size + tile * lines * layer.groups * 64;
    const bool fetch = !last && ahead + lines * layer.groups * 64 <= weight + 2 * size + 64 * layer.groups;
    for (int64_t part = 0; part < BLOCK; part += PART) {
      const int64_t first = number * BLOCK + part;
      if (first >= layer.outputs) break;
      float sums[MOST_ROWS * PART];
      MULTIPLY<BITS, T>[count - 1](weight + part * 4, scales + part * 2, bytes + row * layer.groups * GROUP,
                                   found + row * layer.groups * SHARES<BITS>, layer.groups, sums, ahead,
                                   fetch && !part ? lines : 0);
      for (int64_t one = 0; one < count; ++one) {
        T* out = to + (row + one) * layer.outputs + first;
        if (layer.outputs - first >= PART) finish<BITS>(sums + one * PART, layer, first, PART, out);
        else finish<BITS>(sums + one * PART, layer, first, layer.outputs - first, out);
      }
    }
    row += count;
  }
}

template <int BITS, typename T> void linear(const Layer<T>& layer, const T* input, int64_t rows, T* to) {
  const int64_t length = layer.groups * GROUP, blocks = (layer.outputs + BLOCK - 1) / BLOCK;
  const std::unique_ptr<int8_t[]> bytes(new int8_t[rows * length]);
  const std::unique_ptr<Share[]> found(new Share[rows * layer.groups * SHARES<BITS>]);
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, WORTH / 4 / length), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      round_row<BITS>(input + row * layer.inputs, layer.inputs, bytes.get() + row * length,
                      found.get() + row * layer.groups * SHARES<BITS>);
  });
  const int64_t each = rows * blocks / (4 * torch::stable::get_num_threads());  // so that all threads have some
  const int64_t most = std::max<int64_t>(MOST_ROWS, std::min(CACHED / length, each) / MOST_ROWS * MOST_ROWS);
  const int64_t chunks = (rows + most - 1) / most;
  const int64_t grain = std::max<int64_t>(1, WORTH / (length * BLOCK * std::min(rows, most)));
  torch::stable::parallel_for(0, chunks * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / blocks * most, count = std::min(most, rows - row);
      block<BITS>(layer, task % blocks, bytes.get() + row * length,
                  found.get() + row * layer.groups * SHARES<BITS>, count, to + row * layer.outputs);
    }
  });
}

template <int BITS, typename T>
void linear(const Tensor& input, const Tensor& weight, const Tensor& scales, const T* bias, int64_t outputs,
            Tensor& to) {
  const int64_t inputs = input.size(input.dim() - 1), groups = (inputs + GROUP - 1) / GROUP;
  const int64_t blocks = (outputs + BLOCK - 1) / BLOCK;
  STD_TORCH_CHECK(weight.numel() == blocks * BLOCK * groups * GROUP * BITS / 8, "the weight has another size");
  STD_TORCH_CHECK(BITS == 8 || inputs % GROUP == 0, "rows do not divide into groups");
  const int64_t pairs = blocks * BLOCK * groups * 2;
  STD_TORCH_CHECK(scales.numel() == (BITS == 4 ? pairs : outputs), "the scales have another size");
  const int64_t rows = outputs ? to.numel() / outputs : 0;
  if (!rows) return;
  const auto* bytes = static_cast<const uint8_t*>(weight.const_data_ptr());
  const auto* by = static_cast<const T*>(scales.const_data_ptr());
  const auto* from = static_cast<const T*>(input.const_data_ptr());
  auto* found = static_cast<T*>(to.mutable_data_ptr());
#if defined(__AMX_INT8__)
  if (BITS == 8 && inputs <= LONGEST) {
    multiply_tiled(Tiled<T>{bytes, by, bias, inputs, groups * GROUP, outputs}, from, rows, found);
    return;
  }
  if constexpr (BITS == 4 && sizeof(T) == 2) {
    if (rows >= MANY && has_tiles()) {
      multiply_widened({bytes, by, bias, inputs, inputs, outputs}, from, rows, found);
      return;
    }
  }
#endif
  linear<BITS, T>(Layer<T>{bytes, by, bias, inputs, outputs, groups}, from, rows, found);
}

template <typename T>
void linear(const Tensor& input, const Tensor& weight, const Tensor& scales, const Tensor* bias, int64_t bits,
            int64_t outputs, Tensor& to) {
  const T* added = bias ? static_cast<const T*>(bias->const_data_ptr()) : nullptr;
  if (bits == 8) linear<8, T>(input, weight, scales, added, outputs, to);
  else linear<4, T>(input, weight, scales, added, outputs, to);
}

// (…, inputs) to (…, outputs), in the dtype of the input, the scales and the bias.
Tensor quantized_linear(const Tensor& given, const Tensor& weight, const Tensor& scales,
                        const std::optional<Tensor>& bias, int64_t bits, int64_t outputs) {
  const Tensor input = given.is_contiguous() ? given : torch::stable::contiguous(given);
  const ScalarType dtype = input.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "rows are float32 or bfloat16");
  STD_TORCH_CHECK(input.dim() > 0 && input.size(input.dim() - 1) > 0, "rows have a length");
  STD_TORCH_CHECK(bits == 8 || bits == 4, "weights have 8 or 4 bits");
  STD_TORCH_CHECK(scales.scalar_type() == dtype, "rows and scales have two dtypes");
  STD_TORCH_CHECK(weight.is_contiguous() && scales.is_contiguous(), "weights and scales are contiguous");
  const bool fits = !bias || (bias->scalar_type() == dtype && bias->is_contiguous() && bias->numel() == outputs);
  STD_TORCH_CHECK(fits, "the bias is another layer's");
  std::vector<int64_t> shape(input.sizes().begin(), input.sizes().end());
  shape.back() = outputs;
  Tensor to = torch::stable::new_empty(input, shape);
  const Tensor* added = bias ? &*bias : nullptr;
  if (dtype == ScalarType::Float) linear<float>(input, weight, scales, added, bits, outputs, to);
  else linear<uint16_t>(input, weight, scales, added, bits, outputs, to);
  return to;
}

STABLE_TORCH_LIBRARY_FRAGMENT(LMKIT_OPERATORS, library) {
  library.def("linear(Tensor input, Tensor weight, Tensor scales, Tensor? bias, int bits, int outputs) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(LMKIT_OPERATORS, CPU, library) { library.impl("linear", TORCH_BOX(&quantized_linear)); }

}  // namespace
