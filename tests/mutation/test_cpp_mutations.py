"""The suite can fail on C++ too: a mistake in a CPU kernel turns it red. One a column: each has to be compiled."""

from __future__ import annotations

import pytest

from memkern.testing.mutation import Mutation, Suite, no_build

MUTATIONS = [
    Mutation(
        "masked rows count in the loss",
        "csrc/cpu/routing/forward.cpp",
        "if (in.row_mask == nullptr || in.row_mask[row]) terms.add(",
        "terms.add(",
        "tests/ops/test_routing.py::test_masked_rows_reach_no_loss",
        "cpp",
    ),
    Mutation(
        "a masked row's experts are updated",
        "csrc/cpu/expert_update.cpp",
        "keep = masked || prob == A(0)",
        "keep = prob == A(0)",
        "tests/ops/test_expert_update.py::test_dtypes_with_mask",
        "cpp",
    ),
    Mutation(
        "a slot is linked to itself",
        "csrc/cpu/memory/links.cpp",
        "l[a] = select(iota<T>() == T(i + a - j), Vec<T>(T(0)), l[a]);\n        }\n        put(",
        "}\n        put(",
        "tests/ops/test_memory.py::test_step",
        "cpp",
    ),
    Mutation(
        "of equal scores the higher index wins",
        "csrc/cpu/cosine_topk/order.h",
        "a.row < b.row",
        "a.row > b.row",
        "tests/ops/test_cosine_topk.py::test_ties_go_to_the_lower_index",
        "cpp",
        "csrc/cpu/cosine_topk/search.cpp",
    ),
    Mutation(
        "a masked pair takes part",
        "csrc/cpu/retrieval/queries.h",
        "(p.mask != nullptr && !p.mask[row + c])",
        "(p.mask != nullptr && !p.mask[row] && !p.mask[row + c])",
        "tests/ops/test_retrieval.py::test_values_and_gradients",
        "cpp",
        "csrc/cpu/retrieval/bank.cpp",
    ),
]


@pytest.mark.skipif(no_build() is not None, reason=str(no_build()))
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_the_suite_notices(mutation: Mutation, suite: Suite) -> None:
    suite.check(mutation)
