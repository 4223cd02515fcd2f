// What kernels of attention have in common.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

#include "vectors.h"

namespace lmkit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Given = std::optional<Tensor>;

constexpr float HIDDEN = -1e30f;  // a mask that adds this or less hides

#if defined(__AVX512VNNI__)

inline Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }  // b where one is NaN
inline float largest(Floats a) { return _mm512_reduce_max_ps(a); }
inline float sum(Floats a) { return _mm512_reduce_add_ps(a); }
// The sums of four.
inline __m128 sums(Floats a, Floats b, Floats c, Floats d) {
  const Floats ab = add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const Floats cd = add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const Floats all = add(_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

#else

inline Floats larger(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline float largest(Floats a) {
  float each[LANES];
  store(each, a);
  return *std::max_element(each, each + LANES);
}
inline __m128 sums(Floats a, Floats b, Floats c, Floats d) {
  const Floats all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}
inline float sum(Floats a) { return _mm_cvtss_f32(sums(a, a, a, a)); }

#endif

// For numbers of at most 0, or NaN; what is below -87 counts as that.
inline Floats exponential(Floats x) {
  x = larger(splat(-87.0f), x);
  const Ints power = rounded(times(x, splat(1.44269504f)));
  const Floats whole = converted(power);
  const Floats rest = fused(whole, splat(2.12194440e-4f), fused(whole, splat(-0.693359375f), x));
  Floats sum = splat(1.9875691500e-4f);
  for (const float factor : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    sum = fused(sum, rest, splat(factor));
  sum = fused(times(sum, rest), rest, add(rest, splat(1.0f)));
  return times(sum, as_floats(left<23>(add(power, splat(127)))));
}

// The same tensor, or a copy whose numbers lie side by side.
inline Tensor dense(const Tensor& given) {
  return given.size(given.dim() - 1) == 1 || given.stride(given.dim() - 1) == 1 ? given : torch::stable::contiguous(given);
}

// What is added or hides, of a dtype that is read here; for so many heads and columns, or for all of them alike.
inline Given dense(const Given& given, const Tensor& query, int64_t heads, int64_t columns) {
  if (!given) return given;
  const auto fits = [&](int64_t dim, int64_t most) { return given->size(dim) == 1 || given->size(dim) == most; };
  STD_TORCH_CHECK(given->dim() == 4 && fits(0, query.size(0)) && fits(1, heads) && fits(2, query.size(2)) &&
                      given->size(3) == columns, "the mask or bias has another shape");
  const ScalarType dtype = given->scalar_type();
  const bool read = dtype == ScalarType::Bool || dtype == ScalarType::Float || dtype == ScalarType::BFloat16;
  return dense(read ? *given : torch::stable::to(*given, ScalarType::Float));
}

}  // namespace lmkit
