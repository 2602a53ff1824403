// AVX-512 (F, BW, VL, DQ): 16 fp32 lanes. Included inside a namespace, after scalar.inl.

inline __m512 widen(const float* p) { return _mm512_loadu_ps(p); }
inline __m512 widen(const f16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline __m512 widen(const bf16* p) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}
inline void narrow(float* p, __m512 v) { _mm512_storeu_ps(p, v); }
inline void narrow(f16* p, __m512 v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
inline void narrow(bf16* p, __m512 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i top = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff)), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  top = _mm512_mask_mov_epi32(top, nan, _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(top));
}

template <class T>
struct Vec {
  using V = __m512;
  static constexpr int kLanes = 16;
  static V load(const T* p) { return widen(p); }
  static V loadf(const float* p) { return _mm512_loadu_ps(p); }
  static void storef(float* p, V v) { _mm512_storeu_ps(p, v); }
  static void store(T* p, V v) { narrow(p, v); }
  static V bcast(float s) { return _mm512_set1_ps(s); }
  static V fma(V a, V x, V y) { return _mm512_fmadd_ps(x, y, a); }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
};

template <class T>
struct Dot {
  using Acc = __m512;
  using Op = __m512;
  static constexpr int kStep = 16;
  static Op load(const T* p) { return widen(p); }
  static Acc zero() { return _mm512_setzero_ps(); }
  static Acc fma(Acc a, Op x, Op y) { return _mm512_fmadd_ps(x, y, a); }
  static float sum(Acc a) { return _mm512_reduce_add_ps(a); }
};
