// Which instruction set the CPU kernels use: the best one that the processor has, or MEMKERN_CPU_ISA, chosen once.
//
// A column declares its table of function pointers in csrc/ops/<column>.h and, once, in its binding:
//
//     MK_CPU_TABLE(RoutingTable, routing)      // at namespace scope, outside any namespace
//     ... memkern::cpu::routing_table().forward(params);
#pragma once

namespace memkern::cpu {

enum class Isa { kDefault = 0, kAvx2 = 1, kAvx512 = 2 };

// Name as MEMKERN_CPU_ISA takes it: "default", "avx2" or "avx512".
const char* isa_name(Isa isa);
// Compiled into this build and executable on this processor.
bool isa_available(Isa isa);
// The choice, made at the first call. Throws std::runtime_error when MEMKERN_CPU_ISA asks for one that is not available.
Isa isa();

}  // namespace memkern::cpu

#if defined(MK_MULTI_ISA)
#define MK_CPU_TABLE(Table, name)                                     \
  namespace memkern::cpu {                                            \
  namespace baseline { extern const Table name; }                     \
  namespace avx2 { extern const Table name; }                         \
  namespace avx512 { extern const Table name; }                       \
  inline const Table& name##_table() {                                \
    static const Table& chosen = isa() == Isa::kAvx512 ? avx512::name \
                                 : isa() == Isa::kAvx2 ? avx2::name   \
                                                       : baseline::name; \
    return chosen;                                                    \
  }                                                                   \
  }
#else
#define MK_CPU_TABLE(Table, name)                            \
  namespace memkern::cpu {                                   \
  namespace baseline { extern const Table name; }            \
  inline const Table& name##_table() {                       \
    isa(); /* reports a MEMKERN_CPU_ISA that cannot be had */ \
    return baseline::name;                                   \
  }                                                          \
  }
#endif
