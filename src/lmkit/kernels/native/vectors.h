// The instructions that kernels are written in, by one name on each processor: 16 lanes with AVX512-VNNI, 8 with AVX2.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace lmkit {

#if defined(__AVX512VNNI__)

constexpr int LANES = 16;
using Ints = __m512i;
using Floats = __m512;

inline Ints load(const void* from) { return _mm512_loadu_si512(from); }
inline Floats load_floats(const float* from) { return _mm512_loadu_ps(from); }
inline void store(void* to, Ints value) { _mm512_storeu_si512(to, value); }
inline void store(float* to, Floats value) { _mm512_storeu_ps(to, value); }
inline Ints splat(int32_t value) { return _mm512_set1_epi32(value); }
inline Floats splat(float value) { return _mm512_set1_ps(value); }
inline Ints both(Ints a, Ints b) { return _mm512_and_si512(a, b); }
inline Ints either(Ints a, Ints b) { return _mm512_or_si512(a, b); }
template <int N> inline Ints left(Ints a) { return _mm512_slli_epi32(a, N); }
template <int N> inline Ints right(Ints a) { return _mm512_srli_epi32(a, N); }
inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Ints greater(Ints a, Ints b) { return _mm512_max_epi32(a, b); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats times(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats fused(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats as_floats(Ints a) { return _mm512_castsi512_ps(a); }
inline Ints as_ints(Floats a) { return _mm512_castps_si512(a); }
inline Floats converted(Ints a) { return _mm512_cvtepi32_ps(a); }
inline Ints rounded(Floats a) { return _mm512_cvtps_epi32(a); }
inline int32_t sum(Ints a) { return _mm512_reduce_add_epi32(a); }
inline int32_t greatest(Ints a) { return _mm512_reduce_max_epi32(a); }
inline Ints widened(const uint16_t* from) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
// Numbers of -128 to 127, as bytes.
inline void store_bytes(int8_t* to, Ints a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(a));
}
// The first of two neighbours of each pair, and the second.
inline Floats firsts(Floats a, Floats b) {
  const Ints at = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  return _mm512_permutex2var_ps(a, at, b);
}
inline Floats seconds(Floats a, Floats b) {
  const Ints at = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  return _mm512_permutex2var_ps(a, at, b);
}

#else

constexpr int LANES = 8;
using Ints = __m256i;
using Floats = __m256;

inline Ints load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
inline Floats load_floats(const float* from) { return _mm256_loadu_ps(from); }
inline void store(void* to, Ints value) { _mm256_storeu_si256(static_cast<__m256i*>(to), value); }
inline void store(float* to, Floats value) { _mm256_storeu_ps(to, value); }
inline Ints splat(int32_t value) { return _mm256_set1_epi32(value); }
inline Floats splat(float value) { return _mm256_set1_ps(value); }
inline Ints both(Ints a, Ints b) { return _mm256_and_si256(a, b); }
inline Ints either(Ints a, Ints b) { return _mm256_or_si256(a, b); }
template <int N> inline Ints left(Ints a) { return _mm256_slli_epi32(a, N); }
template <int N> inline Ints right(Ints a) { return _mm256_srli_epi32(a, N); }
inline Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
inline Ints greater(Ints a, Ints b) { return _mm256_max_epi32(a, b); }
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats times(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats fused(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats as_floats(Ints a) { return _mm256_castsi256_ps(a); }
inline Ints as_ints(Floats a) { return _mm256_castps_si256(a); }
inline Floats converted(Ints a) { return _mm256_cvtepi32_ps(a); }
inline Ints rounded(Floats a) { return _mm256_cvtps_epi32(a); }
inline int32_t sum(Ints a) {
  __m128i half = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}
inline int32_t greatest(Ints a) {
  __m128i half = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}
inline Ints widened(const uint16_t* from) {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
// Numbers of -128 to 127, as bytes.
inline void store_bytes(int8_t* to, Ints a) {
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(words, words));
}
// The first of two neighbours of each pair, and the second.
inline Floats firsts(Floats a, Floats b) {
  return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(_mm256_shuffle_ps(a, b, 0x88)), 0xd8));
}
inline Floats seconds(Floats a, Floats b) {
  return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(_mm256_shuffle_ps(a, b, 0xdd)), 0xd8));
}

#endif

// One number of a model's dtype: float, or bfloat16 as its bits.
inline float widened(float value) { return value; }
inline float widened(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float found;
  std::memcpy(&found, &bits, 4);
  return found;
}
inline void narrow(float value, float& to) { to = value; }
inline void narrow(float value, uint16_t& to) {  // to the nearest, ties to even; NaN stays one
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to = static_cast<uint16_t>(value == value ? even : 0x7fc0);
}
// As many of them as there are lanes.
inline Floats load_widened(const float* from) { return load_floats(from); }
inline Floats load_widened(const uint16_t* from) { return as_floats(left<16>(widened(from))); }

}  // namespace lmkit
