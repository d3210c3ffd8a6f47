"""Makes Triton's interpreter patch its language once a launch.

It does so on every call of a jitted function, also of those that a kernel calls, and of ``tl.sum`` and the like, which
are such functions too. What is patched already it only looks through again: most of the time of a small kernel.
"""

from __future__ import annotations

import functools
import types
from typing import Any


@functools.cache
def patch_once() -> None:
    """Until the process ends."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    # A kernel sees the first of these modules, the functions of Triton's own standard library the second.
    both = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

    def once(function: Any) -> Any:
        return patch(both) if tl.core.is_builtin(tl.core.load) else interpreter._LangPatchScope()

    interpreter._patch_lang = once
