"""What an install puts where: wheels, sdists, no compiler, a compile error, CUDA without a GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

Pip = Callable[..., str]
PURE = {"MEMKERN_BUILD_CPP": "0"}


def build_wheel(pip: Pip, source: Path, target: Path, **environment: str) -> Path:
    pip("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", target, source, cwd=source.parent, **environment)
    (wheel,) = target.glob("memkern-*.whl")
    return wheel


def installed(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python code with the installed package, from a folder that is no checkout."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(folder), **environment},
    )  # fmt: skip


def test_a_pure_wheel_works_and_carries_what_it_needs(checkout: Path, pip: Pip, tmp_path: Path) -> None:
    wheel = build_wheel(pip, checkout, tmp_path / "dist", **PURE)
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "memkern",
        next(n for n in names if "dist-info" in n).split("/")[0],
    }
    for needed in (
        "memkern/py.typed", "memkern/configs/dispatch.json", "memkern/reference/golden.json",
        "memkern/triton_kernels/_common.py", "memkern/benchmarks/ops/routing.py", "memkern/cli/demo/routing.py",
    ):  # fmt: skip
        assert needed in names
    assert not [name for name in names if "/results/" in name or name.endswith((".so", ".cu", ".cpp"))]
    folder = installed(wheel, tmp_path / "site")
    code = "import memkern, sys; print(memkern.__file__); print(memkern.backends.available())"
    done = run(code, folder)
    assert done.returncode == 0, done.stderr
    place, available = done.stdout.splitlines()
    assert Path(place).is_relative_to(folder)
    assert "reference" in available
    assert "cpp" not in available
    done = run(
        "from memkern.cli import main; main(['validate', '--op', 'routing_entropy', '--backend', 'reference'])", folder
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_sdist_builds_the_same_pure_wheel(checkout: Path, pip: Pip, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(tmp_path)],
        cwd=checkout, capture_output=True, text=True, env={**os.environ, **PURE},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("memkern-*.tar.gz")
    with tarfile.open(archive) as held:
        held.extractall(tmp_path / "unpacked", filter="data")
        sources = {name.split("/", 1)[1] for name in held.getnames() if "/" in name}
    assert {"csrc/module.cpp", "CMakeLists.txt", "setup.py", "Makefile", "LICENSE"} <= sources
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    from_sdist = build_wheel(pip, unpacked, tmp_path / "one", **PURE)
    from_checkout = build_wheel(pip, checkout, tmp_path / "two", **PURE)

    def contents(wheel: Path) -> set[str]:
        return {name for name in zipfile.ZipFile(wheel).namelist() if "dist-info" not in name}

    assert contents(from_sdist) == contents(from_checkout)


def test_no_compiler_gives_a_pure_install_that_says_so(checkout: Path, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=checkout, capture_output=True, text=True, env={**os.environ, "PATH": str(tools), "CXX": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler" in done.stdout + done.stderr
    assert not list((checkout / "memkern").glob("*.so"))
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=checkout, capture_output=True, text=True,
        env={**os.environ, "PATH": str(tools), "CXX": "", "MEMKERN_BUILD_CPP": "1"},
    )  # fmt: skip
    assert done.returncode != 0
    assert "MEMKERN_BUILD_CPP=1, but there is no C++ compiler" in done.stdout + done.stderr


@pytest.mark.parametrize(("name", "value"), [("MEMKERN_BUILD_CPP", "perhaps"), ("TORCH_CUDA_ARCH_LIST", "ninety")])
def test_bad_variables_are_named(checkout: Path, name: str, value: str) -> None:
    if name == "TORCH_CUDA_ARCH_LIST" and not shutil.which("nvcc"):
        pytest.skip("there is no nvcc here")
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=checkout, capture_output=True, text=True,
        env={**os.environ, "MEMKERN_BUILD_CUDA": "1", name: value},
    )  # fmt: skip
    assert done.returncode != 0
    assert name in done.stdout + done.stderr


def few_sources(checkout: Path) -> None:
    """Leave what every build has, so that a test of the build itself does not compile all the kernels."""
    for kind in ("cpu", "cuda", "bind_cpu", "bind_cuda"):
        for path in (checkout / "csrc" / kind).iterdir():
            if path.stem not in ("limits", "build_info", "dispatch", "isa", "common"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="there is no C++ compiler here")
def test_a_compiled_wheel_loads_and_a_compile_error_fails_the_install(checkout: Path, pip: Pip, tmp_path: Path) -> None:
    few_sources(checkout)
    wheel = build_wheel(pip, checkout, tmp_path / "dist", MEMKERN_BUILD_CUDA="0")
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert f"-{tag}-{tag}-" in wheel.name
    folder = installed(wheel, tmp_path / "site")
    done = run("import memkern; print(memkern.native.LIBRARIES['cpu'].reason)", folder)
    assert done.stdout.strip() == "None", done.stdout + done.stderr
    (checkout / "csrc" / "cpu" / "broken.cpp").write_text("this is no C++\n")
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=checkout, capture_output=True, text=True, env={**os.environ, "MEMKERN_BUILD_CUDA": "0"},
    )  # fmt: skip
    assert done.returncode != 0
    assert "the native build failed" in done.stdout + done.stderr
    assert not list((checkout / "memkern").glob("_ops_cpu.so"))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nvcc"), reason="there is no nvcc here")
def test_cuda_builds_without_a_gpu(checkout: Path) -> None:
    few_sources(checkout)
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=checkout, capture_output=True, text=True,
        env={**os.environ, "MEMKERN_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0a"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (checkout / "memkern" / "_ops_cuda.so").exists()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nvcc"), reason="there is no nvcc here")
@pytest.mark.skipif(os.environ.get("MEMKERN_LINK_CUDA") != "1", reason="80 s of nvcc: on request (MEMKERN_LINK_CUDA=1)")
def test_the_cuda_library_links_with_every_column(checkout: Path) -> None:
    """No binding without its kernels. Nothing optimises them here: tests/kernels looks at their machine code."""
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=checkout, capture_output=True, text=True,
        env={
            **os.environ, "MEMKERN_BUILD_CPP": "0", "MEMKERN_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0a",
            "NVCC_APPEND_FLAGS": "-Xcicc -O0 -Xptxas -O0",
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    symbols = subprocess.run(
        ["nm", "-DC", "--undefined-only", str(checkout / "memkern" / "_ops_cuda.so")],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "memkern::" not in symbols


def test_triton_kernels_of_others_stay_importable(tmp_path: Path) -> None:
    """The folder triton_kernels/ at the root is no package: an installed one of that name wins."""
    root = Path(__file__).parents[2]
    other = tmp_path / "triton_kernels"
    other.mkdir()
    (other / "__init__.py").write_text("whose = 'theirs'\n")
    code = "import triton_kernels; print(triton_kernels.whose)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.stdout.strip() == "theirs", done.stderr
