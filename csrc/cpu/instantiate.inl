// Included once per instruction set, after the standard headers and the target pragma.
#include "common.inl"
#include "philox.inl"
#include "panels.inl"
#include "gemm.inl"
#include "bfloat16.inl"
#include "int8.inl"
#include "attention.inl"
#include "gelu.inl"
#include "layer_norm.inl"
#include "encoder.inl"
#include "masking.inl"

#define BERT_FAST_NAME_(isa) isa##_kernels
#define BERT_FAST_NAME(isa) BERT_FAST_NAME_(isa)
#define BERT_FAST_STRING_(isa) #isa
#define BERT_FAST_STRING(isa) BERT_FAST_STRING_(isa)

namespace bert_fast::cpu {

const Kernels BERT_FAST_NAME(BERT_FAST_ISA) = {
    BERT_FAST_STRING(BERT_FAST_ISA),
    BERT_FAST_ISA::attention,
    BERT_FAST_ISA::attention_backward,
    BERT_FAST_ISA::layer_norm,
    BERT_FAST_ISA::layer_norm_backward,
    BERT_FAST_ISA::embedding,
    BERT_FAST_ISA::gelu,
    BERT_FAST_ISA::gelu_backward,
    BERT_FAST_ISA::matrix_product_workspace,
    BERT_FAST_ISA::matrix_product,
    BERT_FAST_ISA::packed_size,
    BERT_FAST_ISA::pack_weight,
    BERT_FAST_ISA::has_bfloat16,
    BERT_FAST_ISA::packed_halves_size,
    BERT_FAST_ISA::pack_halves,
    BERT_FAST_ISA::quantised_size,
    BERT_FAST_ISA::quantise_weight,
    BERT_FAST_ISA::padded_outputs,
    BERT_FAST_ISA::num_groups,
    BERT_FAST_ISA::encoder_workspace,
    BERT_FAST_ISA::encoder,
    BERT_FAST_ISA::prefix_lengths,
    BERT_FAST_ISA::fill_sequence,
    BERT_FAST_ISA::copy_ids,
    BERT_FAST_ISA::select_columns,
    BERT_FAST_ISA::draw_replacements,
};

}  // namespace bert_fast::cpu
