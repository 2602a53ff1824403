// Device memory that RDMA may read, dma-buf export, CUDA IPC, and the copies and kernels that run on a device.
#include "device.h"

#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "error.h"
#include "pool.h"

#ifdef LORASERVE_HAS_FATBIN
extern "C" const unsigned char lsp_fatbin[];
#endif

namespace lsp {
namespace {

constexpr int MAX_DEVICES = 64;
std::mutex guard;
CUcontext contexts[MAX_DEVICES];
CUstream streams[MAX_DEVICES];
std::map<std::pair<int, std::string>, CUfunction> kernels;
CUmodule modules[MAX_DEVICES];

}  // namespace

int cuda_check(CUresult code, const char* what) {
  if (code == 0) return 0;
  return fail(code == 2 ? -ENOMEM : -EIO, "%s failed: %s", what, cuda_error(code).c_str());
}

OnDevice::OnDevice(int ordinal) {
  const Cuda& c = cuda();
  if (!c.loaded) {
    error_ = fail(-ENODEV, "no CUDA driver: %s", c.error.c_str());
    return;
  }
  int count = 0;
  c.device_count(&count);
  if (ordinal < 0 || ordinal >= count || ordinal >= MAX_DEVICES) {
    error_ = fail(-ENODEV, "no CUDA device %d; there are %d", ordinal, count);
    return;
  }
  std::lock_guard<std::mutex> lock(guard);
  if (!contexts[ordinal]) {
    CUdevice device = 0;
    if ((error_ = cuda_check(c.device_get(&device, ordinal), "cuDeviceGet"))) return;
    if ((error_ = cuda_check(c.context_retain(&contexts[ordinal], device), "cuDevicePrimaryCtxRetain"))) return;
  }
  error_ = cuda_check(c.context_push(contexts[ordinal]), "cuCtxPushCurrent");
}

OnDevice::~OnDevice() {
  CUcontext popped = nullptr;
  if (ok()) cuda().context_pop(&popped);
}

CUfunction kernel(int ordinal, const char* name) {
#ifdef LORASERVE_HAS_FATBIN
  std::lock_guard<std::mutex> lock(guard);
  auto found = kernels.find({ordinal, name});
  if (found != kernels.end()) return found->second;
  if (!modules[ordinal] && cuda_check(cuda().module_load(&modules[ordinal], lsp_fatbin), "cuModuleLoadData")) {
    modules[ordinal] = nullptr;
    return nullptr;
  }
  CUfunction function = nullptr;
  if (cuda_check(cuda().module_function(&function, modules[ordinal], name), "cuModuleGetFunction")) return nullptr;
  return kernels[{ordinal, name}] = function;
#else
  (void)ordinal;
  fail(-ENOTSUP, "the extension was built without nvcc, so it has no CUDA kernel %s", name);
  return nullptr;
#endif
}

CUstream stream(int ordinal) {
  std::lock_guard<std::mutex> lock(guard);
  if (!streams[ordinal] && cuda_check(cuda().stream_create(&streams[ordinal], 1 /* non-blocking */), "cuStreamCreate"))
    return nullptr;
  return streams[ordinal];
}

}  // namespace lsp

using lsp::cuda;
using lsp::cuda_check;

namespace {

int alloc_vmm(int device, uint64_t size, lsp_slab* out) {
  const lsp::Cuda& c = cuda();
  if (!c.mem_create || !c.mem_map || !c.address_reserve || !c.mem_access || !c.mem_granularity)
    return lsp::fail(-ENOTSUP, "the driver has no virtual memory management; ask for plain device memory");
  lsp::CUmemAllocationProp prop{};
  prop.type = 1;
  prop.requestedHandleTypes = 1;
  prop.location = {1, device};
  prop.allocFlags.gpuDirectRDMACapable = 1;
  size_t unit = 0;
  if (int e = cuda_check(c.mem_granularity(&unit, &prop, 1), "cuMemGetAllocationGranularity")) return e;
  size_t bytes = (size + unit - 1) / unit * unit;
  lsp::CUmemHandle handle = 0;
  lsp::CUdeviceptr address = 0;
  if (int e = cuda_check(c.mem_create(&handle, bytes, &prop, 0), "cuMemCreate")) return e;
  int error = cuda_check(c.address_reserve(&address, bytes, unit, 0, 0), "cuMemAddressReserve");
  if (!error) error = cuda_check(c.mem_map(address, bytes, 0, handle, 0), "cuMemMap");
  if (!error) {
    lsp::CUmemAccessDesc access{{1, device}, 3};
    error = cuda_check(c.mem_access(address, bytes, &access, 1), "cuMemSetAccess");
    if (error) c.mem_unmap(address, bytes);
  }
  if (error) {
    if (address) c.address_free(address, bytes);
    c.mem_release(handle);
    return error;
  }
  *out = lsp_slab{address, bytes, -1, LSP_VMM, device, 0, handle};
  return 0;
}

}  // namespace

LSP_API int lsp_device_alloc(int device, uint64_t size, uint32_t flags, lsp_slab* out) {
  if (size == 0 || !out) return lsp::fail(-EINVAL, "a device slab needs a size above 0");
  lsp::OnDevice on(device);
  if (!on.ok()) return on.error();
  if (flags & LSP_VMM) return alloc_vmm(device, size, out);
  constexpr uint64_t unit =
      2ull << 20;  // an allocation of its own, page-aligned: dma-buf export and IPC share it whole
  uint64_t bytes = (size + unit - 1) / unit * unit;
  lsp::CUdeviceptr address = 0;
  if (int e = cuda_check(cuda().mem_alloc(&address, bytes), "cuMemAlloc")) return e;
  *out = lsp_slab{address, bytes, -1, 0, device, 0, 0};
  return 0;
}

LSP_API int lsp_device_free(lsp_slab* slab) {
  if (!slab || slab->device < 0 || !slab->address) return lsp::fail(-EINVAL, "not a live device slab");
  lsp::OnDevice on(slab->device);
  if (!on.ok()) return on.error();
  int error = 0;
  if (slab->flags & LSP_VMM) {
    error = cuda_check(cuda().mem_unmap(slab->address, slab->size), "cuMemUnmap");
    cuda().mem_release(slab->handle);
    cuda().address_free(slab->address, slab->size);
  } else {
    error = cuda_check(cuda().mem_free(slab->address), "cuMemFree");
  }
  *slab = lsp_slab{0, 0, -1, 0, -1, 0, 0};
  return error;
}

LSP_API int lsp_dmabuf_export(int device, uint64_t address, uint64_t length, int mapping, lsp_dmabuf* out) {
  lsp::OnDevice on(device);
  if (!on.ok()) return on.error();
  const lsp::Cuda& c = cuda();
  if (!c.handle_for_range) return lsp::fail(-ENOTSUP, "the driver is older than CUDA 11.7 and exports no dma-buf");
  if (!out || length == 0) return lsp::fail(-EINVAL, "a dma-buf needs a length above 0");
  uint64_t page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  uint64_t low = address / page * page, high = (address + length + page - 1) / page * page;
  lsp::CUdeviceptr base = 0;
  size_t size = 0;
  if (int e = cuda_check(c.address_range(&base, &size, address), "cuMemGetAddressRange")) return e;
  // The whole allocation where the range lies inside it; of VMM memory the driver names one physical piece only.
  if (base % page == 0 && base <= address && address + length <= base + size) {
    low = base;
    high = base + (size + page - 1) / page * page;
  }
  int fd = -1;
  if (int e = cuda_check(c.handle_for_range(&fd, low, high - low, lsp::CU_HANDLE_TYPE_DMA_BUF_FD, mapping ? 1 : 0),
                         "cuMemGetHandleForAddressRange"))
    return e;
  *out = lsp_dmabuf{fd, 0, low, high - low, address - low};
  return 0;
}

LSP_API int lsp_ipc_export(int device, uint64_t address, uint8_t handle[64], uint64_t* offset) {
  lsp::OnDevice on(device);
  if (!on.ok()) return on.error();
  const lsp::Cuda& c = cuda();
  lsp::CUdeviceptr base = 0;
  size_t size = 0;
  if (int e = cuda_check(c.address_range(&base, &size, address), "cuMemGetAddressRange")) return e;
  lsp::CUipcMemHandle ipc;
  if (int e = cuda_check(c.ipc_get(&ipc, base), "cuIpcGetMemHandle")) return e;
  memcpy(handle, ipc.bytes, sizeof ipc.bytes);
  *offset = address - base;
  return 0;
}

LSP_API int lsp_ipc_open(int device, const uint8_t handle[64], uint64_t* base) {
  lsp::OnDevice on(device);
  if (!on.ok()) return on.error();
  lsp::CUipcMemHandle ipc;
  memcpy(ipc.bytes, handle, sizeof ipc.bytes);
  lsp::CUdeviceptr address = 0;
  if (int e = cuda_check(cuda().ipc_open(&address, ipc, 1 /* lazy peer access */), "cuIpcOpenMemHandle")) return e;
  *base = address;
  return 0;
}

LSP_API int lsp_ipc_close(int device, uint64_t base) {
  lsp::OnDevice on(device);
  if (!on.ok()) return on.error();
  return cuda_check(cuda().ipc_close(base), "cuIpcCloseMemHandle");
}
