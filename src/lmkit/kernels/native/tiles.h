// Products of rows with weights in 8 and 4 bits on processors with AMX, by tiles of whole numbers and of bfloat16.
#pragma once
#include <cstdint>

namespace lmkit {

#if defined(__AMX_INT8__)

// The longest rows: beyond, a sum of 255 * 128 for each number need not fit into 32 bits.
constexpr int64_t LONGEST = 1 << 16;

// A layer as `linear.cpp` describes it: blocks of 32 outputs, rows padded to `inputs`, a multiple of 32.
template <typename T> struct Tiled {
  const uint8_t* weight;
  const T* scales;
  const T* bias;
  int64_t given, inputs, outputs;  // numbers of a row as it comes, and padded
};

template <typename T> void multiply_tiled(const Tiled<T>& layer, const T* input, int64_t rows, T* to);

// How many rows make it worth to widen weights in 4 bits to bfloat16, block by block: then rows are not rounded.
constexpr int64_t MANY = 8;
void multiply_widened(const Tiled<uint16_t>& layer, const uint16_t* input, int64_t rows, uint16_t* to);

#endif

}  // namespace lmkit
