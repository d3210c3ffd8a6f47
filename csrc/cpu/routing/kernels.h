// The kernels of the column's table, each in a file of its own.
#pragma once

#include "ops/routing.h"

namespace memkern::cpu::MK_NS {

void route_forward(const RouteForward& p, ParallelFor threads);
void route_backward(const RouteBackward& p, ParallelFor threads);
void softmax_forward(const RowSoftmax& p, ParallelFor threads);
void softmax_backward(const RowSoftmax& p, ParallelFor threads);
void entropy_forward(const RowEntropy& p, ParallelFor threads);
void entropy_backward(const RowEntropy& p, ParallelFor threads);
void balance_forward(const BalanceLoss& p, ParallelFor threads);
void balance_backward(const BalanceLoss& p, ParallelFor threads);

}  // namespace memkern::cpu::MK_NS
