// Products of rows with weights in 8 bits on processors with AMX, which multiplies tiles of whole numbers.
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

#endif

}  // namespace lmkit
