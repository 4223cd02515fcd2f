// Rows are rounded to 16 bits, each with one scale, and written as two digits of 8 bits: so a product is two sums of
// whole numbers, which are exact, whatever multiplies them. AMX takes as long for both as for bfloat16, and reads half.
#include "tiles.h"

#if defined(__AMX_INT8__)

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <optional>

#include "amx.h"
#include "vectors.h"

namespace lmkit {

namespace {

constexpr int64_t BLOCK = 32, VECTORS = BLOCK / LANES;
constexpr int64_t STEP = 64;               // numbers of a row in a tile
constexpr int64_t FEW = 4;                 // rows that vectors multiply faster
constexpr int64_t STEP_BYTES = BLOCK * STEP, LINE = 64;
constexpr int64_t CACHED = 3 << 17;        // bytes of rows that stay in a core's cache beside a block
constexpr int64_t WORTH = 1 << 17;         // multiplications that make it worth to wake a thread
constexpr int32_t MOST = 127 * 256;        // the largest magnitude of a rounded number
constexpr int32_t OFFSET = 128;            // what weights have been moved by

// Rounded rows, in tiles of as many rows each; of each step the tile's high digits, and then its low ones. The last
// step reads whole 64 numbers too: where rows have 32 fewer, the last of the step before again, against zeros.
struct Rounded {
  int64_t each, steps, again;
  std::unique_ptr<int8_t[]> held;
  int8_t* digits;
  std::unique_ptr<float[]> scales;
  std::unique_ptr<int32_t[][2]> totals;  // of high and of low digits

  Rounded(int64_t rows, int64_t inputs, int64_t most)
      : each((rows + tiles(rows, most) - 1) / tiles(rows, most)), steps((inputs + STEP - 1) / STEP),
        again(steps * STEP - inputs), held(new int8_t[tiles(rows, most) * bytes() + LINE]),
        digits(held.get() + (LINE - reinterpret_cast<uintptr_t>(held.get()) % LINE)), scales(new float[rows]),
        totals(new int32_t[rows][2]) {}
  static int64_t tiles(int64_t rows, int64_t most) { return (rows + most - 1) / most; }
  int64_t bytes() const { return steps * each * STEP * 2; }  // of a tile
};

// 16 numbers of a row, or what is left of it and zeros.
template <typename T> Floats some(const T* row, int64_t first, int64_t count) {
  if (count - first >= LANES) return load_widened(row + first);
  T padded[LANES] = {};
  if (count > first) std::memcpy(padded, row + first, (count - first) * sizeof(T));
  return load_widened(padded);
}

template <typename T> void round_row(const T* row, const Tiled<T>& layer, int64_t number, Rounded& to) {
  const int64_t count = layer.given;
  Ints most = splat(0);
  for (int64_t first = 0; first < count; first += LANES)
    most = greater(most, both(as_ints(some(row, first, count)), splat(0x7fffffff)));
  const int32_t bits = greatest(most);
  float magnitude;
  std::memcpy(&magnitude, &bits, 4);
  const bool finite = bits < 0x7f800000;
  const Floats inverse = splat(finite && magnitude > 1e-34f ? MOST / magnitude : 0);
  int8_t* high = to.digits + number / to.each * to.bytes() + number % to.each * STEP;
  Ints highs = splat(0), lows = splat(0);
  int8_t* last = high + (to.steps - 1) * to.each * STEP * 2;
  std::memset(last, 0, to.again);
  std::memset(last + to.each * STEP, 0, to.again);
  for (int64_t first = 0; first < layer.inputs; first += LANES) {
    const Ints whole = finite ? rounded(times(some(row, first, count), inverse)) : splat(0);
    const Ints above = _mm512_srai_epi32(add(whole, splat(128)), 8);
    const Ints below = _mm512_sub_epi32(whole, left<8>(above));
    const int64_t step = first / STEP, at = first % STEP + (step == to.steps - 1 ? to.again : 0);
    int8_t* there = high + step * to.each * STEP * 2 + at;
    store_bytes(there, above);
    store_bytes(there + to.each * STEP, below);
    highs = add(highs, above);
    lows = add(lows, below);
  }
  to.scales[number] = finite ? magnitude / MOST : std::numeric_limits<float>::quiet_NaN();
  to.totals[number][0] = sum(highs);
  to.totals[number][1] = sum(lows);
}

// Where a step's weights begin.
const uint8_t* behind(const uint8_t* weight, const Rounded& rows, int64_t step) {
  return weight + step * STEP_BYTES - (step == rows.steps - 1 ? rows.again * BLOCK : 0);
}

inline void fetch(const uint8_t* from, int64_t lines) {
  for (int64_t line = 0; line < lines; ++line)
    _mm_prefetch(reinterpret_cast<const char*>(from + line * LINE), _MM_HINT_T1);
}

// Multiply a few rows with a block, by vectors; `to` gets all high sums, and then all low ones.
template <int ROWS>
void by_vectors(const uint8_t* weight, const int8_t* digits, const Rounded& rows, int32_t* to, const uint8_t* ahead,
                int64_t lines) {
  Ints sums[2 * ROWS][VECTORS];
  for (auto& row : sums)
    for (auto& sum : row) sum = splat(0);
  for (int64_t step = 0; step < rows.steps; ++step, digits += 2 * ROWS * STEP, ahead += lines * LINE) {
    fetch(ahead, lines);
    for (int64_t at = step == rows.steps - 1 ? rows.again : 0; at < STEP; at += 4, weight += 4 * BLOCK) {
      for (int row = 0; row < 2 * ROWS; ++row) {
        int32_t four;
        std::memcpy(&four, digits + row * STEP + at, 4);
        for (int v = 0; v < VECTORS; ++v)
          sums[row][v] = _mm512_dpbusd_epi32(sums[row][v], load(weight + v * LANES * 4), splat(four));
      }
    }
  }
  for (int row = 0; row < 2 * ROWS; ++row)
    for (int v = 0; v < VECTORS; ++v) store(to + row * BLOCK + v * LANES, sums[row][v]);
}

using Multiply = decltype(&by_vectors<1>);
constexpr Multiply BY_VECTORS[FEW] = {by_vectors<1>, by_vectors<2>, by_vectors<3>, by_vectors<4>};

// The same for a tile of rows. Tiles 0 to 3 are sums, 4 and 5 digits, 6 and 7 weights.
void by_tiles(const uint8_t* weight, const int8_t* digits, const Rounded& rows, int32_t* to, const uint8_t* ahead,
              int64_t lines) {
  const int64_t half = rows.each * STEP;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t step = 0; step < rows.steps; ++step, digits += 2 * half, ahead += lines * LINE) {
    fetch(ahead, lines);
    const uint8_t* from = behind(weight, rows, step);
    _tile_loadd(4, digits, STEP);
    _tile_loadd(6, from, 4 * BLOCK);
    _tile_loadd(7, from + LANES * 4, 4 * BLOCK);
    _tile_loadd(5, digits + half, STEP);
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    _tile_dpbsud(2, 5, 6);
    _tile_dpbsud(3, 5, 7);
  }
  constexpr int64_t stride = BLOCK * sizeof(int32_t);
  _tile_stored(0, to, stride);
  _tile_stored(1, to + LANES, stride);
  _tile_stored(2, to + rows.each * BLOCK, stride);
  _tile_stored(3, to + rows.each * BLOCK + LANES, stride);
}

inline void store_narrow(float* to, Floats value) { store(to, value); }
inline void store_narrow(uint16_t* to, Floats value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(value));
}

template <typename T>
void finish(const int32_t* sums, int64_t each, const Tiled<T>& layer, const Rounded& rows, int64_t first, int64_t row,
            int64_t count, T* to) {
  T scales[BLOCK] = {}, biases[BLOCK] = {}, found[BLOCK];
  const int64_t outputs = std::min(BLOCK, layer.outputs - first);
  std::memcpy(scales, layer.scales + first, outputs * sizeof(T));
  if (layer.bias) std::memcpy(biases, layer.bias + first, outputs * sizeof(T));
  for (int64_t one = 0; one < count; ++one) {
    const auto& total = rows.totals[row + one];
    T* there = to + (row + one) * layer.outputs + first;
    T* out = outputs == BLOCK ? there : found;
    for (int64_t at = 0; at < BLOCK; at += LANES) {
      const Ints high = _mm512_sub_epi32(load(sums + one * BLOCK + at), splat(OFFSET * total[0]));
      const Ints low = _mm512_sub_epi32(load(sums + (each + one) * BLOCK + at), splat(OFFSET * total[1]));
      const Floats whole = fused(converted(high), splat(256.0f), converted(low));
      const Floats by = times(load_widened(scales + at), splat(rows.scales[row + one]));
      store_narrow(out + at, fused(whole, by, load_widened(biases + at)));
    }
    if (out == found) std::memcpy(there, found, outputs * sizeof(T));
  }
}

}  // namespace

template <typename T> void multiply_tiled(const Tiled<T>& layer, const T* input, int64_t rows, T* to) {
  const bool tiled = rows > FEW && layer.inputs >= STEP && has_tiles();
  Rounded found(rows, layer.inputs, tiled ? TILE : FEW);
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, WORTH / 4 / layer.inputs), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) round_row(input + row * layer.given, layer, row, found);
  });
  const int64_t size = layer.inputs * BLOCK, blocks = (layer.outputs + BLOCK - 1) / BLOCK;
  const int64_t tiles = (rows + found.each - 1) / found.each;
  const int64_t most = std::max<int64_t>(1, CACHED / found.bytes()), chunks = (tiles + most - 1) / most;
  const int64_t grain = std::max<int64_t>(1, WORTH / (size * std::min(rows, most * found.each)));
  torch::stable::parallel_for(0, chunks * blocks, grain, [&](int64_t begin, int64_t end) {
    alignas(64) int32_t sums[2 * TILE * BLOCK];
    std::optional<Tiles> tiles_of_thread;
    if (tiled) tiles_of_thread.emplace(found.each);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t number = task % blocks, first = task / blocks * most, count = std::min(most, tiles - first);
      const uint8_t* weight = layer.weight + number * size;
      const int64_t lines = number + 1 < blocks ? (size / LINE / found.steps + count - 1) / count : 0;
      for (int64_t tile = first; tile < first + count; ++tile) {
        const uint8_t* ahead = weight + size + (tile - first) * lines * found.steps * LINE;
        const bool inside = ahead + lines * found.steps * LINE <= weight + 2 * size;
        (tiled ? by_tiles : BY_VECTORS[found.each - 1])(weight, found.digits + tile * found.bytes(), found, sums, ahead,
                                                        inside ? lines : 0);
        const int64_t row = tile * found.each;
        finish(sums, found.each, layer, found, number * BLOCK, row, std::min(found.each, rows - row), to);
      }
    }
  });
}

template void multiply_tiled(const Tiled<float>&, const float*, int64_t, float*);
template void multiply_tiled(const Tiled<uint16_t>&, const uint16_t*, int64_t, uint16_t*);

}  // namespace lmkit

#endif
