// What this machine has: one JSON object, for `vllm-loraserve doctor` and for the choice of a transfer rung.
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <string>

#include "dynlib.h"
#include "pool.h"

namespace {

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (unsigned char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += static_cast<char>(c);
    } else if (c < 0x20) {
      char escaped[8];
      snprintf(escaped, sizeof escaped, "\\u%04x", c);
      out += escaped;
    } else {
      out += static_cast<char>(c);
    }
  }
  return out + "\"";
}

std::string boolean(bool value) { return value ? "true" : "false"; }

std::string cuda_json() {
  const lsp::Cuda& c = lsp::cuda();
  std::string out =
      "{\"library\":" + quoted(c.where) + ",\"loaded\":" + boolean(c.loaded) + ",\"error\":" + quoted(c.error);
  int version = 0, count = 0;
  if (c.loaded) {
    c.driver_version(&version);
    c.device_count(&count);
  }
  out += ",\"driver\":" + std::to_string(version) + ",\"devices\":[";
  for (int i = 0; i < count; ++i) {
    lsp::CUdevice device = 0;
    char name[128] = "";
    size_t bytes = 0;
    c.device_get(&device, i);
    c.device_name(name, sizeof name, device);
    c.device_memory(&bytes, device);
    auto attribute = [&](int which) {
      int value = 0;
      return c.device_attribute(&value, which, device) == 0 ? value : 0;
    };
    out += std::string(i ? "," : "") + "{\"name\":" + quoted(name) + ",\"bytes\":" + std::to_string(bytes) +
           ",\"capability\":\"" + std::to_string(attribute(lsp::CU_ATTRIBUTE_COMPUTE_MAJOR)) + "." +
           std::to_string(attribute(lsp::CU_ATTRIBUTE_COMPUTE_MINOR)) +
           "\",\"gpudirect\":" + boolean(attribute(lsp::CU_ATTRIBUTE_GPUDIRECT_SUPPORTED)) +
           ",\"dma_buf\":" + boolean(attribute(lsp::CU_ATTRIBUTE_DMA_BUF_SUPPORTED)) +
           ",\"gpudirect_vmm\":" + boolean(attribute(lsp::CU_ATTRIBUTE_GPUDIRECT_WITH_VMM)) + "}";
  }
  return out + "],\"dma_buf_export\":" + boolean(c.handle_for_range != nullptr) + "}";
}

// Registering nothing at all, as NCCL asks: EBADF means that the kernel and the device got as far as the descriptor.
std::string dmabuf_support(const lsp::Verbs& v, void* device) {
  if (!v.reg_dmabuf) return "no ibv_reg_dmabuf_mr in libibverbs";
  void* context = v.open_device(device);
  if (!context) return std::string("cannot open: ") + strerror(errno);
  std::string answer = "cannot allocate a protection domain";
  if (void* pd = v.alloc_pd(context)) {
    errno = 0;
    void* mr = v.reg_dmabuf(pd, 0, 0, 0, -1, 0);
    int code = errno;
    answer = !mr && code == EBADF ? "supported" : std::string("unsupported: ") + strerror(code);
    v.dealloc_pd(pd);
  }
  v.close_device(context);
  return answer;
}

std::string verbs_json() {
  const lsp::Verbs& v = lsp::verbs();
  std::string error = v.error, devices;
  if (v.loaded) {
    int count = 0;
    errno = 0;
    void** list = v.device_list(&count);
    if (!list) error = errno == ENOSYS ? "the kernel has no RDMA (ib_uverbs is not loaded)" : strerror(errno);
    for (int i = 0; list && i < count; ++i)
      devices += std::string(i ? "," : "") + "{\"name\":" + quoted(v.device_name(list[i])) +
                 ",\"dma_buf\":" + quoted(dmabuf_support(v, list[i])) + "}";
    if (list) v.free_device_list(list);
  }
  return "{\"library\":" + quoted(v.where) + ",\"loaded\":" + boolean(v.loaded) + ",\"error\":" + quoted(error) +
         ",\"devices\":[" + devices + "]}";
}

}  // namespace

LSP_API size_t lsp_probe(char* text, size_t size) {
#ifdef LORASERVE_HAS_FATBIN
  const bool kernels = true;
#else
  const bool kernels = false;
#endif
  std::string out = "{\"abi\":" + std::to_string(LSP_ABI) + ",\"cuda_kernels\":" + boolean(kernels) +
                    ",\"hash\":" + quoted(lsp_hash_variant()) + ",\"cuda\":" + cuda_json() +
                    ",\"verbs\":" + verbs_json() + "}";
  if (text && size) {
    size_t n = out.size() < size - 1 ? out.size() : size - 1;
    memcpy(text, out.data(), n);
    text[n] = 0;
  }
  return out.size();
}
