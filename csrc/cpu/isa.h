// Every CPU kernel source is compiled once per instruction set and includes this file first, right after the standard
// headers it needs:
//
//     #include "cpu/isa.h"
//     #include "common/vec.h"
//     namespace memkern::cpu::MK_NS { ... extern const RoutingTable routing = {...}; }
//
// MK_NS names the instruction set's namespace, MK_VEC its vector width in bits (128, 256, 512). From here to the end
// of the file gcc may use the instruction set; templates of the standard headers above stay at the baseline, so that
// no weak copy of them with newer instructions can be linked into code that runs on an older CPU. (A -mavx512f on the
// command line would emit just those.) gcc does not define __AVX2__ or __AVX512F__ in such a region: branch on MK_VEC.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

#include "common/dtype.h"
#include "common/host.h"

#if defined(MK_ISA_AVX512)
#define MK_NS avx512
#define MK_VEC 512
// gcc 12 warns of the undefined operand in its own intrinsics (its bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi,bmi2,prefer-vector-width=512")
#elif defined(MK_ISA_AVX2)
#define MK_NS avx2
#define MK_VEC 256
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#elif defined(MK_ISA_DEFAULT)
#define MK_NS baseline
#define MK_VEC 128
#else
#error "a CPU kernel is compiled with one of MK_ISA_DEFAULT, MK_ISA_AVX2, MK_ISA_AVX512"
#endif
