// The threads of the OpenMP run time that the process has loaded, without linking one.
#pragma once

namespace lsc {

// fn(context, thread, n_threads) on up to `wanted` threads, the caller's among them; returns when all are done.
void run_on_threads(int wanted, void (*fn)(void* context, int thread, int n_threads), void* context);
// Inside fn: waits for all threads of the call.
void barrier();
// Threads that a call may use: the run time's own limit, 1 inside a parallel region or without a run time.
int available_threads();
bool has_thread_runtime();

}  // namespace lsc
