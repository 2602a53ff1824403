// Page gather, scatter and checksum on the device. Twins with the same meaning: pages.cpp. Launched with 256 threads.
#include <cstdint>

#include "page_hash.h"

namespace {

__device__ __forceinline__ void copy_page(uint4* target, const uint4* source, uint64_t vectors) {
  uint64_t stride = static_cast<uint64_t>(gridDim.x) * blockDim.x;
  for (uint64_t i = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < vectors; i += stride)
    target[i] = source[i];
}

}  // namespace

// grid: x over a page, y over pages.
extern "C" __global__ void lsp_gather_kernel(const unsigned char* base, const int64_t* pages, uint64_t count,
                                             uint64_t page_bytes, unsigned char* out) {
  for (uint64_t page = blockIdx.y; page < count; page += gridDim.y)
    copy_page(reinterpret_cast<uint4*>(out + page * page_bytes),
              reinterpret_cast<const uint4*>(base + pages[page] * page_bytes), page_bytes / 16);
}

extern "C" __global__ void lsp_scatter_kernel(const unsigned char* in, const int64_t* pages, uint64_t count,
                                              uint64_t page_bytes, unsigned char* base) {
  for (uint64_t page = blockIdx.y; page < count; page += gridDim.y)
    copy_page(reinterpret_cast<uint4*>(base + pages[page] * page_bytes),
              reinterpret_cast<const uint4*>(in + page * page_bytes), page_bytes / 16);
}

// sums[i] += the terms of page i; the host applies finish(). A thread owns one lane of one chunk at a time, so eight
// neighbours read 64 consecutive bytes. grid: x over a page's chunks, y over pages.
extern "C" __global__ void lsp_checksum_kernel(const uint64_t* addresses, const uint64_t* lengths, uint64_t count,
                                               unsigned long long* sums) {
  const int lane = threadIdx.x % lsp::LANES;
  const uint64_t first = (static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / lsp::LANES;
  const uint64_t stride = static_cast<uint64_t>(gridDim.x) * blockDim.x / lsp::LANES;
  for (uint64_t page = blockIdx.y; page < count; page += gridDim.y) {
    const unsigned char* data = reinterpret_cast<const unsigned char*>(addresses[page]);
    const uint64_t length = lengths[page];
    const bool aligned = addresses[page] % 8 == 0;
    uint64_t sum = 0;
    for (uint64_t chunk = first; chunk * lsp::CHUNK < length; chunk += stride) {
      uint64_t product = 0, trail = 0;
#pragma unroll
      for (int stripe = 0; stripe < lsp::STRIPES; ++stripe) {
        const uint64_t offset = chunk * lsp::CHUNK + (stripe * lsp::LANES + lane) * 8;
        uint64_t word = 0;
        if (aligned && offset + 8 <= length) {
          word = *reinterpret_cast<const uint64_t*>(data + offset);
        } else {
#pragma unroll 1  // the last words of a page, or an odd address: rare, so small code
          for (int b = 0; b < 8 && offset + b < length; ++b) word |= static_cast<uint64_t>(data[offset + b]) << (8 * b);
        }
        lsp::accumulate(word, lsp::key(stripe, lane), product, trail);
      }
      sum += lsp::term(chunk, lane, product, trail);
    }
    if (sum) atomicAdd(sums + page, static_cast<unsigned long long>(sum));
  }
}
