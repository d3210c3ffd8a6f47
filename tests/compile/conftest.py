"""``Graphs``: what a compiled function became."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._functorch.aot_autograd import aot_module_simplified


class Graphs:
    """A compile backend that keeps the names in the forward and backward graphs and runs them as they are."""

    def __init__(self) -> None:
        self.forward: list[str] = []
        self.backward: list[str] = []
        self.compiled = 0

    def __call__(self, module: torch.fx.GraphModule, example_inputs: list[torch.Tensor]) -> Any:
        self.compiled += 1
        return aot_module_simplified(
            module, example_inputs, fw_compiler=self._keep(self.forward), bw_compiler=self._keep(self.backward)
        )

    @staticmethod
    def _keep(names: list[str]) -> Any:
        def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
            names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
            return graph.forward

        return compiler


@pytest.fixture
def graphs() -> Graphs:
    torch._dynamo.reset()
    return Graphs()
