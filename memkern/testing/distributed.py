"""Run a function on several processes of one gloo group, and leave the group without a race."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.multiprocessing.spawn import start_processes

_FORKSERVER = "forkserver" in multiprocessing.get_all_start_methods()
_SLOW_TO_IMPORT = ("torch.distributed.fsdp", "torch._dynamo", "transformers.generation", "transformers.modeling_utils")


def leave() -> NoReturn:
    """Wait for the other ranks, then end this process at once.

    A gloo group keeps threads. Destructors that run while a peer or the interpreter takes its own side down now and
    then find one of them alive, which aborts a process whose work is done.
    """
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _rank(rank: int, function: Callable[..., None], world_size: int, store: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    function(rank, *arguments)
    leave()


def spawn(function: Callable[..., None], *arguments: Any, world_size: int = 2) -> None:
    """Call ``function(rank, *arguments)`` on ``world_size`` new processes that share the default group.

    ``function`` stands at the top of a module, and its arguments are pickled. The processes run one thread each and
    without Triton's interpreter. The first one that fails is raised here with its traceback.

    Where the system can, they are forks of one server with an environment of its first call: it has imported torch
    and transformers, which takes a new interpreter longer than most functions run.
    """
    context = multiprocessing.get_context("forkserver" if _FORKSERVER else "spawn")
    if _FORKSERVER:
        context.set_forkserver_preload(list(_SLOW_TO_IMPORT))
    interpret = os.environ.pop("TRITON_INTERPRET", None)
    try:
        with tempfile.TemporaryDirectory() as folder:
            start_processes(
                _rank,
                args=(function, world_size, str(Path(folder, "store")), arguments),
                nprocs=world_size,
                start_method=context.get_start_method(),
            )
    finally:
        if interpret is not None:
            os.environ["TRITON_INTERPRET"] = interpret
