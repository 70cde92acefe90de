#include "standard.h"

#define BERT_FAST_ISA portable
#define BERT_FAST_LANES 4
#if defined(__aarch64__)
#define BERT_FAST_REGISTERS 32
#else
#define BERT_FAST_REGISTERS 16
#endif
#include "instantiate.inl"
