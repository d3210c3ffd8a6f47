"""One step of the memory, backward: three launches, and one pass over the links and their gradient.

The first goes back through reading: sharpening, mix, read lookup. The second goes over the links. With dw the gradient
of the mixed read weights and r the previous read weights, x = L dw and y = L^T dw give the gradients of modes and of r
without the directional weights themselves: <r, y> and <r, x>, pi_f y + pi_b x. The third goes back through the write:
erase and add, write weights, allocation, usage. A masked batch item passes its state's gradients on.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..._common import ALL_REGISTERS, on_device
from .._launch import EXACT, tiles, warps
from .links import links_bwd, precedence_bwd
from .reading import read_bwd
from .writing import write_bwd

__all__ = ["links_bwd", "precedence_bwd", "step"]


def step(
    grads: dict[str, Tensor | None],
    old: dict[str, Tensor],
    said: dict[str, Tensor],
    sharpness: Tensor | None,
    step_mask: Tensor | None,
    new: dict[str, Tensor],
    track_usage: bool,
    track_links: bool,
    deallocate: bool,
    detach_usage: bool,
) -> dict[str, Tensor]:
    """Gradients of one step, by field.

    Args:
        grads: of the new state's fields and of ``reads``, contiguous; None where there is none.
        old: the state before the step.
        new: of the state after it memory, usage, read_weights and write_weights, and what forward saved.
    """
    memory, read_weights = old["memory"], old["read_weights"]
    batch, slots, width = memory.shape
    read_heads, heads = read_weights.shape[1], old["write_weights"].shape[1]
    tile = tiles(slots, width, heads)
    wide = {"num_warps": warps(slots, width)}

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=memory.device)

    made = {name: empty(*field.shape) for name, field in said.items()}
    made |= {
        "memory": empty(batch, slots, width),
        "usage": empty(*((batch, slots) if track_usage else (0,))),
        "precedence": empty(*((batch, heads, slots) if track_links else (0,))),
        "read_weights": empty(batch, read_heads, slots),
        "write_weights": empty(batch, heads, slots),
        "sharpness": empty(*((0,) if sharpness is None else sharpness.shape)),
        "links": empty(0),
    }
    d_mixed, cosine = empty(batch, read_heads, slots), empty(batch, read_heads, slots)
    inverse, projection, scratch, mass = (empty(batch, slots) for _ in range(4))

    def given(name: str) -> Tensor:
        found = grads[name]
        return memory if found is None else found

    mask = memory if step_mask is None else step_mask
    with on_device(memory):
        read_bwd[(batch,)](
            given("reads"), given("read_weights"), given("memory"), new["memory"], new["read_weights"],
            new["read_content"], new["mixed"], said["read_keys"], said["read_strengths"], said["read_modes"],
            memory if sharpness is None else sharpness, mask, d_mixed, made["memory"], made["read_keys"],
            made["read_strengths"], made["read_modes"], made["sharpness"], cosine, inverse, projection, slots, width,
            R=read_heads, RB=triton.next_power_of_2(read_heads), H=heads, TRACK_LINKS=track_links,
            SHARPEN=sharpness is not None, HAS_MASK=step_mask is not None, HAS_READS=grads["reads"] is not None,
            HAS_WEIGHTS=grads["read_weights"] is not None, HAS_MEMORY=grads["memory"] is not None,
            **tile, **wide, **ALL_REGISTERS,
        )  # fmt: skip
        x, y, d_rows, d_columns, d_before, blocks = memory, memory, memory, memory, memory, 0
        if track_links:
            made["links"], x, y, d_rows, d_columns, d_before, blocks = links_bwd(
                grads["links"], old["links"], old["precedence"], new["write_weights"], read_weights, d_mixed,
                said["read_modes"], step_mask,
            )  # fmt: skip
        write_cosine, slopes = empty(batch, heads, slots), empty(batch, heads, slots)
        write_bwd[(batch,)](
            given("memory"), given("usage"), given("precedence"), given("read_weights"), given("write_weights"),
            memory, old["usage"], old["precedence"], read_weights, old["write_weights"], new["usage"],
            new["write_weights"], new["write_content"], new["allocation"], said["write_keys"], said["write_strengths"],
            said["read_modes"], said["erase_vectors"], said["write_vectors"], said["free_gates"],
            said["allocation_gates"], said["write_gates"], mask, x, y, d_rows, d_columns, d_before,
            made["memory"], made["usage"], made["precedence"], made["read_weights"], made["write_weights"],
            made["read_modes"], made["write_keys"], made["write_strengths"], made["write_vectors"],
            made["erase_vectors"], made["free_gates"], made["allocation_gates"], made["write_gates"],
            slopes, write_cosine, inverse, projection, scratch, mass, slots, width, blocks,
            R=read_heads, H=heads, HB=triton.next_power_of_2(heads), TRACK_USAGE=track_usage, TRACK_LINKS=track_links,
            DEALLOCATE=deallocate, DETACH=detach_usage, HAS_MASK=step_mask is not None,
            HAS_MEMORY=grads["memory"] is not None, HAS_USAGE=grads["usage"] is not None,
            HAS_PRECEDENCE=grads["precedence"] is not None, HAS_READ=grads["read_weights"] is not None,
            HAS_WRITE=grads["write_weights"] is not None,
            **tile, BJ=max(1, min(32, 4096 // tile["NB"])), **wide, **EXACT,
        )  # fmt: skip
    return made
