#include "standard.h"

#ifdef BERT_FAST_X86
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#define BERT_FAST_ISA avx2
#define BERT_FAST_LANES 8
#define BERT_FAST_REGISTERS 16
#include "instantiate.inl"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
