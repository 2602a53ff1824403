// The converter, once for each instruction set that it is compiled for.
#pragma once
#include "convert.h"

namespace lsc {
namespace generic {
int write_rows(const lsc_rows& job);
}
namespace avx2 {
int write_rows(const lsc_rows& job);
}
namespace avx512 {
int write_rows(const lsc_rows& job);
}
}  // namespace lsc
