// The kernels of the column's table, each in a file of its own. Include after cpu/isa.h.
#pragma once

#include "ops/retrieval.h"

namespace memkern::cpu::MK_NS {

void own_forward(const RetrievedAttention& p);
void own_backward(const RetrievedAttention& p);
void bank_forward(const RetrievedAttention& p);
void bank_backward(const RetrievedAttention& p);
void fuse_forward(const FuseSources& p);
void fuse_backward(const FuseSources& p);
void span_forward(const SpanLoss& p);
void span_backward(const SpanLoss& p);

}  // namespace memkern::cpu::MK_NS
