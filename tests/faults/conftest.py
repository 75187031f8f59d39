"""One corpus for the tests that need no more, and what a night that nobody disturbs makes of it."""

from pathlib import Path
from typing import Any

import pytest

from infra.store import Location, open_store
from tests.faults.buckets import config, content, fill, published
from tests.faults.night import Night


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty pictures. Not to be changed."""
    folder = tmp_path_factory.mktemp("faults") / "corpus"
    fill(folder, 0, 30)
    return folder


@pytest.fixture(scope="session")
def expected(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """What a folder gives."""
    base = tmp_path_factory.mktemp("undisturbed")
    assert Night(config(corpus, base / "store"), base / "told").end().status == 0
    return content(published(open_store(Location(uri=str(base / "store")))))
