// The thread's last error: one sentence, set where a call fails, read by lsp_error().
#pragma once
namespace lsp {
// Keeps the printf-style sentence and returns `code` (a negative errno), so that callers write `return fail(...)`.
int fail(int code, const char* format, ...) __attribute__((format(printf, 2, 3)));
}  // namespace lsp
