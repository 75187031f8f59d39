"""A corpus that changes while it is listed and read, and clocks that went backwards."""

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.errors import PairmillError
from infra.folder import FolderStore
from infra.store import Location, open_store
from tests.faults.buckets import build_here, config, content, fill, published
from tests.faults.night import no_report

DAY = 86_400


@pytest.fixture(autouse=True, scope="module")
def _quickly() -> Iterator[None]:
    """The charts of a report take half of a small night."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flows.build.render", no_report)
        yield


def build(corpus: Path, store: Path) -> dict[str, Any]:
    return build_here(config(corpus, store))


def said(store: Path) -> tuple[Any, Any]:
    return content(published(open_store(Location(uri=str(store)))))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    fill(tmp_path / "corpus", 0, 30)
    return tmp_path / "corpus"


def pictures(corpus: Path) -> list[Path]:
    return sorted(path for path in corpus.rglob("*") if path.suffix in (".png", ".jpg"))


# While the corpus is read --------------------------------------------------------------------


def vanish(corpus: Path) -> None:
    for path in pictures(corpus)[::5]:
        path.unlink()


def appear(corpus: Path) -> None:
    shutil.copy(pictures(corpus)[0], corpus / "copy.png")


def change(corpus: Path) -> None:
    first, second, *_ = pictures(corpus)
    first.write_bytes(second.read_bytes())


def caption(corpus: Path) -> None:
    path = corpus / "captions.csv"
    path.write_text(path.read_text("utf-8").replace(" a ", " the "), "utf-8")


@pytest.mark.parametrize("happen", [vanish, appear, change, caption])
def test_what_happens_between_listing_and_reading_is_right_the_next_night(
    corpus, tmp_path, monkeypatch, happen: Callable[[Path], None]
):
    once = [happen]
    read = FolderStore.get

    def get(self: FolderStore, key: str, *args: Any, **named: Any) -> bytes:
        if self.uri == str(corpus) and once:
            once.pop()(corpus)
        return read(self, key, *args, **named)

    with monkeypatch.context() as patch:
        patch.setattr(FolderStore, "get", get)
        result = build(corpus, tmp_path / "store")
    assert not once
    assert sum(result["fates"].values()) == result["work"]["objects_listed"]
    build(corpus, tmp_path / "store")
    build(corpus, tmp_path / "fresh")
    assert said(tmp_path / "store") == said(tmp_path / "fresh")


def test_a_caption_file_that_is_written_all_the_time_is_an_error(corpus, tmp_path, monkeypatch):
    read = FolderStore.get

    def get(self: FolderStore, key: str, *args: Any, **named: Any) -> bytes:
        if key == "captions.csv":
            (corpus / key).write_text((corpus / key).read_text("utf-8") + "\n", "utf-8")
        return read(self, key, *args, **named)

    monkeypatch.setattr(FolderStore, "get", get)
    with pytest.raises(PairmillError, match=r"captions\.csv keeps changing while it is read"):
        build(corpus, tmp_path / "store")


# Clocks --------------------------------------------------------------------------------------


def test_no_time_of_a_file_in_the_store_decides(corpus, tmp_path):
    draw = random.Random(5)
    for last in (24, 30, 27):
        fill(corpus, 0, last)
        build(corpus, tmp_path / "store")
        for path in (p for p in (tmp_path / "store").rglob("*") if p.is_file()):
            moment = path.stat().st_mtime + draw.choice([-400, -1, 1, 400]) * DAY
            os.utime(path, (moment, moment))
    build(corpus, tmp_path / "fresh")
    assert said(tmp_path / "store") == said(tmp_path / "fresh")


@pytest.mark.parametrize("days", [-1000, 1000])
def test_a_picture_replaced_while_the_clock_was_wrong_is_seen(corpus, tmp_path, days):
    build(corpus, tmp_path / "store")
    first, second, *_ = pictures(corpus)
    first.write_bytes(second.read_bytes())
    moment = first.stat().st_mtime + days * DAY
    os.utime(first, (moment, moment))
    build(corpus, tmp_path / "store")
    build(corpus, tmp_path / "fresh")
    assert said(tmp_path / "store") == said(tmp_path / "fresh")
