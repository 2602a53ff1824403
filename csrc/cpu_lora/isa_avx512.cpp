// AVX-512 without its bfloat16 instructions.
#include <immintrin.h>

#include "kernels.h"

namespace lsc {
namespace avx512 {
#include "scalar.inl"
//
#include "avx512.inl"
//
#include "tiles.inl"
}  // namespace avx512

const Kernels& avx512_kernels() {
  using namespace avx512;
  static const Kernels kernels = {"avx512",
                                  {shrink<bf16>, shrink<f16>, shrink<float>},
                                  {expand<bf16>, expand<f16>, expand<float>}};
  return kernels;
}
}  // namespace lsc
