// Retrieval on the CPU. All of it is bound by memory: a query's keys and values are read once, and what is computed from
// them stays in cache.
#include "ops/retrieval.h"

#include "cpu/isa.h"

#include "cpu/retrieval/kernels.h"

namespace memkern::cpu::MK_NS {

namespace {

void attention_forward(const RetrievedAttention& p) { p.bank < 0 ? own_forward(p) : bank_forward(p); }
void attention_backward(const RetrievedAttention& p) { p.bank < 0 ? own_backward(p) : bank_backward(p); }

}  // namespace

extern const RetrievalTable retrieval = {attention_forward, attention_backward, fuse_forward,
                                         fuse_backward,     span_forward,       span_backward};

}  // namespace memkern::cpu::MK_NS
