// Everything that the kernels use from outside. It comes before any target pragma, so that no inline function of a
// standard header is compiled for an instruction set that the machine may lack.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifdef _OPENMP
#include <omp.h>
#endif

#include "../philox.h"
#include "kernels.h"
#include "team.h"

namespace bert_fast::cpu {

// Whether the environment says "off" to something that is on by itself.
inline bool is_off(const char* variable) {
    const char* value = std::getenv(variable);
    return value != nullptr && std::strcmp(value, "off") == 0;
}

}  // namespace bert_fast::cpu

#if defined(__x86_64__)
namespace bert_fast::cpu {

// Instructions that older compilers do not know by name. EAX of CPUID's leaf 7, subleaf 1; the operating system's part is
// that of the instruction set to which they belong.
constexpr unsigned kAvxVnni = 1u << 4;
constexpr unsigned kAvx512Bfloat16 = 1u << 5;

inline bool has_instructions(unsigned which) {
    unsigned eax = 0;
    unsigned ebx = 0;
    unsigned ecx = 0;
    unsigned edx = 0;
    return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax & which) != 0;
}

}  // namespace bert_fast::cpu
#endif
