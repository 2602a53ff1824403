// Picks the converter that this CPU runs.
#include <initializer_list>

#include "convert.h"
#include "isa.h"

namespace {

using Writer = int (*)(const lsc_rows&);

// Null where this CPU lacks the instruction set.
Writer writer(int isa) {
  switch (isa) {
    case LSC_GENERIC: return lsc::generic::write_rows;
#if defined(LORASERVE_X86)
    case LSC_AVX2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") ? lsc::avx2::write_rows : nullptr;
    case LSC_AVX512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")
                 ? lsc::avx512::write_rows
                 : nullptr;
#endif
  }
  return nullptr;
}

Writer best() {
  for (int isa : {LSC_AVX512, LSC_AVX2})
    if (Writer found = writer(isa)) return found;
  return writer(LSC_GENERIC);
}

}  // namespace

int lsc_abi(void) { return LSC_ABI; }

int lsc_write_rows(const lsc_rows* job, int isa) {
  static const Writer chosen = best();
  Writer write = isa == LSC_BEST ? chosen : writer(isa);
  return write ? write(*job) : -2;
}
