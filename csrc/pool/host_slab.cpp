// Host memory of the pool: one memfd mapping, so that a process on the same host can map it; huge pages and
// page-locking are asked for and, where the machine refuses, left out and reported as not granted.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "device.h"
#include "error.h"
#include "pool.h"

namespace {

constexpr uint64_t HUGE_BYTES = 2ull << 20;

#ifndef MFD_HUGE_2MB
#define MFD_HUGE_2MB (21u << 26)
#endif

// A memfd of `size` bytes, mapped; MAP_FAILED and errno where the kernel refuses. A peer maps this file too: sealed, it
// cannot be shrunk under that peer's mapping.
void* map_memfd(uint64_t size, unsigned flags, int map_flags, int& fd) {
  fd = memfd_create("loraserve-pool", MFD_CLOEXEC | MFD_ALLOW_SEALING | flags);
  if (fd < 0) return MAP_FAILED;
  void* address = MAP_FAILED;
  if (ftruncate(fd, static_cast<off_t>(size)) == 0 && fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) == 0)
    address = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED | map_flags, fd, 0);
  if (address == MAP_FAILED) {
    int code = errno;
    close(fd);
    fd = -1;
    errno = code;
  }
  return address;
}

// The context to register host memory in: of the named device; for -1 the thread's current one, else that of the only
// device. Null where none of these is, so that no context is made on a device that this process does not use.
lsp::CUcontext context_for(int device) {
  const lsp::Cuda& c = lsp::cuda();
  lsp::CUcontext context = nullptr;
  if (device < 0) {
    if (c.context_current(&context) == 0 && context) return context;
    int count = 0;
    if (c.device_count(&count) != 0 || count != 1) return nullptr;
    device = 0;
  }
  lsp::OnDevice on(device);
  return on.ok() && c.context_current(&context) == 0 ? context : nullptr;
}

// Page-locks the range; the context that it was registered in, or null.
lsp::CUcontext pin(void* address, uint64_t bytes, int device) {
  const lsp::Cuda& c = lsp::cuda();
  lsp::CUcontext context = c.loaded ? context_for(device) : nullptr, popped = nullptr;
  if (!context || c.context_push(context) != 0) return nullptr;
  bool done = c.host_register(address, bytes, 1 /* portable */) == 0;
  c.context_pop(&popped);
  return done ? context : nullptr;
}

}  // namespace

LSP_API int lsp_host_alloc(uint64_t size, uint32_t flags, int device, lsp_slab* out) {
  if (size == 0 || !out) return lsp::fail(-EINVAL, "a host slab needs a size above 0");
  uint64_t page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  uint64_t bytes = (size + page - 1) / page * page;
  if (bytes < size) return lsp::fail(-EINVAL, "a host slab of %llu bytes is too large", (unsigned long long)size);
  int fd = -1;
  uint32_t granted = 0;
  void* address = MAP_FAILED;
  int populate = flags & LSP_POPULATE ? MAP_POPULATE : 0;
  if (flags & LSP_HUGE) {
    // hugetlb reserves at mmap, so success here means that the pages are really there.
    uint64_t whole = (size + HUGE_BYTES - 1) / HUGE_BYTES * HUGE_BYTES;
    address = map_memfd(whole, MFD_HUGETLB | MFD_HUGE_2MB, populate, fd);
    if (address != MAP_FAILED) {
      granted |= LSP_HUGE;
      bytes = whole;
    }
  }
  if (address == MAP_FAILED) {
    address = map_memfd(bytes, 0, 0, fd);
    if (address == MAP_FAILED)
      return lsp::fail(-errno, "cannot map %llu bytes of host memory: %s", (unsigned long long)bytes, strerror(errno));
    if (flags & LSP_HUGE) madvise(address, bytes, MADV_HUGEPAGE);
    if (populate) memset(address, 0, bytes);
  }
  if (populate) granted |= LSP_POPULATE;
  if (flags & LSP_LOCKED && mlock(address, bytes) == 0) granted |= LSP_LOCKED;
  lsp::CUcontext context = flags & LSP_PINNED ? pin(address, bytes, device) : nullptr;
  if (context) granted |= LSP_PINNED;
  *out = lsp_slab{reinterpret_cast<uint64_t>(address), bytes, fd, granted, -1, 0, reinterpret_cast<uint64_t>(context)};
  return 0;
}

LSP_API int lsp_host_free(lsp_slab* slab) {
  if (!slab || slab->device != -1 || !slab->address) return lsp::fail(-EINVAL, "not a live host slab");
  void* address = reinterpret_cast<void*>(slab->address);
  int error = 0;
  if (slab->flags & LSP_PINNED) {
    const lsp::Cuda& c = lsp::cuda();
    lsp::CUcontext popped = nullptr;
    error = lsp::cuda_check(c.context_push(reinterpret_cast<lsp::CUcontext>(slab->handle)), "cuCtxPushCurrent");
    if (!error) {
      error = lsp::cuda_check(c.host_unregister(address), "cuMemHostUnregister");
      c.context_pop(&popped);
    }
  }
  munmap(address, slab->size);
  if (slab->fd >= 0) close(slab->fd);
  *slab = lsp_slab{0, 0, -1, 0, -1, 0, 0};
  return error;
}
