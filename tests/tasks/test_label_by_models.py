"""A dozen pairs labelled by real models: in process, and behind a server process."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from infra import responses
from infra.budget import Bill
from tasks.label_pairs import LabelParams, label_pairs
from tests.corpora import fill
from tests.pictures import jpeg
from tests.tasks.examples import new_build, put, rows
from tests.tiny_mllms import write_parrot, write_qwen

pytestmark = pytest.mark.usefixtures("one_thread")

SAYING = {
    "common": "two flat drawings",
    "differences": {"query": "a red leaf", "target": "one in blue"},
    "instructions": ["Make it blue", "A blue one, please", "The same thing, but blue instead"],
}


@pytest.fixture(scope="module")
def parrot(tmp_path_factory) -> Path:
    return write_parrot(tmp_path_factory.mktemp("parrot") / "model", json.dumps(SAYING))


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The URL of a server process."""
    command = [sys.executable, "-m", "tests.model_server", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout
            yield server.stdout.readline().strip()
        finally:
            server.terminate()


def label(build, **params) -> dict[str, list[str] | str]:
    """Label a dozen pairs of four pictures: {pair_id: instructions or rule}."""
    files = {f"{n}.jpg": jpeg(64, 48, n) for n in range(4)}
    fill(build, files)
    ids = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    objects = [(name, None, "s", 0, len(files[name]), image_id) for name, image_id in ids.items()]
    pairs = [(f"{a[0]}>{b[0]}", ids[a], ids[b], [], []) for a in ids for b in ids if a != b]
    told = {"labeller": "mllm", "max_pixels": 4_096, "max_tokens": 256, "calls": "one"}
    found = label_pairs(
        build,
        put(build, "pairs", "pair_id query target ties negatives", pairs),
        put(build, "eligible", "image_id caption_id clip_score", [(i, i, 0) for i in ids.values()]),
        put(build, "captions", "caption_id text", [(i, f"thing {i[:4]}") for i in ids.values()]),
        put(build, "objects", "key member stamp offset size image_id", objects),
        LabelParams(**told | params),
    )
    labels = {row["pair_id"]: row["instructions"] for row in rows(build, found.labels)}
    return labels | {row["id"]: row["rule"] for row in rows(build, found.drops)}


def another(build):
    """The next build in the same store, with work and bill of its own."""
    return replace(build, work=Counter(), bill=Bill())


def local(folder: Path, **more) -> dict:
    return {"name": str(folder), "device": "cpu", "batch_size": 4, **more}


def test_a_model_in_process_labels_every_pair_once(parrot, tmp_path):
    build = new_build(tmp_path)
    found = label(build, local=local(parrot))
    assert list(found.values()) == [SAYING["instructions"]] * 12
    assert build.work["labels_requested"] == 12
    cost = build.bill.stages["label_pairs"]
    tokens = -(-len(json.dumps(SAYING)) // 7) + 1
    assert cost["output_tokens"] == 12 * tokens and cost["input_tokens"] > 12 * 100
    again = another(build)
    assert label(again, local=local(parrot, batch_size=2)) == found
    # Another question of the stage, but the same requests: the store has the answers.
    assert label(again, local=local(parrot), instructions=3, publish_partial=False) == found
    assert again.work["labels_requested"] == 0


def test_other_weights_under_the_same_name_are_asked_anew(parrot, tmp_path):
    folder = shutil.copytree(parrot, tmp_path / "model")
    build = new_build(tmp_path)
    label(build, local=local(folder))
    changed = {**SAYING, "instructions": ["Redder", "A red one, please", "The same, in red"]}
    write_parrot(folder, json.dumps(changed))
    later = another(build)
    assert list(label(later, local=local(folder)).values()) == [changed["instructions"]] * 12
    assert later.work["labels_requested"] == 12


def test_noise_is_a_final_fate_of_each_pair_and_is_not_asked_for_again(tiny_mllms, tmp_path):
    build = new_build(tmp_path)
    found = label(build, local=local(tiny_mllms["qwen"]), max_tokens=64)
    assert len(found) == 12
    assert set(found.values()) <= {"wrong_schema", "truncated", "empty"}
    asked = build.work["labels_requested"]
    assert 12 <= asked <= 24  # one repair at most
    again = another(build)
    assert label(again, local=local(tiny_mllms["qwen"]), max_tokens=64) == found
    assert again.work["labels_requested"] == 0


def test_a_budget_of_calls_holds_for_a_model_of_our_own(parrot, tmp_path):
    build = new_build(tmp_path)
    found = label(build, local=local(parrot), budget={"calls": 5})
    assert Counter(map(str, found.values()))["over_budget"] == 7
    assert build.work["labels_requested"] == 5
    later = another(build)
    assert "over_budget" not in label(later, local=local(parrot)).values()
    assert later.work["labels_requested"] == 7


def test_a_real_model_behind_a_real_server_labels_every_pair_once(tmp_path):
    folder, build = write_qwen(tmp_path / "model"), new_build(tmp_path)
    with serving(folder) as url:
        endpoint = {"url": url, "model": "tiny", "concurrency": 4}
        found = label(build, endpoint=endpoint)
        again = another(build)
        assert label(again, endpoint=endpoint) == found
    assert len(found) == 12 and all(isinstance(told, list) for told in found.values())
    assert len({tuple(told) for told in found.values()}) == 12
    assert build.work["labels_requested"] == 12 and again.work["labels_requested"] == 0
    cost = build.bill.stages["label_pairs"]
    stored = responses.look(build.store)
    assert cost["unknown_usage"] == 0 and cost["output_tokens"] > 12 * 60
    assert stored is not None
