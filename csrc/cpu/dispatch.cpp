#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace bert_fast::cpu {
namespace {

bool is_supported([[maybe_unused]] const std::string& name) {
    if (name == "portable") return true;
#ifdef BERT_FAST_X86
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (name == "avx2") return has_avx2;
    if (name == "avx512")
        return has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    return false;
}

const Kernels& choose() {
#ifdef BERT_FAST_X86
    const Kernels* const best_first[] = {&avx512_kernels, &avx2_kernels, &portable_kernels};
#else
    const Kernels* const best_first[] = {&portable_kernels};
#endif
    const char* wanted = std::getenv("BERT_FAST_ISA");
    std::string supported;
    for (const Kernels* table : best_first) {
        if (!is_supported(table->instruction_set)) continue;
        if (wanted == nullptr || *wanted == '\0' || std::string(wanted) == table->instruction_set) return *table;
        supported += (supported.empty() ? "" : ", ") + std::string(table->instruction_set);
    }
    throw std::invalid_argument("BERT_FAST_ISA is \"" + std::string(wanted) + "\"; this machine has " + supported);
}

}  // namespace

const Kernels& kernels() {
    static const Kernels& chosen = choose();
    return chosen;
}

}  // namespace bert_fast::cpu
