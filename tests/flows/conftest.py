"""A dataset of three real versions, made once, for every test that asks questions of one."""

import csv
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from PIL import Image

from flows.step import prefect_environment

# Before any test module imports Prefect, which reads its settings then.
os.environ.update(prefect_environment() | os.environ)

SAMPLE = Path(__file__).parents[2] / "sample" / "bucket"
PICTURES = 48
COLOURS = ("red", "green", "blue", "yellow", "black")
THINGS = ("flower", "boat", "kite")


@pytest.fixture(scope="session")
def prefect_server():
    """A Prefect server with a fresh database, for every flow that a test runs."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


class History(NamedTuple):
    """A folder with a corpus, a store and the config of a dataset; the keys of its pictures."""

    folder: Path
    config: Path
    keys: list[str]

    @property
    def dataset(self) -> Path:
        return self.folder / "store/datasets/few"


def write_corpus(folder: Path) -> list[str]:
    """Pictures of the sample under captions of our own, with a copy and a smaller copy of one."""
    with (SAMPLE / "captions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[:PICTURES]
    for row in rows:
        (folder / row["file_name"]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(SAMPLE / row["file_name"], folder / row["file_name"])
    with (folder / "captions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "caption"])
        for at, row in enumerate(rows):
            caption = f"{COLOURS[at % len(COLOURS)]} {THINGS[at % len(THINGS)]}"
            writer.writerow([row["file_name"], caption])
    first = Image.open(folder / rows[0]["file_name"]).convert("RGB")
    first.resize((first.width * 3 // 4, first.height * 3 // 4)).save(folder / "smaller.png")
    shutil.copy(folder / rows[0]["file_name"], folder / "images/zz copy.jpg")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n no picture")
    return [row["file_name"] for row in rows]


def config_of(folder: Path, models: Any, **sections: Any) -> dict[str, Any]:
    return {
        "dataset": "few",
        "corpus": {"uri": str(folder / "corpus")},
        "store": {"uri": str(folder / "store")},
        "models": {name: model.model_dump(mode="json") for name, model in models.items()},
        "spaces": {
            "clip_image": {"model": "clip", "band": {"low": 0.5}},
            "dino": {"model": "dino", "band": {"low": 0.6}},
            "clip_text": {"model": "clip", "of": "caption", "band": {"low": 0.3}},
        },
        "neighbours": {"k": 10},
        "cluster": {"kind": "threads"},
    } | sections


def run_build(data: dict[str, Any]) -> dict[str, Any]:
    from flows.build import stages
    from flows.config import open_build, parse_config

    config = parse_config(data)
    with open_build(config) as opened:
        return stages(opened, config)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, models: Any) -> History:
    """Version 1 lacks two pictures; in 2 they arrive, one leaves, one has new bytes; 3 has other
    settings."""
    folder = tmp_path_factory.mktemp("history")
    corpus = folder / "corpus"
    keys = write_corpus(corpus)
    late = {key: (corpus / key).read_bytes() for key in keys[2:4]}
    for key in late:
        (corpus / key).unlink()
    run_build(config_of(folder, models))
    for key, data in late.items():
        (corpus / key).write_bytes(data)
    (corpus / keys[5]).unlink()
    shutil.copy(corpus / keys[7], corpus / keys[6])
    run_build(config_of(folder, models))
    data = config_of(folder, models, pairs={"targets": 2})
    run_build(data)
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(data, sort_keys=False), "utf-8")
    return History(folder, config, keys)


@pytest.fixture
def history(made: History, tmp_path: Path) -> History:
    """A copy of the store with those versions, to be changed; the corpus is the same one."""
    shutil.copytree(made.folder / "store", tmp_path / "store")
    text = made.config.read_text("utf-8")
    config = tmp_path / "config.yaml"
    config.write_text(text.replace(str(made.folder / "store"), str(tmp_path / "store")), "utf-8")
    return made._replace(folder=tmp_path, config=config)


@pytest.fixture
def elsewhere(history: History, made: History) -> History:
    """The same with a corpus of its own, built once more in its new place."""
    shutil.copytree(made.folder / "corpus", history.folder / "corpus")
    text = history.config.read_text("utf-8")
    text = text.replace(str(made.folder / "corpus"), str(history.folder / "corpus"))
    history.config.write_text(text, "utf-8")
    run_build(yaml.safe_load(text))
    return history


class Said(NamedTuple):
    """What a command printed, and its exit status."""

    out: str
    status: int


@pytest.fixture
def pairmill(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Said]:
    """Runs the command line in this process, in a wide terminal without colours."""
    from typer.testing import CliRunner

    from flows.cli import app

    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: Any) -> Said:
        done = CliRunner().invoke(app, [str(word) for word in words])
        if done.exception and not isinstance(done.exception, SystemExit):
            raise done.exception
        return Said(done.output, done.exit_code)

    return run


@pytest.fixture(scope="session")
def first_night(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a corpus and a store with one version of it, to be copied."""
    from tests.flows.place import opened

    folder = tmp_path_factory.mktemp("first")
    with opened(folder, fresh=True) as place:
        place.build()
    return folder


@pytest.fixture
def place(first_night: Path, tmp_path: Path) -> Iterator[Any]:
    """A copy of the first night, built once more where it lies now: its files are other files."""
    from tests.flows.place import opened

    for name in ("corpus", "store"):
        shutil.copytree(first_night / name, tmp_path / name)
    with opened(tmp_path) as here:
        assert here.build()["work"]["images_decoded"] == 0
        yield here
