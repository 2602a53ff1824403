// The C ABI of the checkpoint converter. Python's face of it: vllm_loraserve/adapters/native_rows.py.
#pragma once
#include <cstdint>

#define LSC_API extern "C" __attribute__((visibility("default")))

constexpr int LSC_ABI = 1;

// Instruction sets; BEST is the best that this CPU runs.
enum lsc_isa : int32_t { LSC_BEST = 0, LSC_GENERIC = 1, LSC_AVX2 = 2, LSC_AVX512 = 3 };
enum lsc_dtype : int32_t { LSC_BF16 = 0, LSC_FP16 = 1, LSC_FP32 = 2 };

// A matrix of rows x width elements: element (r, c) is at source[r * row_stride + c * column_stride], and one of the
// strides is 1. Row r goes to target[(r / page_rows) * page_stride + (r % page_rows) * width]. Strides in elements.
struct lsc_rows {
  const void* source;
  void* target;
  int64_t rows, width;
  int64_t row_stride, column_stride;
  int64_t page_rows, page_stride;
  float scale;
  int32_t source_dtype, target_dtype;
};

LSC_API int lsc_abi(void);
// Casts the matrix times scale (in fp32, rounded once) into pages. 0; 1: it is written, and holds a NaN or an Inf; -1:
// unknown dtype, or neither stride is 1; -2: this CPU lacks the instruction set.
LSC_API int lsc_write_rows(const lsc_rows* job, int isa);
