"""How a backend is chosen and refused, and what a broken library does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import memkern
from memkern import backends, native
from memkern._interface import interface
from memkern.ops import route_experts, temperature_softmax

X, W = torch.randn(2, 3, 4), torch.randn(3, 4)


def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "MEMKERN_BACKEND")}
    return subprocess.run([sys.executable, "-c", code], env={**clean, **env}, capture_output=True, text=True)


def test_use_backend_is_a_function_and_a_context_manager() -> None:
    assert backends._forced is None
    with memkern.use_backend("reference") as chosen:
        assert backends.select("route_experts", None, X, W) == "reference"
        assert chosen is not None
    assert backends._forced is None
    memkern.use_backend("reference")
    assert backends.select("route_experts", None, X, W) == "reference"
    memkern.use_backend(None)
    assert backends._forced is None
    with pytest.raises(ValueError, match="unknown backend 'cudnn'; the known ones are reference, cpp, triton, cuda"):
        memkern.use_backend("cudnn")


def test_explicit_argument_beats_the_process_wide_choice() -> None:
    with memkern.use_backend("cuda"):
        assert backends.select("route_experts", "reference", X, W) == "reference"
        with pytest.raises(memkern.BackendUnavailable):
            route_experts(X, W)


def test_explain_and_available() -> None:
    reasons = backends.explain("route_experts", X, W)
    assert list(reasons) == list(backends.NAMES)
    assert reasons["reference"] is None
    assert reasons["cuda"]
    assert "reference" in backends.available()
    assert set(backends.available()) <= set(backends.NAMES)
    assert (
        "not float64" in str(backends.explain("route_experts", X.double().to("cpu"))["triton"])
        or reasons["triton"] is not None
    )
    with pytest.raises(ValueError, match="unknown operator 'attention'"):
        backends.explain("attention")
    assert isinstance(memkern.BackendUnavailable("x"), RuntimeError)


def test_environment_variable() -> None:
    code = "import torch; from memkern.ops import route_experts; route_experts(torch.ones(1, 2, 3), torch.ones(2, 3))"
    refused = run(code, MEMKERN_BACKEND="triton")
    assert "BackendUnavailable" in refused.stderr
    assert "TRITON_INTERPRET=1" in refused.stderr


def test_the_environment_is_read_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = torch.compile(lambda x: temperature_softmax(x), backend="eager", fullgraph=True)
    compiled(W)
    monkeypatch.setenv("MEMKERN_BACKEND", "cuda")
    for call in (temperature_softmax, compiled, lambda x: route_experts(X, x)):
        with pytest.raises(Exception, match="cannot run"):
            call(W)
    temperature_softmax(W, backend="reference")
    with memkern.use_backend("reference"):
        temperature_softmax(W)
    monkeypatch.setenv("MEMKERN_BACKEND", "fast")
    with pytest.raises(ValueError, match="MEMKERN_BACKEND: unknown backend 'fast'; the known ones are reference, cpp"):
        temperature_softmax(W)
    monkeypatch.setenv("MEMKERN_BACKEND", "")
    compiled(W)
    route_experts(X, W)


def test_import_is_lean() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import memkern, memkern.ops\n"
        "new = set(sys.modules) - before\n"
        "heavy = {m.split('.')[0] for m in new} & {'triton', 'transformers', 'typer', 'rich', 'matplotlib'}\n"
        "assert not heavy, heavy\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_a_broken_library_is_reported_and_does_not_break_the_import(tmp_path: Path) -> None:
    (tmp_path / "_ops_cpu.so").write_bytes(b"not a library")
    library = native.load("cpu", tmp_path)
    assert not library.loaded
    assert library.broken
    assert torch.__version__ in str(library.reason)
    assert "rebuild it with" in str(library.reason)
    missing = native.load("cpu", tmp_path / "nowhere")
    assert "was not built" in str(missing.reason)
    assert not missing.broken


def test_a_stale_library_names_both_versions() -> None:
    reason = native.mismatch("cpu", {"memkern": "0.0.1"})
    assert reason is not None
    assert "memkern 0.0.1" in reason
    assert f"memkern {memkern.__version__}" in reason
    assert "rebuild it with" in reason
    there = interface(native.CSRC, "cpu")
    if there is not None:
        older = native.mismatch("cpu", {"memkern": memkern.__version__, "interface": {"cpu": "0123456789ab"}})
        assert older is not None
        assert "bindings 0123456789ab" in older
        assert there in older
        assert native.REPAIR in older
        assert native.mismatch("cpu", {"memkern": memkern.__version__, "interface": {"cpu": there}}) is None
    cuda = native.mismatch("cuda", {"memkern": memkern.__version__, "cuda": "11.8"})
    assert "CUDA 11.8" in str(cuda)


def test_first_use_of_a_broken_library_warns_once(tmp_path: Path) -> None:
    package = Path(memkern.__file__).parent
    copy = tmp_path / "memkern"
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "results", "triton_kernels", "benchmarks")
    shutil.copytree(package, copy, ignore=ignore, symlinks=False)
    (copy / "_ops_cpu.so").write_bytes(b"stale")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import warnings, torch, memkern\n"
        "from memkern.ops import route_experts\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    for _ in range(2): route_experts(torch.ones(1, 2, 3), torch.ones(2, 3))\n"
        "assert len(caught) == 1, caught\n"
        "text = str(caught[0].message)\n"
        "assert 'does not load' in text and torch.__version__ in text and 'rebuild' in text, text\n"
    )
    done = run(code, PYTHONPATH="")
    assert done.returncode == 0, done.stderr


def test_a_library_older_than_the_python_files_lacks_an_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    if not memkern.native.LIBRARIES["cpu"].loaded:
        pytest.skip("the cpu library is not here")
    for table in ("_DTYPES", "_MISSING"):
        monkeypatch.setattr(backends, table, dict(getattr(backends, table)))
    library = torch.library.Library("memkern", "FRAGMENT")
    try:
        library.define("newer_fwd_cpp(Tensor x) -> Tensor")
        backends.declare("newer", cpp=backends.ALL)
        reason = backends.explain("newer", torch.zeros(1))["cpp"]
        assert reason is not None
        assert "_ops_cpu.so has no newer" in reason
        assert "make build" in reason
        with pytest.warns(RuntimeWarning, match="older than the Python files"):
            assert backends.select("newer", None, torch.zeros(1)) == "reference"
        with pytest.raises(memkern.BackendUnavailable, match="older than the Python files"):
            backends.select("newer", "cpp", torch.zeros(1))
        library.impl("newer_fwd_cpp", torch.clone, "CPU")
        backends._MISSING.clear()
        backends.declare("newer", cpp=backends.ALL)
        assert backends.explain("newer", torch.zeros(1))["cpp"] is None
    finally:
        library._destroy()
