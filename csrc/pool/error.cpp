#include "error.h"

#include <cstdarg>
#include <cstdio>

#include "pool.h"

namespace {
thread_local char last_error[512] = "";
}

namespace lsp {
int fail(int code, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(last_error, sizeof last_error, format, arguments);
  va_end(arguments);
  return code;
}
}  // namespace lsp

LSP_API int lsp_abi(void) { return LSP_ABI; }
LSP_API const char* lsp_error(void) { return last_error; }
