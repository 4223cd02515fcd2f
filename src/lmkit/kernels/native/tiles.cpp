// Rows are rounded to 16 bits, each with one scale, and written as two digits of 8 bits: so a product is two sums of
// whole numbers, which are exact, whatever multiplies them. AMX takes as long for both as for bfloat16, and reads half.
#include "tiles.h"

#if defined(__AMX_INT8__)

#include <limits>

#include "amx.h"
#include "outputs.h"

namespace lmkit {

namespace {

constexpr int64_t VECTORS = OUTPUTS / LANES;
constexpr int64_t FEW = 4;           // rows that vectors multiply faster
constexpr int32_t MOST = 127 * 256;  // the largest magnitude of a rounded number
constexpr int32_t OFFSET = 128;      // what weights have been moved by

// Rounded rows: their high digits are one plane, their low ones another.
struct Rounded {
  Planes digits;
  std::unique_ptr<float[]> scales;
  std::unique_ptr<int32_t[][2]> totals;  // of high and of low digits
};

// 16 numbers of a row, or what is left of it and zeros.
template <typename T> Floats some(const T* row, int64_t first, int64_t count) {
  if (count - first >= LANES) return load_widened(row + first);
  T padded[LANES] = {};
  if (count > first) std::memcpy(padded, row + first, (count - first) * sizeof(T));
  return load_widened(padded);
}

template <typename T> void round_row(const T* row, const Tiled<T>& layer, int64_t number, const Rounded& to) {
  const int64_t count = layer.given, group = number / to.digits.each, line = number % to.digits.each;
  Ints most = splat(0);
  for (int64_t first = 0; first < count; first += LANES)
    most = greater(most, both(as_ints(some(row, first, count)), splat(0x7fffffff)));
  const int32_t bits = greatest(most);
  float magnitude;
  std::memcpy(&magnitude, &bits, 4);
  const bool finite = bits < 0x7f800000;
  const Floats inverse = splat(finite && magnitude > 1e-34f ? MOST / magnitude : 0);
  for (int64_t plane = 0; plane < 2; ++plane)
    std::memset(to.digits.at(group, to.digits.steps - 1, plane, line), 0, to.digits.again);
  Ints highs = splat(0), lows = splat(0);
  for (int64_t first = 0; first < layer.inputs; first += LANES) {
    const Ints whole = finite ? rounded(times(some(row, first, count), inverse)) : splat(0);
    const Ints above = _mm512_srai_epi32(add(whole, splat(128)), 8);
    const Ints below = _mm512_sub_epi32(whole, left<8>(above));
    const int64_t step = first / LINE, place = first % LINE + (step == to.digits.steps - 1 ? to.digits.again : 0);
    store_bytes(reinterpret_cast<int8_t*>(to.digits.at(group, step, 0, line) + place), above);
    store_bytes(reinterpret_cast<int8_t*>(to.digits.at(group, step, 1, line) + place), below);
    highs = add(highs, above);
    lows = add(lows, below);
  }
  to.scales[number] = finite ? magnitude / MOST : std::numeric_limits<float>::quiet_NaN();
  to.totals[number][0] = sum(highs);
  to.totals[number][1] = sum(lows);
}

// As `multiply_by_tiles` does, a few rows by vectors.
template <int ROWS>
void by_vectors(const uint8_t* weight, const Planes& rows, int64_t group, void* to, const uint8_t* ahead,
                int64_t lines) {
  Ints sums[2 * ROWS][VECTORS];
  for (auto& row : sums)
    for (auto& sum : row) sum = splat(0);
  for (int64_t step = 0; step < rows.steps; ++step, ahead += lines * LINE) {
    fetch(ahead, lines);
    const char* digits = rows.at(group, step, 0, 0);
    for (int64_t at = step == rows.steps - 1 ? rows.again : 0; at < LINE; at += 4, weight += 4 * OUTPUTS) {
      for (int row = 0; row < 2 * ROWS; ++row) {
        int32_t four;
        std::memcpy(&four, digits + row * LINE + at, 4);
        for (int v = 0; v < VECTORS; ++v)
          sums[row][v] = _mm512_dpbusd_epi32(sums[row][v], load(weight + v * LANES * 4), splat(four));
      }
    }
  }
  for (int row = 0; row < 2 * ROWS; ++row)
    for (int v = 0; v < VECTORS; ++v) store(static_cast<int32_t*>(to) + row * OUTPUTS + v * LANES, sums[row][v]);
}

using Multiply = decltype(&by_vectors<1>);
constexpr Multiply BY_VECTORS[FEW] = {by_vectors<1>, by_vectors<2>, by_vectors<3>, by_vectors<4>};

template <typename T>
void finish(const int32_t* sums, const Tiled<T>& layer, const Rounded& rows, int64_t first, int64_t row, int64_t count,
            T* to) {
  const Outputs<T> outputs(layer.outputs, first, layer.bias);
  T scales[OUTPUTS] = {};
  std::memcpy(scales, layer.scales + first, outputs.count * sizeof(T));
  for (int64_t one = 0; one < count; ++one) {
    const auto& total = rows.totals[row + one];
    outputs.write(to, row + one, [&](int64_t at, Floats bias) {
      const Ints high = _mm512_sub_epi32(load(sums + one * OUTPUTS + at), splat(OFFSET * total[0]));
      const int32_t* under = sums + (rows.digits.each + one) * OUTPUTS + at;
      const Ints low = _mm512_sub_epi32(load(under), splat(OFFSET * total[1]));
      const Floats whole = fused(converted(high), splat(256.0f), converted(low));
      return fused(whole, times(load_widened(scales + at), splat(rows.scales[row + one])), bias);
    });
  }
}

}  // namespace

template <typename T> void multiply_tiled(const Tiled<T>& layer, const T* input, int64_t rows, T* to) {
  const bool tiled = rows > FEW && layer.inputs >= LINE && has_tiles();
  const int64_t groups = (rows + (tiled ? TILE : FEW) - 1) / (tiled ? TILE : FEW), each = (rows + groups - 1) / groups;
  const int64_t steps = (layer.inputs + LINE - 1) / LINE;
  const Rounded found{Planes(groups, 2, each, steps, steps * LINE - layer.inputs),
                      std::unique_ptr<float[]>(new float[rows]), std::unique_ptr<int32_t[][2]>(new int32_t[rows][2])};
  const int64_t grain = std::max<int64_t>(1, WORTH_A_THREAD / 4 / layer.inputs);
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) round_row(input + row * layer.given, layer, row, found);
  });
  const Multiply by = tiled ? multiply_by_tiles<true, 2> : BY_VECTORS[each - 1];
  for_blocks(
      layer.weight, layer.inputs * OUTPUTS, (layer.outputs + OUTPUTS - 1) / OUTPUTS, found.digits, groups, tiled,
      0, as_it_lies,
      [&](const uint8_t* block, int64_t group, int32_t* sums, const uint8_t* ahead, int64_t lines) {
        by(block, found.digits, group, sums, ahead, lines);
      },
      [&](const int32_t* sums, int64_t group, int64_t first) {
        finish(sums, layer, found, first, group * each, std::min(each, rows - group * each), to);
      });
}

template void multiply_tiled(const Tiled<float>&, const float*, int64_t, float*);
template void multiply_tiled(const Tiled<uint16_t>&, const uint16_t*, int64_t, uint16_t*);

}  // namespace lmkit

#endif
