// A stand-in for libcuda.so.1 on a machine without a GPU: "device" memory is host memory, kernels are run by
// kernel_emulator.cpp, and misuse that a real driver punishes (no current context, foreign addresses, leaks) is an
// error. It proves the extension's own logic and arguments, nothing about a device. LORASERVE_FAKE_BYTES: its memory;
// LORASERVE_FAKE_DEVICES: how many there are. An asynchronous copy happens when its stream is waited for; one of
// LORASERVE_FAKE_BAD_COPY bytes is refused.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "kernel_emulator.cpp"

#define API extern "C" __attribute__((visibility("default")))
using Address = unsigned long long;

namespace {
enum { OK = 0, INVALID = 1, OUT_OF_MEMORY = 2, INVALID_CONTEXT = 201, NOT_SUPPORTED = 801 };
struct Allocation {
  size_t size;
  bool vmm;
};
std::mutex guard;
std::map<Address, Allocation> allocations;
std::map<unsigned long long, size_t> handles;
size_t used = 0;
std::map<void*, void*> registered;  // host memory -> the context that it was registered in
char contexts[8];
std::set<int> retained;
thread_local std::vector<void*> pushed;
#define depth static_cast<int>(pushed.size())
struct Copy {
  Address target, source;
  size_t size;
};
std::vector<Copy> begun;

unsigned long long setting(const char* name, unsigned long long otherwise) {
  const char* text = getenv(name);
  return text ? strtoull(text, nullptr, 10) : otherwise;
}

size_t limit() {
  return setting("LORASERVE_FAKE_BYTES", 2ull << 30);
}
void* reserve(size_t size) {
  void* p = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return p == MAP_FAILED ? nullptr : p;
}
std::map<Address, Allocation>::iterator holder(Address address) {
  auto next = allocations.upper_bound(address);
  if (next == allocations.begin()) return allocations.end();
  --next;
  return address < next->first + next->second.size ? next : allocations.end();
}
}  // namespace

API int cuInit(unsigned) { return OK; }
API int cuDriverGetVersion(int* v) { return *v = 13000, OK; }
API int cuDeviceGetCount(int* n) { return *n = static_cast<int>(setting("LORASERVE_FAKE_DEVICES", 1)), OK; }
API int cuDeviceGet(int* d, int ordinal) { 
  return *d = ordinal, ordinal < static_cast<int>(setting("LORASERVE_FAKE_DEVICES", 1)) ? OK : INVALID;
}
API int cuDeviceGetName(char* name, int size, int) { return snprintf(name, size, "stand-in"), OK; }
API int cuDeviceGetAttribute(int* value, int which, int) {
  *value = which == 75 ? 9 : which == 76 ? 0 : which == 110 || which == 116 || which == 124;
  return OK;
}
API int cuDeviceTotalMem_v2(size_t* n, int) { return *n = limit(), OK; }
API int cuGetErrorName(int code, const char** name) {
  *name = code == OUT_OF_MEMORY     ? "CUDA_ERROR_OUT_OF_MEMORY"
          : code == INVALID_CONTEXT ? "CUDA_ERROR_INVALID_CONTEXT"
                                    : "CUDA_ERROR_INVALID_VALUE";
  return OK;
}
API int cuDevicePrimaryCtxRetain(void** context, int device) {
  retained.insert(device);
  return *context = &contexts[device], OK;
}
// For the tests: is there a context on this device, and of which device is this host memory's (-1: none)?
API int fake_has_context(int device) { return retained.count(device) != 0; }
API int fake_registered_on(void* address) {
  auto found = registered.find(address);
  return found == registered.end() ? -1 : static_cast<int>(static_cast<char*>(found->second) - contexts);
}
API int cuCtxPushCurrent_v2(void* context) { return pushed.push_back(context), OK; }
API int cuCtxGetCurrent(void** context) { return *context = pushed.empty() ? nullptr : pushed.back(), OK; }
API int cuCtxPopCurrent_v2(void** context) {
  if (pushed.empty()) return INVALID_CONTEXT;
  *context = pushed.back();
  pushed.pop_back();
  return OK;
}
API int cuMemAlloc_v2(Address* out, size_t size) {
  if (depth <= 0) return INVALID_CONTEXT;
  std::lock_guard<std::mutex> lock(guard);
  if (used + size > limit()) return OUT_OF_MEMORY;
  *out = reinterpret_cast<Address>(reserve(size));
  used += size;
  allocations[*out] = {size, false};
  return OK;
}
API int cuMemFree_v2(Address address) {
  std::lock_guard<std::mutex> lock(guard);
  auto found = allocations.find(address);
  if (depth <= 0 || found == allocations.end() || found->second.vmm) return INVALID;
  munmap(reinterpret_cast<void*>(address), found->second.size);
  used -= found->second.size;
  allocations.erase(found);
  return OK;
}
API int cuMemGetAddressRange_v2(Address* base, size_t* size, Address address) {
  std::lock_guard<std::mutex> lock(guard);
  auto found = holder(address);
  if (depth <= 0 || found == allocations.end()) return INVALID;
  *base = found->first;
  *size = found->second.size;
  if (found->second.vmm) {  // one physical piece of 2 MiB, as drivers answer for mapped memory
    *base += (address - found->first) >> 21 << 21;
    *size = 2 << 20;
  }
  return OK;
}
API int cuMemHostRegister_v2(void* address, size_t, unsigned) {
  if (depth <= 0) return INVALID_CONTEXT;
  registered[address] = pushed.back();
  return OK;
}
API int cuMemHostUnregister(void* address) {
  if (depth <= 0) return INVALID_CONTEXT;
  auto found = registered.find(address);
  if (found == registered.end() || found->second != pushed.back()) return INVALID;
  registered.erase(found);
  return OK;
}
API int cuMemcpyAsync(Address target, Address source, size_t size, void* stream) {
  if (depth <= 0 || !stream) return INVALID_CONTEXT;
  if (size == setting("LORASERVE_FAKE_BAD_COPY", 0)) return INVALID;
  std::lock_guard<std::mutex> lock(guard);
  begun.push_back({target, source, size});
  return OK;
}
// For the tests: copies that were begun and not waited for.
API size_t fake_copies_left() { return begun.size(); }
API int cuMemcpyHtoD_v2(Address, const void*, size_t) { return NOT_SUPPORTED; }
API int cuMemcpyDtoH_v2(void*, Address, size_t) { return NOT_SUPPORTED; }
API int cuMemsetD8_v2(Address, unsigned char, size_t) { return NOT_SUPPORTED; }
API int cuStreamCreate(void** stream, unsigned) { return *stream = &used, depth > 0 ? OK : INVALID_CONTEXT; }
API int cuStreamSynchronize(void*) {
  if (depth <= 0) return INVALID_CONTEXT;
  std::lock_guard<std::mutex> lock(guard);
  for (const Copy& copy : begun)
    memcpy(reinterpret_cast<void*>(copy.target), reinterpret_cast<void*>(copy.source), copy.size);
  begun.clear();
  return OK;
}
API int cuStreamDestroy_v2(void*) { return OK; }
API int cuModuleLoadData(void** module, const void* image) {
  uint32_t magic;
  memcpy(&magic, image, 4);
  *module = &allocations;
  return depth > 0 && magic == 0xBA55ED50u ? OK : INVALID;
}
API int cuModuleGetFunction(void** function, void*, const char* name) {
  static const char* known[] = {"lsp_gather_kernel", "lsp_scatter_kernel", "lsp_checksum_kernel"};
  for (const char*& one : known)
    if (strcmp(one, name) == 0) return *function = &one, OK;
  return INVALID;
}
API int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                       unsigned, void* stream, void** arguments, void**) {
  cuStreamSynchronize(stream);  // in the order of the stream
  if (depth <= 0 || !stream || z != 1 || bx != 256 || by != 1 || bz != 1 || x < 1 || y < 1 || y > 65535) return INVALID;
  std::string name = *static_cast<const char**>(function);
  auto value = [&](int i) { return *static_cast<uint64_t*>(arguments[i]); };
  auto bytes = [&](int i) { return reinterpret_cast<unsigned char*>(value(i)); };
  if (name == "lsp_checksum_kernel")
    run(x, y, [&] {
      lsp_checksum_kernel(reinterpret_cast<uint64_t*>(value(0)), reinterpret_cast<uint64_t*>(value(1)), value(2),
                          reinterpret_cast<unsigned long long*>(value(3)));
    });
  else
    run(x, y, [&] {
      (name == "lsp_gather_kernel" ? lsp_gather_kernel : lsp_scatter_kernel)(
          bytes(0), reinterpret_cast<int64_t*>(value(1)), value(2), value(3), bytes(4));
    });
  return OK;
}
struct Ipc {
  Address base;
  char rest[56];
};
API int cuIpcGetMemHandle(Ipc* handle, Address address) {
  std::lock_guard<std::mutex> lock(guard);
  auto found = allocations.find(address);  // of an allocation's first byte only
  if (found == allocations.end() || found->second.vmm) return INVALID;
  memset(handle, 0, sizeof *handle);
  handle->base = address;
  return OK;
}
API int cuIpcOpenMemHandle_v2(Address* address, Ipc handle, unsigned flags) {
  *address = handle.base;
  return depth > 0 && flags == 1 ? OK : INVALID;
}
API int cuIpcCloseMemHandle(Address) { return depth > 0 ? OK : INVALID_CONTEXT; }
API int cuMemGetHandleForAddressRange(void* out, Address address, size_t size, int type, unsigned long long flags) {
  std::lock_guard<std::mutex> lock(guard);
  auto found = holder(address);
  if (depth <= 0 || type != 1 || flags > 1 || address % 4096 || size % 4096 || found == allocations.end())
    return INVALID;
  if (address + size > found->first + found->second.size) return INVALID;
  *static_cast<int*>(out) = memfd_create("fake-dmabuf", 0);
  return OK;
}
API int cuMemCreate(unsigned long long* handle, size_t size, const unsigned char* prop, unsigned long long) {
  // The GPUDirect flag: after type, handle types, location (2 ints), a pointer, and the compression byte.
  if (depth <= 0 || prop[25] != 1) return INVALID;
  std::lock_guard<std::mutex> lock(guard);
  if (used + size > limit()) return OUT_OF_MEMORY;
  used += size;
  handles[*handle = handles.size() + 1000] = size;
  return OK;
}
API int cuMemRelease(unsigned long long handle) {
  std::lock_guard<std::mutex> lock(guard);
  auto found = handles.find(handle);
  if (found == handles.end()) return INVALID;
  used -= found->second;
  handles.erase(found);
  return OK;
}
API int cuMemGetAllocationGranularity(size_t* unit, const void*, int) { return *unit = 2 << 20, OK; }
API int cuMemAddressReserve(Address* out, size_t size, size_t, Address, unsigned long long) {
  return *out = reinterpret_cast<Address>(reserve(size)), OK;
}
API int cuMemAddressFree(Address address, size_t size) { return munmap(reinterpret_cast<void*>(address), size); }
API int cuMemMap(Address address, size_t size, size_t, unsigned long long, unsigned long long) {
  std::lock_guard<std::mutex> lock(guard);
  allocations[address] = {size, true};
  return OK;
}
API int cuMemUnmap(Address address, size_t) {
  std::lock_guard<std::mutex> lock(guard);
  return allocations.erase(address) ? OK : INVALID;
}
API int cuMemSetAccess(Address, size_t, const void*, size_t) { return OK; }
