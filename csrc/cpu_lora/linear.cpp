// Cuts one layer's LoRA into tasks and runs them: all shrinks, a barrier, all expands.
//
// A shrink task is one page of rank rows times up to kShrinkTokens tokens of one adapter; an expand task is up to
// kMaxColumns output columns of one slice times up to kExpandTokens tokens of one adapter. Threads take tasks from a
// counter. Little work stays on the calling thread: waking others would take longer than doing it.
#include <atomic>
#include <cstring>
#include <vector>

#include "cpu_lora.h"
#include "kernels.h"
#include "threads.h"

namespace lsc {
namespace {

constexpr int kShrinkTokens = 64;
constexpr int kExpandTokens = 32;
constexpr int kMaxPages = 64;
// Multiply-adds that are worth a second thread; about 20 us of work.
constexpr int64_t kWorkPerThread = 1 << 19;

struct ShrinkTask {
  int group, slice, page, first, count;  // tokens [first, first + count) of rows
};
struct ExpandTask {
  int group, slice, column, columns, first, count;
};

// Kept from call to call, so that a step allocates nothing.
struct Scratch {
  std::vector<ShrinkTask> shrinks;
  std::vector<ExpandTask> expands;
  std::vector<int64_t> h_offsets;  // [slices * groups]
  std::vector<float> h;
};

Scratch& scratch_of_thread() {
  thread_local Scratch scratch;
  return scratch;
}

struct Job {
  const lsc_layer* layer;
  const lsc_batch* batch;
  const Kernels* kernels;
  const char* x;
  char* y;
  int64_t x_bytes, y_bytes;  // between rows
  int item, add;
  Scratch* scratch;
  std::atomic<size_t> next_shrink{0}, next_expand{0};

  int rank(int slice, int group) const { return layer->ranks[slice * layer->ranks_stride + batch->slots[group]]; }
  const char* page(int group, int index) const {
    const int64_t number = layer->page_table[batch->slots[group] * layer->table_stride + index];
    return static_cast<const char*>(layer->arena) + number * layer->page_stride * item;
  }
  float* h(int slice, int group, int token) const {
    const int64_t stride = rank(slice, group);
    return scratch->h.data() + scratch->h_offsets[slice * batch->n_groups + group] +
           (token - batch->starts[group]) * stride;
  }
};

void run_shrink(const Job& job, const ShrinkTask& task) {
  const lsc_layer& layer = *job.layer;
  const int rank = job.rank(task.slice, task.group), first_row = task.page * layer.page_rows;
  const int rows = rank - first_row < layer.page_rows ? rank - first_row : layer.page_rows;
  const void* x[kShrinkTokens];
  for (int m = 0; m < task.count; ++m) x[m] = job.x + job.batch->rows[task.first + m] * job.x_bytes;
  const char* a = job.page(task.group, task.page) + layer.slices[task.slice * 4] * job.item;
  job.kernels->shrink[layer.dtype](x, task.count, a, rows, layer.in_size,
                                   job.h(task.slice, task.group, task.first) + first_row, rank);
}

void run_expand(const Job& job, const ExpandTask& task) {
  const lsc_layer& layer = *job.layer;
  const int64_t* slice = layer.slices + task.slice * 4;
  const int rank = job.rank(task.slice, task.group);
  const void* pages[512];
  const int n_pages = (rank + layer.page_rows - 1) / layer.page_rows;
  for (int p = 0; p < n_pages; ++p) pages[p] = job.page(task.group, p) + (slice[1] + task.column) * job.item;
  void* y[kExpandTokens];
  for (int m = 0; m < task.count; ++m)
    y[m] = job.y + job.batch->rows[task.first + m] * job.y_bytes + (slice[2] + task.column) * job.item;
  job.kernels->expand[layer.dtype](y, task.count, job.h(task.slice, task.group, task.first), rank, pages,
                                   layer.page_rows, rank, slice[3], task.columns, job.add);
}

void work(void* context, int, int) {
  Job& job = *static_cast<Job*>(context);
  const auto& shrinks = job.scratch->shrinks;
  const auto& expands = job.scratch->expands;
  for (size_t i; (i = job.next_shrink.fetch_add(1, std::memory_order_relaxed)) < shrinks.size();)
    run_shrink(job, shrinks[i]);
  barrier();
  for (size_t i; (i = job.next_expand.fetch_add(1, std::memory_order_relaxed)) < expands.size();)
    run_expand(job, expands[i]);
}

// Fills the task lists; returns the multiply-adds.
int64_t plan(Job& job) {
  Scratch& scratch = *job.scratch;
  const lsc_layer& layer = *job.layer;
  const lsc_batch& batch = *job.batch;
  scratch.shrinks.clear();
  scratch.expands.clear();
  scratch.h_offsets.assign(size_t(layer.n_slices) * batch.n_groups, 0);
  int64_t h_size = 0, total = 0;
  for (int g = 0; g < batch.n_groups; ++g) {
    const int first = batch.starts[g], last = batch.starts[g + 1];
    for (int s = 0; s < layer.n_slices; ++s) {
      const int rank = job.rank(s, g);
      if (rank <= 0 || first == last) continue;
      scratch.h_offsets[s * batch.n_groups + g] = h_size;
      h_size += int64_t(rank) * (last - first);
      const int64_t columns = layer.slices[s * 4 + 3];
      total += int64_t(rank) * (last - first) * (layer.in_size + columns);
      const int n_pages = (rank + layer.page_rows - 1) / layer.page_rows;
      // Pages inside a block of tokens, so that its x is still in the cache for the next page.
      for (int t = first; t < last; t += kShrinkTokens)
        for (int p = 0; p < n_pages; ++p)
          scratch.shrinks.push_back({g, s, p, t, last - t < kShrinkTokens ? last - t : kShrinkTokens});
      for (int64_t c = 0; c < columns; c += kMaxColumns) {
        const int width = int(columns - c < kMaxColumns ? columns - c : kMaxColumns);
        for (int t = first; t < last; t += kExpandTokens)
          scratch.expands.push_back({g, s, int(c), width, t, last - t < kExpandTokens ? last - t : kExpandTokens});
      }
    }
  }
  if (scratch.h.size() < size_t(h_size)) scratch.h.resize(size_t(h_size));
  return total;
}

struct Isa {
  const Kernels* kernels;
  bool runs;
};

std::vector<Isa> known_isas() {
  std::vector<Isa> isas;
#ifdef LORASERVE_X86
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  isas.push_back({&avx512_bf16_kernels(), avx512 && __builtin_cpu_supports("avx512bf16")});
  isas.push_back({&avx512_kernels(), avx512});
  isas.push_back({&avx2_kernels(), __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")});
#endif
  isas.push_back({&generic_kernels(), true});
  return isas;
}

const Kernels* best_kernels() {
  for (const Isa& isa : known_isas())
    if (isa.runs) return isa.kernels;
  return &generic_kernels();
}

std::atomic<const Kernels*> chosen{nullptr};
std::atomic<int> readers{0};  // of page tables, now

// The increment orders the reads of page tables behind it, as the fence of lsc_idle orders its caller's writes before the
// look: either lsc_idle sees the reader, or the reader sees what was written.
struct Reader {
  Reader() { readers.fetch_add(1, std::memory_order_seq_cst); }
  ~Reader() { readers.fetch_sub(1, std::memory_order_seq_cst); }
};

std::atomic<int> thread_limit{0};

const Kernels* kernels() {
  const Kernels* current = chosen.load(std::memory_order_acquire);
  if (current == nullptr) chosen.store(current = best_kernels(), std::memory_order_release);
  return current;
}

}  // namespace
}  // namespace lsc

LSC_API int lsc_abi(void) { return LSC_ABI; }

LSC_API int lsc_linear(const lsc_layer* layer, const lsc_batch* batch, const void* x, int64_t x_stride, void* y,
                       int64_t y_stride, int32_t add_inputs) {
  if (layer->dtype < LSC_BF16 || layer->dtype > LSC_F32) return -1;
  const lsc::Reader reader;
  lsc::Job job;
  job.layer = layer;
  job.batch = batch;
  job.kernels = lsc::kernels();
  job.item = layer->dtype == LSC_F32 ? 4 : 2;
  job.x = static_cast<const char*>(x);
  job.y = static_cast<char*>(y);
  job.x_bytes = x_stride * job.item;
  job.y_bytes = y_stride * job.item;
  job.add = add_inputs;
  job.scratch = &lsc::scratch_of_thread();
  const int64_t total = lsc::plan(job);
  if (total == 0) return 0;
  int threads = int(total / lsc::kWorkPerThread + 1);
  const int limit = lsc::thread_limit.load(std::memory_order_relaxed), available = lsc::available_threads();
  if (threads > available) threads = available;
  if (limit > 0 && threads > limit) threads = limit;
  lsc::run_on_threads(threads, lsc::work, &job);
  return 0;
}

LSC_API int lsc_idle(void) {
  std::atomic_thread_fence(std::memory_order_seq_cst);
  return lsc::readers.load(std::memory_order_seq_cst) == 0 ? 1 : 0;
}

LSC_API void lsc_enter(void) { lsc::readers.fetch_add(1, std::memory_order_seq_cst); }
LSC_API void lsc_leave(void) { lsc::readers.fetch_sub(1, std::memory_order_seq_cst); }

LSC_API int64_t lsc_reserve(int64_t floats) {
  std::vector<float>& h = lsc::scratch_of_thread().h;
  if (floats > int64_t(h.size())) h.resize(size_t(floats));
  return int64_t(h.size());
}

LSC_API const char* lsc_isa(void) { return lsc::kernels()->name; }

LSC_API int lsc_force_isa(const char* name) {
  if (name == nullptr) {
    lsc::chosen.store(lsc::best_kernels());
    return 0;
  }
  for (const lsc::Isa& isa : lsc::known_isas())
    if (isa.runs && std::strcmp(isa.kernels->name, name) == 0) {
      lsc::chosen.store(isa.kernels);
      return 0;
    }
  return -1;
}

LSC_API void lsc_set_threads(int32_t n) { lsc::thread_limit.store(n); }
LSC_API int lsc_has_threads(void) { return lsc::has_thread_runtime() ? 1 : 0; }
