// AVX2 + FMA + F16C: 8 fp32 lanes.
#include <immintrin.h>

#include "kernels.h"

namespace lsc {
namespace avx2 {
#include "scalar.inl"

inline __m256 widen(const float* p) { return _mm256_loadu_ps(p); }
inline __m256 widen(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline __m256 widen(const bf16* p) {
  const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
}
inline void narrow(float* p, __m256 v) { _mm256_storeu_ps(p, v); }
inline void narrow(f16* p, __m256 v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
inline void narrow(bf16* p, __m256 v) {
  float lanes[8];
  _mm256_storeu_ps(lanes, v);
  for (int i = 0; i < 8; ++i) p[i] = from_float<bf16>(lanes[i]);
}

template <class T>
struct Vec {
  using V = __m256;
  static constexpr int kLanes = 8;
  static V load(const T* p) { return widen(p); }
  static V loadf(const float* p) { return _mm256_loadu_ps(p); }
  static void storef(float* p, V v) { _mm256_storeu_ps(p, v); }
  static void store(T* p, V v) { narrow(p, v); }
  static V bcast(float s) { return _mm256_set1_ps(s); }
  static V fma(V a, V x, V y) { return _mm256_fmadd_ps(x, y, a); }
  static V add(V a, V b) { return _mm256_add_ps(a, b); }
};

template <class T>
struct Dot {
  using Acc = __m256;
  using Op = __m256;
  static constexpr int kStep = 8;
  static Op load(const T* p) { return widen(p); }
  static Acc zero() { return _mm256_setzero_ps(); }
  static Acc fma(Acc a, Op x, Op y) { return _mm256_fmadd_ps(x, y, a); }
  static float sum(Acc a) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
};

#include "tiles.inl"
}  // namespace avx2

const Kernels& avx2_kernels() {
  using namespace avx2;
  static const Kernels kernels = {"avx2",
                                  {shrink<bf16>, shrink<f16>, shrink<float>},
                                  {expand<bf16>, expand<f16>, expand<float>}};
  return kernels;
}
}  // namespace lsc
