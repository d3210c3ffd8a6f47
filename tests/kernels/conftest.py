"""``toolchain``: a test that takes it runs once for the installed Triton and once for the second one, if it is here."""

from __future__ import annotations

import os

import pytest

from memkern.testing import aot


@pytest.fixture(params=aot.toolchains(), ids=lambda toolchain: toolchain.name)
def toolchain(request: pytest.FixtureRequest) -> aot.Toolchain:
    found: aot.Toolchain = request.param
    if found.absent:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(found.absent)
    return found


# What is open, by test: named here and in the README's status, and expected to fail until the tiles are smaller.
OPEN = {
    "test_nvcc.py::test_compiles_without_spills[routing/forward.cu-80]": "six forward kernels spill 4 bytes on sm_80",
    "test_nvcc.py::test_compiles_without_spills[routing/row_ops.cu-100]": "a row kernel spills on sm_100",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        reason = OPEN.get(item.nodeid.removeprefix("tests/kernels/"))
        if reason is not None:
            item.add_marker(pytest.mark.xfail(reason=reason, raises=(AssertionError, RuntimeError), strict=False))
