"""What makes work new: keys are held by a snapshot, and so is the code of every stage.

`make keys` writes the snapshot anew. A stage whose results change gets another VERSION first.
"""

import ast
import hashlib
import importlib
import json
import os
import pkgutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import tasks
from tests.worlds import World, config_of, make_world, new_build, run, seen

SNAPSHOT = Path(__file__).parent / "ledger_keys.json"
ROOT = Path(__file__).parents[2]
# Modules that carry results from place to place and have no say in what they are.
GROUND = {
    "build", "canonical", "cluster", "corpus", "errors", "footprint", "ledger", "mllm", "pictures",
    "pins", "schema", "store", "tables", "text", "tombstones",
}  # fmt: skip
STAGES = (
    "align_captions", "deduplicate", "score_captions", "filter_captions", "find_neighbours",
    "mine_pairs", "label_pairs", "judge_labels", "line_up", "round_trip",
    "make_records", "fold_fates",
)  # fmt: skip
WORDS = ("red", "blue", "green", "boat", "house", "tree")


def small_world() -> World:
    """Twelve images on a circle, each with a caption of two words; 4 is a copy of 3."""
    turns = np.linspace(0, 3, 12)
    circle = np.column_stack([np.cos(turns), np.sin(turns)]).astype(np.float16)
    step = np.arange(12)[:, None, None, None] * np.arange(1, 17)[None, :, None, None]
    thumbnails = ((step * np.arange(3, 19)[None, None, :, None]) % 256).repeat(3, 3)
    thumbnails[4] = thumbnails[3]
    hashes = np.arange(1, 13, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    hashes[4] = hashes[3]
    return make_world(
        pl.DataFrame({"width": [64] * 12, "height": [64] * 12, "bytes": list(range(900, 912))}),
        {"phash": hashes, "thumbnail": [t.astype(np.uint8).tobytes() for t in thumbnails]},
        [f"a {WORDS[i % 3]} {WORDS[3 + i // 3 % 3]}" for i in range(9)],
        {"clip": circle, "dino": circle[::-1].copy()},
        {"clip": circle[:9]},
    )


def records(folder: Path, **sections) -> dict[str, set[str]]:
    """Run the stages; {stage: family/key of its records in the store}."""
    world, build = small_world(), new_build(folder)
    texts = world.captions["caption_id"].to_list()
    objects = pl.DataFrame({"key": world.ids, "image_id": world.ids})
    linked = pl.DataFrame({"image_id": world.ids, "caption_id": [texts[i % 9] for i in range(12)]})
    run(build, config_of(**sections), seen(build, world, objects, linked))
    found: dict[str, set[str]] = {stage: set() for stage in STAGES}
    for stat in build.store.list("ledger/"):
        _, stage, *rest = stat.key.removesuffix(".json").split("/")
        found[stage].add("/".join(rest))
    return found


def code() -> dict[str, dict[str, object]]:
    """Of every stage its version and a digest of its code, and of what it computes with, comments
    aside.
    """
    found = {}
    for _, name, _ in pkgutil.iter_modules(tasks.__path__):
        module = importlib.import_module(f"tasks.{name}")
        own = {
            part.stage: part.version
            for part in vars(module).values()
            if hasattr(part, "version") and getattr(part, "__module__", "") == module.__name__
        }
        if own:
            text = "".join(_dump(path) for path in _modules(name))
            digest = hashlib.sha256(text.encode()).hexdigest()
            found |= {stage: {"version": version, "code": digest} for stage, version in own.items()}
    return found


def _modules(stage: str) -> list[Path]:
    found, waiting = set(), [ROOT / "tasks" / f"{stage}.py"]
    while waiting:
        path = waiting.pop()
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("infra"):
                names = [node.module.removeprefix("infra").lstrip(".")]
                names += [alias.name for alias in node.names]
                paths = {ROOT / "infra" / f"{n}.py" for n in names if n and n not in GROUND}
                waiting += [p for p in paths - found if p.exists()]
    return sorted(found)


def _dump(path: Path) -> str:
    """The code of a module without its docstrings."""
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                body[:] = body[1:] or [ast.Pass()]
    return ast.dump(tree)


def now(folder: Path) -> dict[str, dict[str, object]]:
    keys = {stage: {"keys": sorted(found)} for stage, found in records(folder).items()}
    return {stage: {**facts, **keys.get(stage, {})} for stage, facts in sorted(code().items())}


def test_keys_and_code_are_as_acknowledged(tmp_path):
    found = now(tmp_path)
    if os.environ.get("PAIRMILL_ACKNOWLEDGE"):
        SNAPSHOT.write_text(json.dumps(found, indent=1) + "\n")
    said = json.loads(SNAPSHOT.read_text())
    assert set(STAGES) < found.keys() == said.keys(), "a stage came or went; run make keys"
    for stage in found:
        assert found[stage].get("keys") == said[stage].get("keys"), (
            f"the ledger keys of {stage} changed: every store computes it anew. If that is meant, "
            "run make keys"
        )
        assert found[stage] == said[stage], (
            f"the code of {stage}, or of what it computes with, changed: if its results can "
            "change, raise its version; then run make keys"
        )


# A parameter, another value for it, and the stages that are done again at once.
CHANGES = [
    ({"dedup": {"radius": 3}}, {"deduplicate"}),
    ({"dedup": {"near": "off"}}, {"deduplicate"}),
    ({"clip_score": {"fraction": 0.5}}, {"filter_captions"}),
    ({"clip_score": {"temperature": 0.02}}, {"score_captions"}),
    ({"clip_score": {"references": 5}}, {"score_captions"}),
    ({"neighbours": {"k": 4}}, {"find_neighbours"}),
    ({"neighbours": {"device": "cpu"}}, set()),
    ({"pairs": {"targets": 1}}, {"mine_pairs"}),
    ({"pairs": {"negatives": 2}}, {"mine_pairs"}),
    ({"split": {"validation": 0.5}}, {"make_records"}),
    ({"publish": {"title": "other"}}, set()),
    ({"cluster": {"workers": 7}}, set()),
    ({"describe": {"threads": 3}}, set()),
    (
        {"spaces": {"clip_image": {"model": "clip", "band": {"low": 0.5}},
                    "dino": {"model": "dino"}, "clip_text": {"model": "clip", "of": "caption"}}},
        {"mine_pairs"},
    ),
    (
        {"spaces": {"clip_image": {"model": "clip"}, "dino": {"model": "dino"}}},
        {"mine_pairs"},
    ),
]  # fmt: skip
AFTER = {stage: set(STAGES[at + 1 :]) for at, stage in enumerate(STAGES)}


@pytest.mark.parametrize(
    ("sections", "redone"), CHANGES, ids=[json.dumps(sections)[:50] for sections, _ in CHANGES]
)
def test_a_changed_parameter_redoes_what_depends_on_it_and_nothing_before(
    tmp_path, sections, redone
):
    before, after = records(tmp_path), records(tmp_path, **sections)
    new = {stage for stage in STAGES if after[stage] - before[stage]}
    followers = set().union(*(AFTER[stage] for stage in redone))
    assert redone <= new <= redone | followers
    assert all(after[stage] >= before[stage] for stage in STAGES)


def test_a_space_more_leaves_the_lists_of_the_others(tmp_path):
    two = {"clip_image": {"model": "clip"}, "dino": {"model": "dino"}}
    before = records(tmp_path, spaces=two)
    after = records(tmp_path, spaces={**two, "clip_text": {"model": "clip", "of": "caption"}})
    assert len(after["find_neighbours"] - before["find_neighbours"]) == 1


def test_the_same_again_is_no_work(tmp_path):
    assert records(tmp_path) == records(tmp_path)
