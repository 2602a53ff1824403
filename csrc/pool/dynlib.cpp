#include "dynlib.h"

#include <dlfcn.h>

#include <initializer_list>
#include <mutex>

namespace lsp {
namespace {

void* open_first(std::initializer_list<const char*> names, std::string& where, std::string& error) {
  for (const char* name : names) {
    if (void* handle = dlopen(name, RTLD_NOW | RTLD_LOCAL)) {
      where = name;
      return handle;
    }
    const char* text = dlerror();
    error = text ? text : "not found";
  }
  return nullptr;
}

template <class F>
bool bind(void* library, const char* name, F& function) {
  function = reinterpret_cast<F>(dlsym(library, name));
  return function != nullptr;
}

Cuda load_cuda() {
  Cuda c{};
  void* lib = open_first({"libcuda.so.1", "libcuda.so"}, c.where, c.error);
  if (!lib) return c;
  bool all = bind(lib, "cuInit", c.init) && bind(lib, "cuDriverGetVersion", c.driver_version) &&
             bind(lib, "cuDeviceGetCount", c.device_count) && bind(lib, "cuDeviceGet", c.device_get) &&
             bind(lib, "cuDeviceGetName", c.device_name) && bind(lib, "cuDeviceGetAttribute", c.device_attribute) &&
             bind(lib, "cuDeviceTotalMem_v2", c.device_memory) && bind(lib, "cuGetErrorName", c.error_name) &&
             bind(lib, "cuDevicePrimaryCtxRetain", c.context_retain) &&
             bind(lib, "cuCtxPushCurrent_v2", c.context_push) && bind(lib, "cuCtxPopCurrent_v2", c.context_pop) &&
             bind(lib, "cuCtxGetCurrent", c.context_current) &&
             bind(lib, "cuMemAlloc_v2", c.mem_alloc) && bind(lib, "cuMemFree_v2", c.mem_free) &&
             bind(lib, "cuMemGetAddressRange_v2", c.address_range) &&
             bind(lib, "cuMemHostRegister_v2", c.host_register) &&
             bind(lib, "cuMemHostUnregister", c.host_unregister) && bind(lib, "cuMemcpyAsync", c.copy_async) &&
             bind(lib, "cuMemcpyHtoD_v2", c.copy_h2d) && bind(lib, "cuMemcpyDtoH_v2", c.copy_d2h) &&
             bind(lib, "cuMemsetD8_v2", c.memset8) && bind(lib, "cuStreamCreate", c.stream_create) &&
             bind(lib, "cuStreamSynchronize", c.stream_sync) && bind(lib, "cuStreamDestroy_v2", c.stream_destroy) &&
             bind(lib, "cuModuleLoadData", c.module_load) && bind(lib, "cuModuleGetFunction", c.module_function) &&
             bind(lib, "cuLaunchKernel", c.launch) && bind(lib, "cuIpcGetMemHandle", c.ipc_get) &&
             bind(lib, "cuIpcOpenMemHandle_v2", c.ipc_open) && bind(lib, "cuIpcCloseMemHandle", c.ipc_close);
  if (!all) {
    c.error = c.where + " lacks functions of the driver API that the extension needs";
    return c;
  }
  bind(lib, "cuMemGetHandleForAddressRange", c.handle_for_range);
  bind(lib, "cuMemCreate", c.mem_create);
  bind(lib, "cuMemRelease", c.mem_release);
  bind(lib, "cuMemGetAllocationGranularity", c.mem_granularity);
  bind(lib, "cuMemAddressReserve", c.address_reserve);
  bind(lib, "cuMemAddressFree", c.address_free);
  bind(lib, "cuMemMap", c.mem_map);
  bind(lib, "cuMemUnmap", c.mem_unmap);
  bind(lib, "cuMemSetAccess", c.mem_access);
  CUresult code = c.init(0);
  if (code != 0) {
    const char* name = nullptr;
    c.error_name(code, &name);
    c.error = std::string("cuInit: ") + (name ? name : "error");
    return c;
  }
  c.error.clear();
  c.loaded = true;
  return c;
}

Verbs load_verbs() {
  Verbs v{};
  void* lib = open_first({"libibverbs.so.1", "libibverbs.so"}, v.where, v.error);
  if (!lib) return v;
  bool all = bind(lib, "ibv_get_device_list", v.device_list) && bind(lib, "ibv_free_device_list", v.free_device_list) &&
             bind(lib, "ibv_get_device_name", v.device_name) && bind(lib, "ibv_open_device", v.open_device) &&
             bind(lib, "ibv_close_device", v.close_device) && bind(lib, "ibv_alloc_pd", v.alloc_pd) &&
             bind(lib, "ibv_dealloc_pd", v.dealloc_pd);
  if (!all) {
    v.error = v.where + " lacks basic verbs";
    return v;
  }
  bind(lib, "ibv_reg_dmabuf_mr", v.reg_dmabuf);
  v.error.clear();
  v.loaded = true;
  return v;
}

}  // namespace

const Cuda& cuda() {
  static const Cuda instance = load_cuda();
  return instance;
}

const Verbs& verbs() {
  static const Verbs instance = load_verbs();
  return instance;
}

std::string cuda_error(CUresult code) {
  const char* name = nullptr;
  if (cuda().loaded && cuda().error_name(code, &name) == 0 && name) return name;
  return "CUDA error " + std::to_string(code);
}

}  // namespace lsp
