#define LSC_ISA avx2
#include "rows.inl"
