// Page copies and checksums: the C++ twins of the kernels (host) and the launches of the kernels (device).
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <atomic>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <exception>
#include <thread>
#include <vector>

#include "device.h"
#include "error.h"
#include "hash.h"
#include "page_hash.h"
#include "pool.h"

namespace {

constexpr lsp::Keys KEYS = lsp::make_keys();

// ---- the hash of one whole chunk at `data`, as the sum of its lanes' terms ----

uint64_t chunk_scalar(const unsigned char* data, uint64_t chunk) {
  uint64_t product[lsp::LANES] = {}, trail[lsp::LANES] = {};
  for (int s = 0; s < lsp::STRIPES; ++s)
    for (int l = 0; l < lsp::LANES; ++l) {
      uint64_t word;
      memcpy(&word, data + (s * lsp::LANES + l) * 8, 8);
      lsp::accumulate(word, KEYS.at[s][l], product[l], trail[l]);
    }
  uint64_t sum = 0;
  for (int l = 0; l < lsp::LANES; ++l) sum += lsp::term(chunk, l, product[l], trail[l]);
  return sum;
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) uint64_t chunk_avx2(const unsigned char* data, uint64_t chunk) {
  __m256i product[2] = {}, trail[2] = {};
  for (int s = 0; s < lsp::STRIPES; ++s)
    for (int h = 0; h < 2; ++h) {
      __m256i word = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data + s * 64 + h * 32));
      __m256i key = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(&KEYS.at[s][h * 4]));
      __m256i x = _mm256_xor_si256(word, key);
      product[h] = _mm256_add_epi64(product[h], _mm256_mul_epu32(x, _mm256_srli_epi64(x, 32)));
      __m256i turned = _mm256_or_si256(_mm256_slli_epi64(trail[h], 1), _mm256_srli_epi64(trail[h], 63));
      trail[h] = _mm256_add_epi64(turned, word);
    }
  alignas(32) uint64_t p[8], t[8];
  for (int h = 0; h < 2; ++h) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(p + 4 * h), product[h]);
    _mm256_store_si256(reinterpret_cast<__m256i*>(t + 4 * h), trail[h]);
  }
  uint64_t sum = 0;
  for (int l = 0; l < lsp::LANES; ++l) sum += lsp::term(chunk, l, p[l], t[l]);
  return sum;
}

__attribute__((target("avx512f,avx512dq"))) inline __m512i mix512(__m512i x) {
  x = _mm512_mullo_epi64(_mm512_xor_si512(x, _mm512_srli_epi64(x, 30)),
                         _mm512_set1_epi64(static_cast<long long>(0xBF58476D1CE4E5B9ull)));
  x = _mm512_mullo_epi64(_mm512_xor_si512(x, _mm512_srli_epi64(x, 27)),
                         _mm512_set1_epi64(static_cast<long long>(0x94D049BB133111EBull)));
  return _mm512_xor_si512(x, _mm512_srli_epi64(x, 31));
}

__attribute__((target("avx512f,avx512dq"))) uint64_t chunk_avx512(const unsigned char* data, uint64_t chunk) {
  __m512i product = _mm512_setzero_si512(), trail = _mm512_setzero_si512();
  for (int s = 0; s < lsp::STRIPES; ++s) {
    __m512i word = _mm512_loadu_si512(data + s * 64);
    __m512i x = _mm512_xor_si512(word, _mm512_loadu_si512(&KEYS.at[s][0]));
    product = _mm512_add_epi64(product, _mm512_mul_epu32(x, _mm512_srli_epi64(x, 32)));
    trail = _mm512_add_epi64(_mm512_rol_epi64(trail, 1), word);
  }
  uint64_t first = (chunk * lsp::LANES + 1) * lsp::GOLDEN;
  alignas(64) uint64_t offsets[lsp::LANES];
  for (int l = 0; l < lsp::LANES; ++l) offsets[l] = first + l * lsp::GOLDEN;
  __m512i inner = mix512(_mm512_add_epi64(product, _mm512_load_si512(offsets)));
  alignas(64) uint64_t terms[lsp::LANES];
  _mm512_store_si512(terms, mix512(_mm512_xor_si512(inner, trail)));
  uint64_t sum = 0;
  for (uint64_t t : terms) sum += t;
  return sum;
}

constexpr int AHEAD = 8 << 10;  // bytes; the processor's own prefetching ends with each 4 KiB page

// Copies a chunk past the caches, both sides 32-byte aligned. Like memcpy of large blocks it spares reading the
// target's lines before writing them, a third of the traffic. What lies AHEAD may be beyond the source: asking for it
// faults never.
__attribute__((target("avx2"))) void stream_avx2(unsigned char* target, const unsigned char* source) {
  for (int i = 0; i < lsp::CHUNK; i += 64)
    _mm_prefetch(reinterpret_cast<const char*>(source) + AHEAD + i, _MM_HINT_T0);
  for (int i = 0; i < lsp::CHUNK; i += 32)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(target + i),
                        _mm256_load_si256(reinterpret_cast<const __m256i*>(source + i)));
}

void streamed() { _mm_sfence(); }
#else
void streamed() {}
#endif

struct Variant {
  const char* name;
  uint64_t (*chunk)(const unsigned char*, uint64_t);
  bool usable;
  void (*stream)(unsigned char*, const unsigned char*);  // null: there is none
};

Variant* variants() {
  static Variant all[] = {
#if defined(__x86_64__)
      {"avx512", chunk_avx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq"), stream_avx2},
      {"avx2", chunk_avx2, __builtin_cpu_supports("avx2") != 0, stream_avx2},
#endif
      {"scalar", chunk_scalar, true, nullptr},
      {nullptr, nullptr, false, nullptr},
  };
  return all;
}

std::atomic<const Variant*> chosen{nullptr};

const Variant* variant() {
  const Variant* v = chosen.load(std::memory_order_acquire);
  if (v) return v;
  for (v = variants(); !v->usable; ++v) {
  }
  chosen.store(v, std::memory_order_release);
  return v;
}

uint64_t hash(const unsigned char* data, uint64_t length) {
  auto chunk_sum = variant()->chunk;
  uint64_t sum = 0, chunk = 0, whole = length / lsp::CHUNK;
  for (; chunk < whole; ++chunk) sum += chunk_sum(data + chunk * lsp::CHUNK, chunk);
  if (uint64_t rest = length % lsp::CHUNK) {
    alignas(64) unsigned char padded[lsp::CHUNK] = {};
    memcpy(padded, data + whole * lsp::CHUNK, rest);
    sum += chunk_sum(padded, chunk);
  }
  return lsp::finish(sum, length);
}

constexpr uint64_t PARALLEL_BYTES = 8 << 20;   // in one call; for less a thread costs more than it brings
constexpr uint64_t STREAMING_BYTES = 4 << 20;  // in one call; less stays in the cache for whoever reads it next

// Copies and hashes in one pass over memory. `streaming`: past the caches, for more than fits into them.
uint64_t copy_hash(unsigned char* target, const unsigned char* source, uint64_t length, bool streaming) {
  constexpr uint64_t BLOCK = 8 * lsp::CHUNK;
  const Variant* v = variant();
  uint64_t sum = 0, done = 0;
  bool aligned = (reinterpret_cast<uint64_t>(target) | reinterpret_cast<uint64_t>(source)) % 32 == 0;
  if (streaming && aligned && v->stream) {
    for (; length - done >= lsp::CHUNK; done += lsp::CHUNK) {
      v->stream(target + done, source + done);
      sum += v->chunk(source + done, done / lsp::CHUNK);  // in the nearest cache since the line above
    }
    streamed();
  }
  while (length - done >= lsp::CHUNK) {
    uint64_t whole = (length - done) / lsp::CHUNK * lsp::CHUNK, block = whole < BLOCK ? whole : BLOCK;
    memcpy(target + done, source + done, block);
    for (uint64_t end = done + block; done < end; done += lsp::CHUNK) sum += v->chunk(target + done, done / lsp::CHUNK);
  }
  if (uint64_t rest = length - done) {
    memcpy(target + done, source + done, rest);
    alignas(64) unsigned char padded[lsp::CHUNK] = {};
    memcpy(padded, target + done, rest);
    sum += v->chunk(padded, done / lsp::CHUNK);
  }
  return lsp::finish(sum, length);
}

unsigned char* bytes(uint64_t address) { return reinterpret_cast<unsigned char*>(address); }

// ---- launches ----

constexpr int MAX_DEVICES = 64;

// Device memory for the arguments of a launch, grown as needed and kept; one launch at a time on a device.
struct Scratch {
  std::mutex busy;
  lsp::CUdeviceptr address = 0;
  size_t size = 0;

  int reserve(size_t wanted) {
    if (wanted <= size) return 0;
    if (address) lsp::cuda().mem_free(address);
    address = 0;
    size = 0;
    size_t rounded = (wanted + (64 << 10) - 1) / (64 << 10) * (64 << 10);
    if (int e = lsp::cuda_check(lsp::cuda().mem_alloc(&address, rounded), "cuMemAlloc for kernel arguments")) return e;
    size = rounded;
    return 0;
  }
};
Scratch scratch[MAX_DEVICES];

// Waits for what was begun on the stream, since it uses the caller's memory, however the call ends.
class Drained {
 public:
  explicit Drained(int device) : device_(device) {}
  ~Drained() {
    if (lsp::CUstream s = lsp::stream(device_)) lsp::cuda().stream_sync(s);
  }
  Drained(const Drained&) = delete;

 private:
  int device_;
};

int launch(int device, const char* name, unsigned blocks_x, unsigned blocks_y, void** arguments) {
  lsp::CUfunction function = lsp::kernel(device, name);
  if (!function) return -EIO;
  lsp::CUstream s = lsp::stream(device);
  if (!s) return -EIO;
  if (int e = lsp::cuda_check(lsp::cuda().launch(function, blocks_x, blocks_y, 1, 256, 1, 1, 0, s, arguments, nullptr),
                              name))
    return e;
  return lsp::cuda_check(lsp::cuda().stream_sync(s), name);
}

int upload(int device, lsp::CUdeviceptr target, const void* from, size_t size) {
  return lsp::cuda_check(
      lsp::cuda().copy_async(target, reinterpret_cast<lsp::CUdeviceptr>(from), size, lsp::stream(device)),
      "cuMemcpyAsync of kernel arguments");
}

// Blocks over a page: enough to keep memory busy when there are few pages, few when there are many.
unsigned blocks_for(uint64_t page_bytes, uint64_t per_block) {
  uint64_t n = (page_bytes + per_block - 1) / per_block;
  return static_cast<unsigned>(n < 1 ? 1 : n > 1024 ? 1024 : n);
}

int run_page_copy(int device, const char* name, uint64_t a, const int64_t* pages, size_t count, uint64_t page_bytes,
                  uint64_t b) {
  lsp::OnDevice on(device);
  if (!on.ok()) return on.error();
  Scratch& s = scratch[device];
  std::lock_guard<std::mutex> lock(s.busy);
  if (int e = s.reserve(count * sizeof(int64_t))) return e;
  Drained drained(device);
  if (int e = upload(device, s.address, pages, count * sizeof(int64_t))) return e;
  uint64_t n = count;
  void* arguments[] = {&a, &s.address, &n, &page_bytes, &b};
  unsigned rows = static_cast<unsigned>(count < 65535 ? count : 65535);
  return launch(device, name, blocks_for(page_bytes, 256 * 64), rows, arguments);
}

int check_pages(uint64_t one, uint64_t other, const int64_t* pages, size_t count, uint64_t page_bytes) {
  if (page_bytes == 0 || page_bytes % 16)
    return lsp::fail(-EINVAL, "page_bytes %llu is not a multiple of 16", (unsigned long long)page_bytes);
  if ((one | other) % 16) return lsp::fail(-EINVAL, "the addresses of pages and rows must be multiples of 16");
  if (count && !pages) return lsp::fail(-EINVAL, "no page table");
  for (size_t i = 0; i < count; ++i)
    if (pages[i] < 0) return lsp::fail(-EINVAL, "page number %lld at %zu is negative", (long long)pages[i], i);
  return 0;
}

}  // namespace

lsp::ChunkHash lsp::chunk_hash() { return variant()->chunk; }

LSP_API const char* lsp_hash_variant(void) { return variant()->name; }

LSP_API int lsp_hash_force(const char* name) {
  for (const Variant* v = variants(); v->name; ++v)
    if (strcmp(v->name, name) == 0) {
      if (!v->usable) return lsp::fail(-ENOTSUP, "this CPU cannot run the %s hash", name);
      chosen.store(v, std::memory_order_release);
      return 0;
    }
  return lsp::fail(-EINVAL, "no hash variant called %s", name);
}

LSP_API int lsp_gather(int device, uint64_t base, const int64_t* pages, size_t count, uint64_t page_bytes,
                       uint64_t out) {
  if (int e = check_pages(base, out, pages, count, page_bytes)) return e;
  if (count == 0) return 0;
  if (device >= 0) return run_page_copy(device, "lsp_gather_kernel", base, pages, count, page_bytes, out);
  for (size_t i = 0; i < count; ++i)
    memcpy(bytes(out + i * page_bytes), bytes(base + pages[i] * page_bytes), page_bytes);
  return 0;
}

LSP_API int lsp_scatter(int device, uint64_t in, const int64_t* pages, size_t count, uint64_t page_bytes,
                        uint64_t base) {
  if (int e = check_pages(in, base, pages, count, page_bytes)) return e;
  if (count == 0) return 0;
  if (device >= 0) return run_page_copy(device, "lsp_scatter_kernel", in, pages, count, page_bytes, base);
  for (size_t i = 0; i < count; ++i)
    memcpy(bytes(base + pages[i] * page_bytes), bytes(in + i * page_bytes), page_bytes);
  return 0;
}

LSP_API int lsp_checksums(int device, const uint64_t* addresses, const uint64_t* lengths, size_t count,
                          uint64_t* sums) {
  if (device < 0) {
    for (size_t i = 0; i < count; ++i) sums[i] = hash(bytes(addresses[i]), lengths[i]);
    return 0;
  }
  if (count == 0) return 0;
  lsp::OnDevice on(device);
  if (!on.ok()) return on.error();
  Scratch& s = scratch[device];
  std::lock_guard<std::mutex> lock(s.busy);
  size_t array = count * sizeof(uint64_t);
  if (int e = s.reserve(3 * array)) return e;
  Drained drained(device);
  lsp::CUdeviceptr where = s.address, long_ = s.address + array, result = s.address + 2 * array;
  uint64_t longest = 0;
  for (size_t i = 0; i < count; ++i) {
    longest = lengths[i] > longest ? lengths[i] : longest;
    sums[i] = 0;
  }
  if (int e = upload(device, where, addresses, array)) return e;
  if (int e = upload(device, long_, lengths, array)) return e;
  if (int e = upload(device, result, sums, array)) return e;  // zeros
  uint64_t n = count;
  void* arguments[] = {&where, &long_, &n, &result};
  unsigned rows = static_cast<unsigned>(count < 65535 ? count : 65535);
  if (int e = launch(device, "lsp_checksum_kernel", blocks_for(longest, 32 * lsp::CHUNK), rows, arguments)) return e;
  if (int e = lsp::cuda_check(
          lsp::cuda().copy_async(reinterpret_cast<lsp::CUdeviceptr>(sums), result, array, lsp::stream(device)),
          "cuMemcpyAsync"))
    return e;
  if (int e = lsp::cuda_check(lsp::cuda().stream_sync(lsp::stream(device)), "cuStreamSynchronize")) return e;
  for (size_t i = 0; i < count; ++i) sums[i] = lsp::finish(sums[i], lengths[i]);
  return 0;
}

LSP_API int lsp_copy_checksums(const lsp_segment* segments, size_t count, int threads, uint64_t* sums) {
  uint64_t total = 0;
  for (size_t i = 0; i < count; ++i) total += segments[i].length;
  bool streaming = total >= STREAMING_BYTES;
  std::atomic<size_t> next{0};
  auto work = [&] {
    for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;)
      sums[i] = copy_hash(bytes(segments[i].target), bytes(segments[i].source), segments[i].length, streaming);
  };
  std::vector<std::thread> others;
  try {
    for (int i = 1; total >= PARALLEL_BYTES && i < threads; ++i) others.emplace_back(work);
  } catch (const std::exception&) {  // no thread to be had: those that there are do it
  }
  work();
  for (std::thread& other : others) other.join();
  return 0;
}

LSP_API int lsp_copy(int device, const lsp_segment* segments, size_t count) {
  if (device < 0) {
    for (size_t i = 0; i < count; ++i) memcpy(bytes(segments[i].target), bytes(segments[i].source), segments[i].length);
    return 0;
  }
  lsp::OnDevice on(device);
  if (!on.ok()) return on.error();
  lsp::CUstream s = lsp::stream(device);
  if (!s) return -EIO;
  Drained drained(device);
  for (size_t i = 0; i < count; ++i)
    if (int e = lsp::cuda_check(lsp::cuda().copy_async(segments[i].target, segments[i].source, segments[i].length, s),
                                "cuMemcpyAsync"))
      return e;
  return lsp::cuda_check(lsp::cuda().stream_sync(s), "cuStreamSynchronize");
}
