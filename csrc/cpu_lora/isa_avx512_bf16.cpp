// AVX-512 with vdpbf16ps: a bfloat16 dot product of 32 elements per instruction, accumulated in fp32.
#include <immintrin.h>

#include "kernels.h"

namespace lsc {
namespace avx512_bf16 {
#include "scalar.inl"
//
#include "avx512.inl"

template <>
struct Dot<bf16> {
  using Acc = __m512;
  using Op = __m512bh;
  static constexpr int kStep = 32;
  static Op load(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static Acc zero() { return _mm512_setzero_ps(); }
  static Acc fma(Acc a, Op x, Op y) { return _mm512_dpbf16_ps(a, x, y); }
  static float sum(Acc a) { return _mm512_reduce_add_ps(a); }
};

#include "tiles.inl"
}  // namespace avx512_bf16

const Kernels& avx512_bf16_kernels() {
  using namespace avx512_bf16;
  static const Kernels kernels = {"avx512_bf16",
                                  {shrink<bf16>, shrink<f16>, shrink<float>},
                                  {expand<bf16>, expand<f16>, expand<float>}};
  return kernels;
}
}  // namespace lsc
