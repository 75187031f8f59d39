"""A build in an empty folder."""

from pathlib import Path

import pytest

from infra.build import Build
from tests.tasks.examples import new_build


@pytest.fixture
def build(tmp_path: Path) -> Build:
    return new_build(tmp_path)
