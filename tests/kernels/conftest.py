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
