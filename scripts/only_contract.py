"""A kind of import-linter contract: these modules import nothing but what is listed."""

from __future__ import annotations

import sys

from grimp import ImportGraph
from importlinter import Contract, ContractCheck, fields, output


class OnlyContract(Contract):
    """``modules``, with all below them, import themselves, the standard library and ``allowed``; nothing else.

    An allowed name stands for all below it too, except the root package's, which stands for its ``__init__`` alone.
    A listed module that does not exist is an error, so that a renamed one does not drop out unseen.
    """

    type_name = "only"
    modules = fields.ListField(subfield=fields.StringField())
    allowed = fields.ListField(subfield=fields.StringField())

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        broken = []
        for module in self.modules:
            if module not in graph.modules:
                broken.append(f"{module} does not exist")
                continue
            root = module.partition(".")[0]
            free = (module, *self.allowed)
            for source in sorted(graph.find_descendants(module) | {module}):
                for target in sorted(graph.find_modules_directly_imported_by(source)):
                    inside = any(target == name or (name != root and target.startswith(f"{name}.")) for name in free)
                    if not inside and target.partition(".")[0] not in sys.stdlib_module_names:
                        broken.append(f"{source} imports {target}")
        return ContractCheck(kept=not broken, metadata={"broken": broken})

    def render_broken_contract(self, check: ContractCheck) -> None:
        for line in check.metadata["broken"]:
            output.print_error(f"- {line}")
