"""Builds CUDA operators for the processor: the same kernels and bindings, against ``csrc/emulator``.

The library registers them for CPU tensors under their own names, ``memkern::<op>_cuda``, so that every index and every
value can be compared without a GPU. What is no C++ is rewritten first: launches, and dynamic shared memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch

from memkern import backends

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = ROOT / "csrc" / "emulator"
FLAGS = ["-std=c++17", "-O1", "-g0", "-march=native", "-ffp-contract=fast", "-fPIC", "-w", "-DUSE_CUDA"]
FLAGS += ["-DTORCH_TARGET_VERSION=0x020b000000000000ULL"]
_LAUNCH = re.compile(r"([\w:]+(?:<[^<>;{}()]*>)?)<<<(.*?)>>>\(", re.DOTALL)
_DYNAMIC = re.compile(r"extern __shared__ (?:__align__\(\d+\) |alignas\(\d+\) )?(\w+) (\w+)\[\];")


def as_cpp(text: str) -> str:
    """CUDA C++ without what only nvcc reads."""
    text = _LAUNCH.sub(r"::emulated::Launch(\2)(\1, ", text)
    text = _DYNAMIC.sub(r"\1* const \2 = static_cast<\1*>(::emulated::dynamic_shared());", text)
    text = re.sub(r"\(memkern, CUDA, m\)", "(memkern, CPU, m)", text)
    return re.sub(r"(::emulated::Launch\([^;]*?), \)", r"\1)", text)


# What needs nothing but C++: folders of csrc/cuda, and the files of csrc/bind_cuda that bind them.
KERNELS = ("memory",)
BINDINGS = ("memory.cpp", "memory_parts.cpp", "tickets.cpp")


def absent() -> str | None:
    """Why the emulator cannot be built here, or None."""
    return None if shutil.which("g++") else "there is no g++"


@functools.cache
def build() -> Path:
    """The library, compiled where something changed since it was last built."""
    sources = [EMULATOR / "emulator.cpp"]
    sources += [source for name in KERNELS for source in sorted((ROOT / "csrc/cuda" / name).glob("*.cu"))]
    sources += [ROOT / "csrc/bind_cuda" / name for name in BINDINGS]
    read = [*sources, *EMULATOR.glob("*.h"), *(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cuh")]
    content = b"\0".join(path.read_bytes() for path in sorted(set(read)))
    key = hashlib.sha256(content + " ".join([torch.__version__, *FLAGS]).encode()).hexdigest()[:24]
    folder = ROOT / "build" / "emulated"
    library = folder / f"{key}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two test processes one compiles, the other waits
        if not library.exists():
            _compile(sources, library)
    return library


def _compile(sources: list[Path], library: Path) -> None:
    folder = library.parent
    torch_root = Path(torch.__file__).parent
    include = [f"-I{EMULATOR}", f"-I{ROOT / 'csrc'}", "-isystem", str(torch_root / "include")]
    compiler = ["ccache", "g++"] if shutil.which("ccache") else ["g++"]
    rewritten = {source: folder / f"{source.parent.name}_{source.stem}.cpp" for source in sources}
    for source, target in rewritten.items():
        target.write_text(as_cpp(source.read_text()))
    # One unit for all that reads torch's headers.
    bindings = folder / "bindings.cpp"
    bound = [target for source, target in rewritten.items() if source.suffix == ".cpp"]
    bindings.write_text("".join(f'#include "{target}"\n' for target in bound))
    objects = []
    for unit in [bindings, *(target for source, target in rewritten.items() if source.suffix == ".cu")]:
        objects.append(unit.with_suffix(".o"))
        _run([*compiler, *FLAGS, *include, "-c", str(unit), "-o", str(objects[-1])])
    partial = library.with_suffix(".partial")
    link = ["g++", "-shared", "-Wl,-Bsymbolic", *map(str, objects), "-o", str(partial), f"-L{torch_root / 'lib'}"]
    _run([*link, "-ltorch_cpu", "-lc10"])
    partial.replace(library)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{command[-1]}: {done.stderr[:4000]}")


@functools.cache
def load() -> None:
    """Register the emulated operators in this process."""
    torch.ops.load_library(str(build()))


def launches() -> int:
    """Emulated kernels launched so far in this process."""
    count = ctypes.CDLL(str(build())).memkern_emulated_launches
    count.restype = ctypes.c_int64
    return int(count())


@contextlib.contextmanager
def emulated() -> Iterator[None]:
    """Backend ``cuda`` takes CPU tensors, for the operators that are emulated."""
    load()
    real = backends._absent
    backends._absent = lambda name, device: None if name == "cuda" else real(name, device)
    try:
        yield
    finally:
        backends._absent = real
