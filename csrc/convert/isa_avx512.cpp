#define LSC_ISA avx512
#include "rows.inl"
