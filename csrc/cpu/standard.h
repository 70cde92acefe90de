// Everything that the kernels use from outside. It comes before any target pragma, so that no inline function of a
// standard header is compiled for an instruction set that the machine may lack.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#if defined(__x86_64__)
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
