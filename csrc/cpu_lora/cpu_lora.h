// The C ABI of the CPU LoRA library. Python's face of it: vllm_loraserve/kernels/cpu_native.py.
//
// One call does the LoRA of one linear layer for all adapters of a batch:
//
//     y[t, slice s] (+)= x[t] @ A_s^T @ B_s      for every token t of a group, at the rank of its adapter in slice s
//
// A and B are rank rows in pages (vllm_loraserve/kernels/paged.py has the layout); nothing beyond a slice's rank is read.
// Products are accumulated in fp32 and y is rounded once. Rows of y that are in no group are not touched.
#pragma once
#include <cstdint>

#define LSC_API extern "C" __attribute__((visibility("default")))

constexpr int LSC_ABI = 3;

enum lsc_dtype : int32_t { LSC_BF16 = 0, LSC_F16 = 1, LSC_F32 = 2 };

struct lsc_layer {
  const void* arena;          // what page numbers count from; they may be negative
  const int32_t* page_table;  // [slots, table_stride]
  const int32_t* ranks;       // [slices, ranks_stride], one column per slot
  const int64_t* slices;      // [slices, 4]: A offset, B offset (elements from the page), first column of y, columns
  int64_t page_stride;        // elements
  int64_t table_stride;
  int64_t ranks_stride;
  int64_t in_size;
  int32_t page_rows;
  int32_t n_slices;
  int32_t dtype;              // of arena, x and y
  int32_t reserved;
};

struct lsc_batch {
  const int32_t* slots;   // [n_groups]
  const int32_t* starts;  // [n_groups + 1], into rows
  const int32_t* rows;    // row of x and y of every grouped token
  int32_t n_groups;
  int32_t reserved;
};

LSC_API int lsc_abi(void);
// Strides are in elements. add_inputs 0: a grouped row is set to the LoRA part alone. Returns 0, or -1 for a dtype that
// is not served.
LSC_API int lsc_linear(const lsc_layer* layer, const lsc_batch* batch, const void* x, int64_t x_stride, void* y,
                       int64_t y_stride, int32_t add_inputs);
// Who has changed page tables and then sees 1 here knows that nobody reads the pages they named before: no lsc_linear runs
// at that moment, and later ones read the tables anew. enter and leave count a reader outside of this library as one.
LSC_API int lsc_idle(void);
LSC_API void lsc_enter(void);
LSC_API void lsc_leave(void);
// Partial results (x @ A^T of every grouped token, fp32) lie in scratch memory of the calling thread, which grows as needed
// and is kept. Grows it to so many floats now and writes them, so that the process's size shows it; returns what it holds.
LSC_API int64_t lsc_reserve(int64_t floats);
// Which kernels run for a dtype: "avx512_bf16", "avx512", "avx2" or "generic"; force(name) picks one for tests (null: the
// best again) and returns -1 where this CPU cannot run it.
LSC_API const char* lsc_isa(void);
LSC_API int lsc_force_isa(const char* name);
// Upper bound on threads; 0: as many as the process's OpenMP run time would use.
LSC_API void lsc_set_threads(int32_t n);
// 1 when an OpenMP run time was found whose threads can be borrowed.
LSC_API int lsc_has_threads(void);
