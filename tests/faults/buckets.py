"""Small real corpora, the config that builds them, and what a reader sees of a store."""

import csv
import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flows.build import stages
from flows.config import open_build, parse_config
from infra.store import NotFound, Store

SAMPLE = Path(__file__).parents[2] / "sample"
# What of a version must not depend on how often its build died; the others tell of the run.
OF_THE_RUN = ("README.md", "report.html")


def fill(folder: Path, first: int, last: int) -> None:
    """Pictures `first` to `last` of the sample bucket and their captions file; others go."""
    with (SAMPLE / "bucket/captions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[first:last]
    shutil.rmtree(folder, ignore_errors=True)
    for row in rows:
        target = folder / row["file_name"]
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(SAMPLE / "bucket" / row["file_name"], target)
    with (folder / "captions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def config(corpus: Path | dict[str, Any], store: Path | dict[str, Any], **sections: Any) -> Any:
    """The config of a build of the sample's models on two threads."""
    return {
        "dataset": "few",
        "corpus": corpus if isinstance(corpus, dict) else {"uri": str(corpus)},
        "store": store if isinstance(store, dict) else {"uri": str(store)},
        "models": {
            "clip": {"library": "open_clip", "name": str(SAMPLE / "models/clip")},
            "dino": {"library": "timm", "name": str(SAMPLE / "models/dino")},
        },
        "spaces": {
            "clip_image": {"model": "clip"},
            "dino": {"model": "dino"},
            "clip_text": {"model": "clip", "of": "caption"},
        },
        "pairs": {"targets": 6},
        "cluster": {"kind": "threads", "workers": 2},
    } | sections


def build_here(config: dict[str, Any]) -> dict[str, Any]:
    """Run the stages in this process, without Prefect; what they say at their end."""
    parsed = parse_config(config)
    with open_build(parsed) as opened:
        return stages(opened, parsed)


def published(store: Store, dataset: str = "few") -> dict[str, Any] | None:
    """The version that a reader finds, every file of it re-hashed; None before the first.

    Raises AssertionError where any part of it is not there or not what the manifest says.
    """
    try:
        latest = json.loads(store.get(f"datasets/{dataset}/latest.json"))
    except NotFound:
        return None
    folder = f"datasets/{dataset}/v{latest['version']:06d}"
    manifest = json.loads(store.get(f"{folder}/manifest.json"))
    assert {k: manifest[k] for k in latest} == latest
    for file in manifest["files"]:
        data = store.get(f"{folder}/{file['name']}")
        assert hashlib.sha256(data).hexdigest() == file["sha256"], file["name"]
    return {
        "version": manifest["version"],
        "digest": manifest["digest"],
        "files": {f["name"]: f["sha256"] for f in manifest["files"] if f["name"] not in OF_THE_RUN},
    }


def content(version: dict[str, Any] | None) -> tuple[Any, Any]:
    """What of a published version any build of this corpus must give."""
    return (version["digest"], version["files"]) if version else (None, None)


@contextmanager
def reader(store: Store, dataset: str = "few") -> Iterator[list[dict[str, Any]]]:
    """A reader that looks all the time; yields the different versions it has seen, in order."""
    seen: list[dict[str, Any]] = []
    failures: list[BaseException] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.wait(0.02):
            try:
                version = published(store, dataset)
            except BaseException as error:
                failures.append(error)
                return
            if version and (not seen or version != seen[-1]):
                seen.append(version)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()
    if failures:
        raise AssertionError("a reader saw half a version") from failures[0]
