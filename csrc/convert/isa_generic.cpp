#define LSC_ISA generic
#include "rows.inl"
