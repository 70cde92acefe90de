#include "standard.h"

#define BERT_FAST_ISA portable
#define BERT_FAST_LANES 4
#include "instantiate.inl"
