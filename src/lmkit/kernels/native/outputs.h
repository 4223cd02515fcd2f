// What is written of a product with a block of 32 outputs, or with what is left of a layer.
#pragma once

#if defined(__AVX512BF16__)

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "vectors.h"

namespace lmkit {

inline void store_narrow(float* to, Floats value) { store(to, value); }
inline void store_narrow(uint16_t* to, Floats value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(value));
}

template <typename T> struct Outputs {
  static constexpr int64_t MOST = 32;
  int64_t all, first, count;
  T biases[MOST] = {};

  Outputs(int64_t all, int64_t first, const T* bias) : all(all), first(first), count(std::min(MOST, all - first)) {
    if (bias) std::memcpy(biases, bias + first, count * sizeof(T));
  }
  // Write a row's outputs, which `value` gives 16 at a time, with the bias added.
  template <typename Value> void write(T* to, int64_t row, Value value) const {
    T* there = to + row * all + first;
    T some[MOST];
    T* out = count == MOST ? there : some;
    for (int64_t at = 0; at < MOST; at += LANES) store_narrow(out + at, value(at, load_widened(biases + at)));
    if (out == some) std::memcpy(there, some, count * sizeof(T));
  }
};

}  // namespace lmkit

#endif
