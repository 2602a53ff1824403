// The C ABI of the adapter pool's extension. Python's face of it: vllm_loraserve/memory/extension.py.
//
// Every function that can fail returns 0 or a negative errno (CUDA errors map to -EIO), and leaves one sentence for
// lsp_error() on the calling thread. Nothing here takes the Python GIL. Addresses and sizes are in bytes.
#pragma once
#include <cstddef>
#include <cstdint>

#define LSP_API extern "C" __attribute__((visibility("default")))

constexpr int LSP_ABI = 2;

// Flags asked for in an allocation; those granted are reported back.
enum : uint32_t {
  LSP_HUGE = 1,      // host: 2 MiB pages (hugetlb, else transparent)
  LSP_PINNED = 2,    // host: page-locked and known to CUDA; needs a GPU
  LSP_POPULATE = 4,  // host: touch every page now
  LSP_VMM = 8,       // device: cuMemCreate with the GPUDirect flag instead of cuMemAlloc
  LSP_LOCKED = 16,   // host: mlock
};

struct lsp_slab {
  uint64_t address;
  uint64_t size;
  int32_t fd;      // host: the memfd; device: -1
  uint32_t flags;  // what was granted
  int32_t device;  // -1: host
  int32_t reserved;
  uint64_t handle;  // device: VMM allocation handle; host: the context that it is page-locked in; 0 otherwise
};

struct lsp_segment {  // one contiguous piece of a copy
  uint64_t source;
  uint64_t target;
  uint64_t length;
};

struct lsp_dmabuf {
  int32_t fd;  // to be closed by the caller after registration
  int32_t reserved;
  uint64_t base;    // first byte that the dma-buf covers
  uint64_t length;  // bytes that it covers
  uint64_t offset;  // of the asked address inside the dma-buf
};

LSP_API int lsp_abi(void);
LSP_API const char* lsp_error(void);
// One JSON object with what was found on this machine; returns the bytes needed (without the final 0).
LSP_API size_t lsp_probe(char* text, size_t size);

// device: whose context page-locks the memory; -1: the thread's current one, or that of the only device.
LSP_API int lsp_host_alloc(uint64_t size, uint32_t flags, int device, lsp_slab* out);
LSP_API int lsp_host_free(lsp_slab* slab);

LSP_API int lsp_device_alloc(int device, uint64_t size, uint32_t flags, lsp_slab* out);
LSP_API int lsp_device_free(lsp_slab* slab);
// Exports the allocation that holds [address, address + length), else (VMM memory made of several pieces) the caller's
// own page-aligned range. mapping 1 asks for the PCIe mapping type (GB200 Direct NIC).
LSP_API int lsp_dmabuf_export(int device, uint64_t address, uint64_t length, int mapping, lsp_dmabuf* out);
// CUDA IPC: 64 bytes of handle for the allocation that holds address, and address's offset in it.
LSP_API int lsp_ipc_export(int device, uint64_t address, uint8_t handle[64], uint64_t* offset);
LSP_API int lsp_ipc_open(int device, const uint8_t handle[64], uint64_t* base);
LSP_API int lsp_ipc_close(int device, uint64_t base);

// Copies between any two of host and device, asynchronous inside, complete on return. device -1: host to host.
LSP_API int lsp_copy(int device, const lsp_segment* segments, size_t count);

// Kernels (CUDA) and their C++ twins: the same arguments; device -1 runs the twin on host addresses.
// gather: page pages[i] of `base` goes to row i of `out`; scatter: the other way round. page_bytes and
// the addresses are multiples of 16.
LSP_API int lsp_gather(int device, uint64_t base, const int64_t* pages, size_t count, uint64_t page_bytes,
                       uint64_t out);
LSP_API int lsp_scatter(int device, uint64_t in, const int64_t* pages, size_t count, uint64_t page_bytes,
                        uint64_t base);
// sums[i] = page_hash of the bytes at addresses[i], lengths[i].
LSP_API int lsp_checksums(int device, const uint64_t* addresses, const uint64_t* lengths, size_t count, uint64_t* sums);
// Host only: copies and hashes in one pass; a segment is a page. threads: how many may share 8 MiB and more.
LSP_API int lsp_copy_checksums(const lsp_segment* segments, size_t count, int threads, uint64_t* sums);
// Sends all bytes over a blocking socket. -ETIMEDOUT where its SO_SNDTIMEO passed, else the errno of send.
LSP_API int lsp_send(int fd, uint64_t address, uint64_t length);
// Receives the pages one after the other from a blocking socket, each piece hashed while it is in the nearest cache.
// -ETIMEDOUT where no byte came for stall_ms or not all within limit_ms, -EPIPE where the stream ended before; a
// shutdown of the socket ends the call.
LSP_API int lsp_recv_checksums(int fd, const uint64_t* addresses, const uint64_t* lengths, size_t count,
                               uint64_t stall_ms, uint64_t limit_ms, uint64_t* sums);
// Which host implementation of the hash runs: "avx512", "avx2" or "scalar"; force(name) picks one for tests.
LSP_API const char* lsp_hash_variant(void);
LSP_API int lsp_hash_force(const char* name);
