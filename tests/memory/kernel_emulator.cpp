// Runs the very source of the CUDA kernels on a CPU, thread after thread: they need no barrier and no shuffle, so a
// loop over the grid is a faithful (slow) execution. Compiled by test_extension_kernels.py; -I names csrc/pool.
#include <cstdint>

struct Index {
  unsigned x, y, z;
};
static thread_local Index blockIdx, threadIdx, blockDim, gridDim;
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
static inline unsigned long long atomicAdd(unsigned long long* where, unsigned long long value) {
  unsigned long long before = *where;
  *where += value;
  return before;
}
#define __global__
#define __device__
#define __forceinline__ inline
#include "kernels.cu"

template <class Kernel>
static void run(unsigned blocks_x, unsigned blocks_y, Kernel kernel) {
  gridDim = {blocks_x, blocks_y, 1};
  blockDim = {256, 1, 1};
  for (blockIdx.y = 0; blockIdx.y < blocks_y; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < blocks_x; ++blockIdx.x)
      for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x) kernel();
}

extern "C" void emulate_gather(unsigned bx, unsigned by, const unsigned char* base, const int64_t* pages,
                               uint64_t count, uint64_t page_bytes, unsigned char* out) {
  run(bx, by, [&] { lsp_gather_kernel(base, pages, count, page_bytes, out); });
}
extern "C" void emulate_scatter(unsigned bx, unsigned by, const unsigned char* in, const int64_t* pages, uint64_t count,
                                uint64_t page_bytes, unsigned char* base) {
  run(bx, by, [&] { lsp_scatter_kernel(in, pages, count, page_bytes, base); });
}
extern "C" void emulate_checksums(unsigned bx, unsigned by, const uint64_t* addresses, const uint64_t* lengths,
                                  uint64_t count, unsigned long long* sums) {
  run(bx, by, [&] { lsp_checksum_kernel(addresses, lengths, count, sums); });
  for (uint64_t i = 0; i < count; ++i) sums[i] = lsp::finish(sums[i], lengths[i]);
}
