"""The suite can fail: each small, plausible mistake planted in a copy of the sources turns it red."""

from __future__ import annotations

import pytest

from memkern.testing.mutation import Mutation, Suite

ROUTING = "tests/ops/test_routing.py"
EXPERTS = "tests/ops/test_expert_update.py"
RETRIEVAL = "tests/ops/test_retrieval.py"
MEMORY, MEMORY_PARTS = "tests/ops/test_memory.py", "tests/ops/test_memory_parts.py"
SEARCH = "tests/ops/test_cosine_topk"
MUTATIONS = [
    Mutation(
        "a row that pooled to zero is no longer uniform",
        "memkern/reference/routing.py",
        "zero_rows = (x.detach().abs() < ZERO_ROW).all(1)",
        "zero_rows = (x.detach().abs() < 0.0).all(1)",
        f"{ROUTING}::test_zero_rows_are_uniform_and_send_no_gradient",
    ),
    Mutation(
        "masked rows count in the loss",
        "memkern/reference/routing.py",
        "torch.where(counted, top, 0.0).sum(0), torch.where(counted, p, 0.0).sum(0)",
        "top.sum(0), p.sum(0)",
        f"{ROUTING}::test_masked_rows_reach_no_loss",
    ),
    Mutation(
        "ties of the maximum go to the highest slot",
        "memkern/reference/routing.py",
        "candidates.detach().argmax(1, keepdim=True)",
        "(slots - 1 - candidates.detach().flip(1).argmax(1, keepdim=True))",
        f"{ROUTING}::test_max_pooling_ties_go_to_the_lowest_slot",
    ),
    Mutation(
        "Triton: masked rows count in the loss",
        "triton_kernels/routing/_shared.py",
        "won = (winner[:, None] == columns) & counted[:, None]",
        "won = winner[:, None] == columns",
        f"{ROUTING}::test_masked_rows_reach_no_loss",
        "triton_interp",
    ),
    Mutation(
        "Triton: ties of the maximum go to the highest slot",
        "triton_kernels/routing/_pool.py",
        "where = tl.min(tl.where(best == top[None, :], winner, 0x7FFFFFFF), 0)",
        "where = tl.max(tl.where(best == top[None, :], winner, -1), 0)",
        f"{ROUTING}::test_max_pooling_ties_go_to_the_lowest_slot",
        "triton_interp",
    ),
    Mutation(
        "Triton: a kernel reads the input twice",
        "triton_kernels/routing/_pool.py",
        "            total += x\n            count += taken.to(tl.int32)\n"
        "        else:\n            key = tl.where(lanes",
        "            total += (x + tl.load(at, mask=lanes, other=0.0).to(tl.float32)) / 2\n"
        "            count += taken.to(tl.int32)\n        else:\n            key = tl.where(lanes",
        "tests/kernels/test_routing.py::test_traffic",
        "triton_interp",
    ),
    Mutation(
        "double backward differentiates the raw operator",
        "memkern/ops/routing/_route.py",
        "        if torch.is_grad_enabled():\n            # Only under create_graph",
        "        if False:\n            # Only under create_graph",
        "tests/ops/test_routing_transforms.py::test_double_backward_in_float32",
        "triton_interp",
    ),
    Mutation(
        "the loss of the global batch loses the factor world size",
        "memkern/ops/_collectives.py",
        "return grad * ctx.world_size, None",
        "return grad, None",
        "tests/ops/test_routing_transforms.py::test_loss_of_the_global_batch",
    ),
    Mutation(
        "a masked pair's NaN reaches the gradient",
        "triton_kernels/retrieval/attention.py",
        "d_k = tl.where(ok[:, :, None], d_score[:, :, None] * q[:, None, :], 0.0)",
        "d_k = (d_score[:, :, None] + 1e-3) * q[:, None, :]",
        f"{RETRIEVAL}::test_values_and_gradients",
        "triton_interp",
    ),
    Mutation(
        "an index that occurs twice counts once",
        "triton_kernels/retrieval/attention.py",
        "ok = place < last[:, None]",
        "ok = place < tl.minimum(last, first + 1)[:, None]",
        f"{RETRIEVAL}::test_repeated_index_counts_twice_and_gradients_add",
        "triton_interp",
    ),
    Mutation(
        "absent sources take part of the gate",
        "memkern/reference/retrieval.py",
        "torch.stack([gate_logits[..., i] for i in present], -1)",
        "gate_logits[..., : len(present)]",
        f"{RETRIEVAL}::test_fuse_sources_means_a_renormalised_softmax",
    ),
    Mutation(
        "each segment is a document of its own",
        "memkern/reference/retrieval.py",
        "members = document == torch.arange(segments, device=document.device)[:, None]",
        "members = torch.eye(segments, dtype=torch.bool, device=document.device)",
        f"{RETRIEVAL}::test_span_loss_by_hand",
    ),
    Mutation(
        "a masked row's NaN reaches the weights",
        "memkern/ops/_expert_update_cpu.py",
        "into.masked_fill_(~mask[:, None, None], 0.0)",
        "pass",
        f"{EXPERTS}::test_masked_rows_keep_their_state_and_reach_nothing",
        "cpp",
    ),
    Mutation(
        "a probability of zero has no gradient",
        "memkern/reference/expert_update.py",
        "kept = m.detach() - torch.nan_to_num(mixed.detach() - mixed, nan=0.0)",
        "kept = m",
        "tests/ops/test_expert_update_transforms.py::test_gradcheck_and_double_backward",
    ),
    Mutation(
        "the update mixes by the gate alone",
        "triton_kernels/expert_update.py",
        "    a = p[:, None] * g\n",
        "    a = g\n",
        f"{EXPERTS}::test_by_hand",
        "triton_interp",
    ),
    Mutation(
        "of equal slot ids the last counts",
        "memkern/reference/expert_update.py",
        "match.to(torch.uint8).argmax(-1)",
        "(match.to(torch.uint8) * torch.arange(1, 1 + match.shape[-1], dtype=torch.uint8)).argmax(-1)",
        "tests/ops/test_expert_update_slots.py::test_scatter_by_hand",
    ),
    Mutation(
        "Triton: a head's own erasing counts among the others'",
        "triton_kernels/memory/_device.py",
        "product = product * tl.where(g == h, 1.0, 1.0 - weight[:, None] * e[None, :])",
        "product = product * (1.0 - weight[:, None] * e[None, :])",
        f"{MEMORY_PARTS}::test_values_and_gradients[triton_interp-write_memory-odd]",
        "triton_interp",
    ),
    Mutation(
        "Triton: precedence sends its gradient to each weight alone",
        "triton_kernels/memory/backward/links.py",
        "slope += g - tl.where(passes, tl.sum(g * p, axis=0), 0.0)",
        "slope += g",
        f"{MEMORY_PARTS}::test_values_and_gradients[triton_interp-update_links-odd]",
        "triton_interp",
    ),
    Mutation(
        "Triton: a masked step of a scan on the chip moves its links",
        "triton_kernels/memory/on_chip.py",
        "x = tl.where(live & (h == i)[:, None, None], updated[None, :, :], x)",
        "x = tl.where((h == i)[:, None, None], updated[None, :, :], x)",
        f"{MEMORY}::test_masked_rows_pass_the_gradient_of_the_state",
        "triton_interp",
    ),
    Mutation(
        "Triton: every batch item's snapshot goes to the first",
        "triton_kernels/memory/on_chip.py",
        "shot = (t // every - 1) * batch + b",
        "shot = (t // every - 1) * batch + 0 * b",
        f"{MEMORY}::test_scan_equals_steps",
        "triton_interp",
    ),
    Mutation(
        "allocation breaks ties by the highest slot",
        "memkern/reference/memory.py",
        "order = torch.argsort(entered.detach(), dim=-1, stable=True)",
        "order = u.shape[-1] - 1 - torch.argsort(entered.detach().flip(-1), dim=-1, stable=True)",
        f"{MEMORY_PARTS}::test_allocation_breaks_ties_by_the_lowest_slot",
    ),
    Mutation(
        "links take the new precedence",
        "memkern/reference/memory.py",
        "return updated.masked_fill(diagonal, 0.0).to(links.dtype), followed.to(links.dtype)",
        "return update_links_from(links, followed, w, diagonal), followed.to(links.dtype)\n\n\n"
        "def update_links_from(links, p, w, diagonal):\n"
        "    kept = (1 - w[..., :, None] - w[..., None, :]).clamp(min=0)\n"
        "    return (kept * links + w[..., :, None] * p[..., None, :]).masked_fill(diagonal, 0.0).to(links.dtype)",
        f"{MEMORY_PARTS}::test_golden_numbers",
    ),
    Mutation(
        "a masked row of the memory is written all the same",
        "memkern/reference/memory.py",
        "new = MemoryState(*(_where(step_mask, now, then) for now, then in zip(new, given, strict=True)))",
        "pass",
        f"{MEMORY}::test_masked_rows_keep_their_state_bit_for_bit",
    ),
    Mutation(
        "detaching the usage detaches the free gates too",
        "memkern/reference/memory.py",
        "        written = written.detach()\n",
        "        written, read_weights = written.detach(), read_weights.detach()\n",
        f"{MEMORY}::test_detach_usage_stops_the_write_weights_alone",
    ),
    Mutation(
        "a scan keeps no step mask for its segments",
        "memkern/reference/memory.py",
        "mask = None if step_mask is None else step_mask[:, t]",
        "mask = None if step_mask is None else step_mask[:, 0]",
        f"{MEMORY}::test_scan_equals_steps",
    ),
    Mutation(
        "the double backward of the memory differentiates the raw operator",
        "memkern/ops/memory/recurrence.py",
        "        if torch.is_grad_enabled():\n            # Only under create_graph",
        "        if False:\n            # Only under create_graph",
        "tests/ops/test_memory_transforms.py::test_double_backward",
        "cpp",
    ),
    Mutation(
        "of equal scores the higher index wins",
        "memkern/reference/cosine_topk.py",
        "order = keys.sort(dim=-1, descending=True, stable=True).indices[..., :k]",
        "order = keys.flip(-1).sort(dim=-1, descending=True, stable=True).indices[..., :k].neg() + keys.shape[-1] - 1",
        f"{SEARCH}.py::test_ties_go_to_the_lower_index",
    ),
    Mutation(
        "a score that equals min_score is dropped",
        "memkern/reference/cosine_topk.py",
        "(block >= torch.full(",
        "(block > torch.full(",
        f"{SEARCH}_filters.py::test_min_score_keeps_an_equal_score",
    ),
    Mutation(
        "given inverse norms scale the gradient of the rows",
        "memkern/reference/cosine_topk.py",
        "rows = _with_gradient_of(rows, rows, ratio[..., None])",
        "rows = rows * 1",
        f"{SEARCH}_gradients.py::test_gradients_with_filters_and_given_norms",
        "cpp",
    ),
    Mutation(
        "the scan's bound forgets its margin",
        "triton_kernels/cosine_topk/_scan.py",
        "low = upper - 2.0 * half",
        "low = upper + 2.0 * half",
        f"{SEARCH}.py::test_near_ties",
        "triton_interp",
    ),
    Mutation(
        "a buffer that overflowed is taken for whole",
        "triton_kernels/cosine_topk/_scan.py",
        "        tl.store(flagged + index, 1)\n",
        "        tl.store(flagged + index, 0)\n",
        f"{SEARCH}.py::test_one_row_many_times",
        "triton_interp",
    ),
    Mutation(
        "a rank's indices do not count the rows before it",
        "memkern/ops/cosine_topk.py",
        "indices = torch.where(indices >= 0, indices + first, -1)",
        "indices = torch.where(indices >= 0, indices, -1)",
        "tests/ops/test_cosine_topk_transforms.py::test_sharded_search",
    ),
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_the_suite_notices(mutation: Mutation, suite: Suite) -> None:
    suite.check(mutation)
