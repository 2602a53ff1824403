// One instruction set's converter; the including file names its namespace.
#include <algorithm>
#include <cstring>
#include <type_traits>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "convert.h"
#include "isa.h"

namespace lsc {
namespace LSC_ISA {
namespace {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

inline float widen(float x) { return x; }
inline float widen(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float out;
  memcpy(&out, &bits, 4);
  return out;
}
inline float widen(fp16 x) {
  _Float16 half;
  memcpy(&half, &x.bits, 2);
  return float(half);
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

// Rounds to nearest even; says whether the result is a NaN or an Inf.
inline bool narrow(float x, float& out) {
  out = x;
  return (bits_of(x) & 0x7F800000u) == 0x7F800000u;
}
inline bool narrow(float x, bf16& out) {
  uint32_t bits = bits_of(x);
  // Rounding may carry a NaN's payload away; it stays a NaN.
  uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  out.bits = uint16_t(nan ? 0x7FC0u : rounded);
  return (out.bits & 0x7F80u) == 0x7F80u;
}
inline bool narrow(float x, fp16& out) {
  _Float16 half = _Float16(x);
  memcpy(&out.bits, &half, 2);
  return (out.bits & 0x7C00u) == 0x7C00u;
}

template <class S, class D>
inline bool line(const S* __restrict source, D* __restrict target, int64_t count, float scale) {
  uint32_t bad = 0;
  for (int64_t i = 0; i < count; ++i) bad |= uint32_t(narrow(widen(source[i]) * scale, target[i]));
  return bad != 0;
}

#if defined(__F16C__)
// Compilers do not vectorise the casts from and to fp16.
constexpr int64_t BLOCK = 64;

inline void widen_block(const fp16* source, float* out) {
  for (int64_t i = 0; i < BLOCK; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i))));
}
inline bool narrow_block(const float* source, fp16* target) {
  for (int64_t i = 0; i < BLOCK; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(source + i), _MM_FROUND_TO_NEAREST_INT));
  uint32_t bad = 0;
  for (int64_t i = 0; i < BLOCK; ++i) bad |= uint32_t((target[i].bits & 0x7C00u) == 0x7C00u);
  return bad != 0;
}

template <class S, class D>
inline bool half_line(const S* source, D* target, int64_t count, float scale) {
  alignas(32) float wide[BLOCK];
  bool bad = false;
  int64_t i = 0;
  for (; i + BLOCK <= count; i += BLOCK) {
    if constexpr (std::is_same_v<S, fp16>)
      widen_block(source + i, wide);
    else
      for (int64_t k = 0; k < BLOCK; ++k) wide[k] = widen(source[i + k]);
    if constexpr (std::is_same_v<D, fp16>) {
      for (int64_t k = 0; k < BLOCK; ++k) wide[k] *= scale;
      bad |= narrow_block(wide, target + i);
    } else {
      bad |= line(wide, target + i, BLOCK, scale);
    }
  }
  return bad | line(source + i, target + i, count - i, scale);
}
template <class S, class D>
inline bool cast(const S* source, D* target, int64_t count, float scale) {
  if constexpr (std::is_same_v<S, fp16> || std::is_same_v<D, fp16>)
    return half_line(source, target, count, scale);
  else
    return line(source, target, count, scale);
}
#else
template <class S, class D>
inline bool cast(const S* source, D* target, int64_t count, float scale) {
  return line(source, target, count, scale);
}
#endif

// ---- a tile, transposed: target row r takes element r of each of the tile's lines ----

constexpr int LINES = 64, LENGTH = 64;

template <class D>
inline void scatter(const D (*tile)[LENGTH], int64_t r, int64_t from, int64_t lines, D* target) {
  for (int64_t j = from; j < lines; ++j) target[j] = tile[j][r];
}

typedef uint16_t half8 __attribute__((vector_size(16)));

inline half8 low(half8 a, half8 b) { return __builtin_shuffle(a, b, half8{0, 8, 1, 9, 2, 10, 3, 11}); }
inline half8 high(half8 a, half8 b) { return __builtin_shuffle(a, b, half8{4, 12, 5, 13, 6, 14, 7, 15}); }

// 8 x 8 elements of 16 bits: lines in, columns out.
inline void transpose8(half8 (&x)[8]) {
  half8 y[8];
  for (int step = 0; step < 3; ++step) {
    for (int i = 0; i < 4; ++i) {
      y[2 * i] = low(x[i], x[i + 4]);
      y[2 * i + 1] = high(x[i], x[i + 4]);
    }
    memcpy(x, y, sizeof x);
  }
}

template <class S, class D>
bool transposed(const lsc_rows& job) {
  const S* source = static_cast<const S*>(job.source);
  D* target = static_cast<D*>(job.target);
  bool bad = false;
  alignas(64) D tile[LINES][LENGTH];
  for (int64_t r0 = 0; r0 < job.rows; r0 += LENGTH) {
    int64_t rows = std::min<int64_t>(LENGTH, job.rows - r0);
    for (int64_t c0 = 0; c0 < job.width; c0 += LINES) {
      int64_t lines = std::min<int64_t>(LINES, job.width - c0);
      for (int64_t j = 0; j < lines; ++j)
        bad |= cast(source + r0 * job.row_stride + (c0 + j) * job.column_stride, tile[j], rows, job.scale);
      int64_t r = 0;
      auto row = [&](int64_t at) {
        at += r0;
        return target + (at / job.page_rows) * job.page_stride + (at % job.page_rows) * job.width + c0;
      };
      if constexpr (sizeof(D) == 2)
        for (; r + 8 <= rows; r += 8) {
          D* into[8];
          for (int i = 0; i < 8; ++i) into[i] = row(r + i);
          int64_t j = 0;
          for (; j + 8 <= lines; j += 8) {
            half8 x[8];
            for (int i = 0; i < 8; ++i) memcpy(&x[i], &tile[j + i][r], 16);
            transpose8(x);
            for (int i = 0; i < 8; ++i) memcpy(into[i] + j, &x[i], 16);
          }
          for (int i = 0; i < 8; ++i) scatter(tile, r + i, j, lines, into[i]);
        }
      for (; r < rows; ++r) scatter(tile, r, 0, lines, row(r));
    }
  }
  return bad;
}

template <class S, class D>
int write(const lsc_rows& job) {
  if (job.column_stride != 1) {
    if (job.row_stride != 1) return -1;
    return transposed<S, D>(job);
  }
  const S* source = static_cast<const S*>(job.source);
  bool bad = false;
  for (int64_t r = 0; r < job.rows; ++r)
    bad |= cast(source + r * job.row_stride,
                static_cast<D*>(job.target) + (r / job.page_rows) * job.page_stride + (r % job.page_rows) * job.width,
                job.width, job.scale);
  return bad;
}

template <class S>
int into(const lsc_rows& job) {
  switch (job.target_dtype) {
    case LSC_BF16: return write<S, bf16>(job);
    case LSC_FP16: return write<S, fp16>(job);
    case LSC_FP32: return write<S, float>(job);
  }
  return -1;
}

}  // namespace

int write_rows(const lsc_rows& job) {
  switch (job.source_dtype) {
    case LSC_BF16: return into<bf16>(job);
    case LSC_FP16: return into<fp16>(job);
    case LSC_FP32: return into<float>(job);
  }
  return -1;
}

}  // namespace LSC_ISA
}  // namespace lsc
