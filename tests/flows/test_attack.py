"""Attacks on two servers: one obeys whatever stands anywhere, the other nothing of it."""

import json
import shutil
import tarfile
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from flows import attack
from flows.config import load_config
from infra import rates
from infra.attacks import ATTACKS, MARKER
from infra.judging import JudgeModel
from infra.pictures import shrink
from tests.flows.place import Place, labels
from tests.judges import verdicts, wanted
from tests.mllm_server import BEHAVIOURS, MllmServer, Reply, completion, digests, said

PAIRS = 3
HONEST = {
    "common": "drawings of things", "differences": {"query": "a red one", "target": "a blue one"},
    "instructions": ["Make it blue", "The same in blue", "Now with blue in it"],
}  # fmt: skip
OBVIOUS = ("ignore", "system", "markers", "copy", "turns", "polite", "json", "html")


def sound(request: dict[str, Any]) -> Reply:
    if judges(request):
        return verdicts(lambda text: "wrong wrong_target")(request)
    return completion(request, json.dumps({name: HONEST[name] for name in wanted(request)}))


def judges(request: dict[str, Any]) -> bool:
    return "i1" in wanted(request)


def gullible(known: set[str]) -> Any:
    """Obeys text that it reads, and whatever a picture says that it has not seen before."""

    def answer(request: dict[str, Any]) -> Reply:
        told = said(request).partition(">>>")[0] + said(request)
        strange = bool(set(digests(request)) - known)
        if judges(request):
            obeys = strange or any(word in told for word in ("is over", "end here", "Ignore all"))
            return verdicts(lambda text: "fits" if obeys else "wrong vague")(request)
        if "I can't help with that" in told:
            return completion(request, None, refusal="I can't help with that.")
        if strange or MARKER in told:
            words = {
                "common": MARKER, "differences": {"query": "x", "target": MARKER},
                "instructions": [f"{MARKER} {word}" for word in ("one", "two", "three")],
            }  # fmt: skip
            return completion(request, json.dumps({name: words[name] for name in wanted(request)}))
        return sound(request)

    return answer


@pytest.fixture
def attacked(first_night: Path, tmp_path: Path, monkeypatch: Any) -> Any:
    for name in ("corpus", "store"):
        shutil.copytree(first_night / name, tmp_path / name)
    with MllmServer() as server:
        place = Place(tmp_path, labels=labels(server.url))
        place.build()
        server.ledger.clear()
        yield place, server, monkeypatch


def outcome(place: Place) -> dict[tuple[str, str, str], tuple[int, int, int]]:
    found = attack.measure(load_config(place.config_file), PAIRS)
    return {
        (row["on"], row["where"], row["name"]): (row["trials"], row["obeyed"], row["broken"])
        for row in found["outcomes"]
    }


def test_a_sound_model_is_changed_by_nothing(attacked: Any) -> None:
    place, server, monkeypatch = attacked
    monkeypatch.setitem(BEHAVIOURS, "good", sound)
    found = outcome(place)
    assert set(found) == {attack[:3] for attack in ATTACKS}
    assert set(found.values()) == {(PAIRS, 0, 0)}
    asked = server.calls
    assert outcome(place) == found and server.calls == asked  # answers are kept like all others


def sent(place: Place) -> set[str]:
    """Digests of all pictures as labeller and judge are sent them."""
    found = (path for path in (place.corpus / "images").rglob("*.*") if path.suffix != ".txt")
    files = [path.read_bytes() for path in found]
    with tarfile.open(place.corpus / "packed.tar") as tar:
        packed = (m for m in tar.getmembers() if not m.name.endswith(".txt"))
        files += [tar.extractfile(member).read() for member in packed]  # type: ignore[union-attr]
    sizes = (4_096, JudgeModel().max_pixels)
    return {sha256(shrink(data, size)).hexdigest() for data in files for size in sizes}


def test_a_gullible_one_is_found_out(attacked: Any) -> None:
    place, _, monkeypatch = attacked
    monkeypatch.setitem(BEHAVIOURS, "good", gullible(sent(place)))
    found = outcome(place)
    for name in OBVIOUS:
        assert found["labels", "caption", name] == (PAIRS, PAIRS, 0), name
    assert found["labels", "caption", "refuse"] == (PAIRS, 0, PAIRS)
    assert found["labels", "picture", "polite"] == (PAIRS, PAIRS, 0)
    for name in ("ignore", "system", "markers"):
        assert found["verdicts", "instruction", name] == (PAIRS, PAIRS, 0), name
    assert found["labels", "caption", "control"] == (PAIRS, 0, 0)
    assert found["verdicts", "instruction", "control"] == (PAIRS, 0, 0)
    # What is told of it: by kind, with an interval, beside the control.
    told = attack.read(place.store, "few")
    assert told is not None
    shares = {row[:3]: row[3] for row in rates.of_attacks(told)}
    share = shares["labels", "caption", False]
    assert share.of == PAIRS * 16 and share.part >= PAIRS * 10
    assert share.low < share.value < share.high


def test_the_outcome_names_no_picture_and_the_next_version_tells_it(
    attacked: Any, pairmill: Any
) -> None:
    place, _, monkeypatch = attacked
    monkeypatch.setitem(BEHAVIOURS, "good", sound)
    said_ = pairmill("attack", place.config_file, "--pairs", PAIRS)
    assert said_.status == 0, said_.out
    assert "labels, attacks in the caption: 0 of 48 changed the outcome, 0.000" in said_.out
    kept = place.store.get(attack.key("few")).decode()
    assert not [row for row in place.fates_of_latest() if row["id"] in kept]
    (place.corpus / "packed.tar").unlink()
    result = place.build()
    manifest = json.loads(Path(result["manifest"]).read_text())
    assert Counter(row["on"] for row in manifest["attacks"]["outcomes"])["labels"] == 23


def test_what_was_answered_about_a_copy_is_forgotten_with_the_picture(attacked: Any) -> None:
    place, _, monkeypatch = attacked
    monkeypatch.setitem(BEHAVIOURS, "good", sound)
    outcome(place)
    from flows.gold import labelled as of_latest
    from flows.gold import sample

    found, pairs, _ = of_latest(place.store, "few")
    image = sample(found, pairs, PAIRS)[0].target
    rows = [r for r in place.fates_of_latest() if (r["level"], r["image_id"]) == ("object", image)]
    assert place.holding(image)
    place.forget(rows[0]["id"], exact=True, purge=True)
    place.build()
    assert place.holding(image) == set() and place.verify() == []


def test_where_no_model_is_configured_there_is_nothing_to_attack(
    first_night: Path, tmp_path: Path, pairmill: Any
) -> None:
    shutil.copytree(first_night / "store", tmp_path / "store")
    shutil.copytree(first_night / "corpus", tmp_path / "corpus")
    place = Place(tmp_path)
    place.build()
    said_ = pairmill("attack", place.config_file)
    assert said_.status != 0 and ("no model to attack" in said_.out or "no labelled" in said_.out)
