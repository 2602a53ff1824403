// What one instruction set offers to linear.cpp: two functions for each dtype.
#pragma once
#include <cstdint>

namespace lsc {

// h[m][i] = dot(x[m], a + i * in_size) for m < tokens, i < rows. x[m] points at a token's row. h is fp32.
using ShrinkFn = void (*)(const void* const* x, int tokens, const void* a, int rows, int64_t in_size, float* h,
                          int64_t h_stride);

constexpr int kMaxColumns = 512;  // columns of one expand call
constexpr int kTokenTile = 4;

// y[m][n] = (add ? y[m][n] : 0) + sum over r < rank of h[m * h_stride + r] * b_row(r)[n], for n < columns <= kMaxColumns.
// b_row(r) = pages[r / page_rows] + (r % page_rows) * row_stride elements, pages already moved to the first column.
using ExpandFn = void (*)(void* const* y, int tokens, const float* h, int64_t h_stride, const void* const* pages,
                          int page_rows, int rank, int64_t row_stride, int columns, int add);

struct Kernels {
  const char* name;
  ShrinkFn shrink[3];  // by lsc_dtype
  ExpandFn expand[3];
};

const Kernels& generic_kernels();
#ifdef LORASERVE_X86
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& avx512_bf16_kernels();
#endif

}  // namespace lsc
