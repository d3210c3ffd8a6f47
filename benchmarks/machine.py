"""What this machine and this installation are: the facts that a number is worth nothing without."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import memkern
from memkern import native

PACKAGE = Path(memkern.__file__ or "").parent
ENVIRONMENT = re.compile(
    r"MEMKERN_.*|TRITON_.*|TORCH_CUDA_ARCH_LIST|CUDA_(VISIBLE_DEVICES|HOME|PATH)|(OMP|MKL)_NUM_THREADS|MAX_JOBS"
    r"|TORCHINDUCTOR_.*|PYTORCH_(CUDA_)?ALLOC_CONF"
)
_KERNEL_FOLDERS = ("csrc", "triton_kernels")


def version_of(distribution: str) -> str | None:
    """Version of an installed distribution, without importing it."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> dict[str, Any]:
    """Model, cores and cache sizes of the CPU, as far as the system tells."""
    found: dict[str, Any] = {"model": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        found["model"] = match[1].strip() if match else found["model"]
        for cache in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
            if (cache / "type").read_text().strip() != "Instruction":
                found[f"L{(cache / 'level').read_text().strip()}"] = (cache / "size").read_text().strip()
    except OSError:
        pass
    return found


def compiled_module() -> Any:
    """``memkern._C``, or None where it is not built."""
    try:
        return importlib.import_module("memkern._C")
    except ImportError:
        return None


def gpus() -> list[dict[str, Any]]:
    """The visible CUDA devices."""
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": about.name,
                "capability": f"{about.major}.{about.minor}",
                "memory_gib": round(about.total_memory / 2**30, 1),
                "multiprocessors": about.multi_processor_count,
                "l2_mib": round(getattr(about, "L2_cache_size", 0) / 2**20, 1),
            }
        )
    return found


@functools.cache
def driver() -> str | None:
    """Version of the NVIDIA driver, or None without one."""
    for path in (Path("/sys/module/nvidia/version"),):
        if path.exists():
            return path.read_text().strip()
    return None


@functools.cache
def commit() -> str | None:
    """Commit of the checkout this package runs from (with ``+`` when files are changed), or None outside of one."""
    root = PACKAGE.parent
    if not (root / ".git").exists():
        return None
    try:
        head = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip()


@functools.cache
def kernel_hash() -> str:
    """Hash over names and contents of the kernel sources that are here: equal hashes ran the same kernels."""
    digest = hashlib.sha256()
    roots = [root for name in _KERNEL_FOLDERS for root in (PACKAGE.parent / name, PACKAGE / name) if root.is_dir()]
    seen: set[Path] = set()
    for root in roots:
        for path in sorted(root.rglob("*")):
            real = path.resolve()
            if path.is_file() and real not in seen and "__pycache__" not in path.parts:
                seen.add(real)
                digest.update(f"{root.name}/{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def machine(device: str) -> dict[str, Any]:
    """The facts that stand in every file of results."""
    module = compiled_module()
    facts: dict[str, Any] = {
        "device": device,
        "cpu": processor(),
        "isa": module.cpu_isa() if module else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "memkern": memkern.__version__,
        "commit": commit(),
        "kernels": kernel_hash(),
        "built": {name: library.loaded for name, library in native.LIBRARIES.items()},
    }
    if device == "cuda":
        facts |= {"gpu": gpus()[0], "cuda": torch.version.cuda, "driver": driver()}
    return facts


def line(facts: dict[str, Any]) -> str:
    """The machine in one line."""
    name = facts["gpu"]["name"] if facts["device"] == "cuda" else facts["cpu"]["model"]
    parts = [str(name), f"{facts['cpu']['cores']} CPU cores"]
    if facts["isa"]:
        parts.append(str(facts["isa"]))
    parts += [f"torch {facts['torch']}", f"triton {facts['triton'] or 'none'}", f"python {facts['python']}"]
    if facts["device"] == "cuda":
        parts.append(f"driver {facts['driver']}")
    parts += [f"memkern {facts['memkern']} ({facts['commit'] or 'no checkout'}, kernels {facts['kernels']})"]
    return ", ".join(parts)


def slug(facts: dict[str, Any]) -> str:
    """Folder name of this machine under ``results/``."""
    name = facts["gpu"]["name"] if facts["device"] == "cuda" else f"{facts['cpu']['model']} {facts['isa'] or ''}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
