// A vector of MK_VEC bits of float or double, and the functions the kernels compute with. Include after cpu/isa.h.
//
// load() converts bfloat16 and float16 to float, store() rounds back to nearest even; load_n()/store_n() touch only the
// first n elements. Operators + - * / < <= > >= == work element-wise; comparisons give a mask for select(), any() and
// all(). The transcendental functions are within 2 ulp, keep NaN, and give the limits at infinity. Everything here is
// in the namespace of the instruction set, so that no function is shared between two of them.
#pragma once

#define MK_INLINE static inline __attribute__((always_inline))

#if defined(__x86_64__) || defined(_M_X64)
#define MK_X86 1
#else
#define MK_X86 0
#endif

// In this order: each part uses the ones before.
#include "common/vec/element.h"
#include "common/vec/arithmetic.h"
#include "common/vec/memory.h"
#include "common/vec/reduce.h"
#include "common/vec/functions.h"
#include "common/vec/loops.h"
