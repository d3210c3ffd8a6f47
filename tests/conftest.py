"""One suite over every backend: a test that takes ``backend`` runs on each, skipping with a reason where one is absent.

``--backend NAME`` selects, ``--require-backend NAME`` turns that backend's skip into a failure.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd")
# Triton reads this when it is first imported, and it then holds for the whole process.
assert "TRITON_INTERPRET" in os.environ or "triton" not in sys.modules, "triton came before its interpreter was chosen"
if "TRITON_INTERPRET" not in os.environ and not any(Path(p).exists() for p in _GPU_DEVICES):
    os.environ["TRITON_INTERPRET"] = "1"

_WORKER = os.environ.get("PYTEST_XDIST_WORKER")
if _WORKER:
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # the workers share the cores

import pytest  # noqa: E402
import torch  # noqa: E402

import memkern  # noqa: E402
from memkern.testing import emulate  # noqa: E402
from memkern.testing.interpreter import patch_once  # noqa: E402
from memkern.testing.poison import poisoned  # noqa: E402

if _WORKER:
    torch.set_num_threads(1)

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETING and importlib.util.find_spec("triton"):
    patch_once()


@dataclass(frozen=True)
class BackendUnderTest:
    """A backend with the device its tensors live on; ``slow`` asks a test for small shapes."""

    id: str
    name: str
    device: str

    @property
    def slow(self) -> bool:
        return self.id in ("triton_interp", "cuda_emulated")

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        return memkern.backends.ALL if self.name in ("reference", "cpp") else memkern.backends.LOW

    def absent(self) -> str | None:
        """Why this backend cannot be tested here, or None."""
        if self.id == "triton_interp" and not INTERPRETING:
            return "the Triton interpreter is off (TRITON_INTERPRET)"
        if self.id in ("triton", "cuda") and not torch.cuda.is_available():
            return "no GPU"
        if self.id == "cuda_emulated":
            return emulate.absent()
        if self.id == "triton" and INTERPRETING:
            return "the Triton interpreter is on"
        return memkern.backends._absent(self.name, self.device)


BACKENDS = {
    case.id: case
    for case in (
        BackendUnderTest("reference", "reference", "cuda" if torch.cuda.is_available() else "cpu"),
        BackendUnderTest("cpp", "cpp", "cpu"),
        BackendUnderTest("triton_interp", "triton", "cpu"),
        BackendUnderTest("triton", "triton", "cuda"),
        BackendUnderTest("cuda", "cuda", "cuda"),
        BackendUnderTest("cuda_emulated", "cuda", "cpu"),  # on request alone: --backend cuda_emulated
    )
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", action="append", choices=BACKENDS, help="run only these backends' tests")
    parser.addoption(
        "--require-backend", action="append", choices=BACKENDS, default=[], help="fail where this backend is absent"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What compiles for minutes comes first, so that no worker is left alone with it at the end."""
    items.sort(key=lambda item: "kernels" not in item.path.parts)


def pytest_report_header(config: pytest.Config) -> list[str]:
    lines = [f"{case.id}: {case.absent() or 'here'}" for case in BACKENDS.values()]
    return ["backends: " + "; ".join(lines)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" not in metafunc.fixturenames:
        return
    required = metafunc.config.getoption("--require-backend")
    params = []
    for name in metafunc.config.getoption("--backend") or [name for name in BACKENDS if name != "cuda_emulated"]:
        reason = BACKENDS[name].absent()
        skip = reason is not None and name not in required
        marks = [pytest.mark.skip(reason=f"backend {name}: {reason}")] if skip else []
        params.append(pytest.param(BACKENDS[name], id=name, marks=marks))
    metafunc.parametrize("backend", params)


@pytest.fixture(autouse=True)
def _required(request: pytest.FixtureRequest) -> None:
    """A required backend that is absent fails each of its tests with the reason."""
    if "backend" in request.fixturenames:
        case = request.getfixturevalue("backend")
        reason = case.absent()
        if reason is not None:
            pytest.fail(f"backend {case.id} is required, but: {reason}")


@pytest.fixture(autouse=True)
def _emulated(request: pytest.FixtureRequest) -> Iterator[None]:
    if "backend" in request.fixturenames and request.getfixturevalue("backend").id == "cuda_emulated":
        with emulate.emulated():
            yield
    else:
        yield


@pytest.fixture
def poison() -> object:
    """Uninitialised memory, C++ allocations among it, holds NaN (integers: their maximum) while a test runs."""
    with poisoned():
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
