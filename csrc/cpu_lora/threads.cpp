// Threads of our own would fight with torch's for the cores (OpenMP threads spin between parallel regions), so those are
// used, through the entry points that GCC's OpenMP run time exports and LLVM's and Intel's export for compatibility.
#include "threads.h"

#include <dlfcn.h>

namespace lsc {
namespace {

struct Runtime {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned);
  void (*barrier)();
  int (*thread_num)();
  int (*num_threads)();
  int (*max_threads)();
  int (*in_parallel)();

  Runtime() {
    find(parallel, "GOMP_parallel");
    find(barrier, "GOMP_barrier");
    find(thread_num, "omp_get_thread_num");
    find(num_threads, "omp_get_num_threads");
    find(max_threads, "omp_get_max_threads");
    find(in_parallel, "omp_in_parallel");
  }
  template <class F>
  static void find(F& function, const char* name) {
    function = reinterpret_cast<F>(dlsym(RTLD_DEFAULT, name));
  }
  bool complete() const { return parallel && barrier && thread_num && num_threads && max_threads && in_parallel; }
};

const Runtime& runtime() {
  static const Runtime found;
  return found;
}

struct Call {
  void (*fn)(void*, int, int);
  void* context;
};

thread_local bool in_team = false;

void on_thread(void* data) {
  const Call& call = *static_cast<Call*>(data);
  in_team = true;
  call.fn(call.context, runtime().thread_num(), runtime().num_threads());
  in_team = false;
}

}  // namespace

bool has_thread_runtime() { return runtime().complete(); }

int available_threads() {
  const Runtime& r = runtime();
  return r.complete() && !r.in_parallel() ? r.max_threads() : 1;
}

void run_on_threads(int wanted, void (*fn)(void*, int, int), void* context) {
  if (wanted <= 1 || !runtime().complete()) {
    fn(context, 0, 1);
    return;
  }
  Call call{fn, context};
  runtime().parallel(on_thread, &call, unsigned(wanted), 0);
}

void barrier() {
  if (in_team) runtime().barrier();
}

}  // namespace lsc
