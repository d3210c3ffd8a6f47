// The parts of the column that stand in files of their own. Include after cpu/isa.h.
#pragma once

namespace memkern::cpu::MK_NS {

void cosine_backward(const CosineBackward& p);
void inverse_norms(const InverseNorms& p);
void inverse_norms_backward(const InverseNorms& p);

}  // namespace memkern::cpu::MK_NS
