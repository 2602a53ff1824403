// What is dlopen'ed: libcuda (driver API) and libibverbs. Declared here by hand, so that neither needs headers to
// build.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace lsp {

using CUresult = int;
using CUdevice = int;
using CUdeviceptr = unsigned long long;
using CUcontext = struct CUctx_st*;
using CUmodule = struct CUmod_st*;
using CUfunction = struct CUfunc_st*;
using CUstream = struct CUstream_st*;
using CUmemHandle = unsigned long long;

struct CUipcMemHandle {
  unsigned char bytes[64];
};

struct CUmemLocation {
  int type;  // 1: device
  int id;
};
struct CUmemAllocationProp {
  int type;                  // 1: pinned
  int requestedHandleTypes;  // 1: POSIX file descriptor
  CUmemLocation location;
  void* win32HandleMetaData;
  struct {
    unsigned char compressionType;
    unsigned char gpuDirectRDMACapable;
    unsigned short usage;
    unsigned char reserved[4];
  } allocFlags;
};
struct CUmemAccessDesc {
  CUmemLocation location;
  int flags;  // 3: read and write
};

enum {
  CU_ATTRIBUTE_COMPUTE_MAJOR = 75,
  CU_ATTRIBUTE_COMPUTE_MINOR = 76,
  CU_ATTRIBUTE_GPUDIRECT_WITH_VMM = 110,
  CU_ATTRIBUTE_GPUDIRECT_SUPPORTED = 116,
  CU_ATTRIBUTE_DMA_BUF_SUPPORTED = 124,
  CU_HANDLE_TYPE_DMA_BUF_FD = 1,
};

struct Cuda {
  bool loaded = false;
  std::string where, error;
  CUresult (*init)(unsigned);
  CUresult (*driver_version)(int*);
  CUresult (*device_count)(int*);
  CUresult (*device_get)(CUdevice*, int);
  CUresult (*device_name)(char*, int, CUdevice);
  CUresult (*device_attribute)(int*, int, CUdevice);
  CUresult (*device_memory)(size_t*, CUdevice);
  CUresult (*error_name)(CUresult, const char**);
  CUresult (*context_retain)(CUcontext*, CUdevice);
  CUresult (*context_push)(CUcontext);
  CUresult (*context_pop)(CUcontext*);
  CUresult (*context_current)(CUcontext*);
  CUresult (*mem_alloc)(CUdeviceptr*, size_t);
  CUresult (*mem_free)(CUdeviceptr);
  CUresult (*address_range)(CUdeviceptr*, size_t*, CUdeviceptr);
  CUresult (*host_register)(void*, size_t, unsigned);
  CUresult (*host_unregister)(void*);
  CUresult (*copy_async)(CUdeviceptr, CUdeviceptr, size_t, CUstream);
  CUresult (*copy_h2d)(CUdeviceptr, const void*, size_t);
  CUresult (*copy_d2h)(void*, CUdeviceptr, size_t);
  CUresult (*memset8)(CUdeviceptr, unsigned char, size_t);
  CUresult (*stream_create)(CUstream*, unsigned);
  CUresult (*stream_sync)(CUstream);
  CUresult (*stream_destroy)(CUstream);
  CUresult (*module_load)(CUmodule*, const void*);
  CUresult (*module_function)(CUfunction*, CUmodule, const char*);
  CUresult (*launch)(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream, void**,
                     void**);
  CUresult (*ipc_get)(CUipcMemHandle*, CUdeviceptr);
  CUresult (*ipc_open)(CUdeviceptr*, CUipcMemHandle, unsigned);
  CUresult (*ipc_close)(CUdeviceptr);
  // Absent from old drivers: null there.
  CUresult (*handle_for_range)(void*, CUdeviceptr, size_t, int, unsigned long long);
  CUresult (*mem_create)(CUmemHandle*, size_t, const CUmemAllocationProp*, unsigned long long);
  CUresult (*mem_release)(CUmemHandle);
  CUresult (*mem_granularity)(size_t*, const CUmemAllocationProp*, int);
  CUresult (*address_reserve)(CUdeviceptr*, size_t, size_t, CUdeviceptr, unsigned long long);
  CUresult (*address_free)(CUdeviceptr, size_t);
  CUresult (*mem_map)(CUdeviceptr, size_t, size_t, CUmemHandle, unsigned long long);
  CUresult (*mem_unmap)(CUdeviceptr, size_t);
  CUresult (*mem_access)(CUdeviceptr, size_t, const CUmemAccessDesc*, size_t);
};

// The driver, loaded and initialised once; `loaded` is false and `error` says why where there is none.
const Cuda& cuda();
// "CUDA_ERROR_OUT_OF_MEMORY", or the number.
std::string cuda_error(CUresult code);

struct Verbs {
  bool loaded = false;
  std::string where, error;
  void** (*device_list)(int*);
  void (*free_device_list)(void**);
  const char* (*device_name)(void*);
  void* (*open_device)(void*);
  int (*close_device)(void*);
  void* (*alloc_pd)(void*);
  int (*dealloc_pd)(void*);
  void* (*reg_dmabuf)(void*, uint64_t, size_t, uint64_t, int, int);  // null before rdma-core 34
};

const Verbs& verbs();

}  // namespace lsp
