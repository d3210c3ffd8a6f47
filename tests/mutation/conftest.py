"""``suite``: a copy of the sources in which mistakes are planted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from memkern.testing.mutation import Suite


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Suite]:
    suite = Suite(tmp_path_factory.mktemp("sources"))
    yield suite
    suite.close()
