"""What would break a build: each ends in one line that says what to do, nothing half-published."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flows.config import load_config
from infra.errors import ConfigError, PairmillError

MISTAKES = {
    "a typo": ({"dedupe": {}}, "dedupe: unknown key; did you mean 'dedup'?"),
    "a typo inside": (
        {"pairs": {"target": 3}},
        "pairs.target: unknown key; did you mean 'targets'?",
    ),
    "a wrong number": ({"pairs": {"targets": 0}}, "pairs.targets: Input should be greater than"),
    "a wrong word": ({"dedup": {"near": "phash"}}, "dedup.near: Input should be 'hash', 'cosine'"),
    "no such model": (
        {"spaces": {"siglip": {"model": "siglip"}}},
        "spaces.siglip.model is 'siglip', which is not among models",
    ),
    "a band upside down": (
        {"spaces": {"dino": {"model": "dino", "band": {"low": 0.9, "high": 0.2}}}},
        "band.low 0.9 must be below band.high 0.2",
    ),
    "a name that is a path": ({"dataset": "../up"}, "dataset: String should match pattern"),
    "credentials in a URI": (
        {"corpus": {"uri": "s3://key:secret@bucket/images"}},
        "corpus: ",
    ),
    "an mllm without an endpoint": (
        {"labels": {"labeller": "mllm"}},
        "the labeller mllm needs endpoint.url",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_config_mistake_names_the_key_and_the_fix(few, config_file, mistake):
    sections, said = MISTAKES[mistake]
    with pytest.raises(ConfigError) as caught:
        load_config(config_file(few, **sections))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_store_inside_the_corpus_is_refused(few, config_file):
    path = config_file(few, store={"uri": str(few / "out")})
    with pytest.raises(ConfigError, match="overlap"):
        load_config(path)


def test_a_missing_section_is_named(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("dataset: x\n")
    with pytest.raises(ConfigError, match="corpus: Field required"):
        load_config(path)


@pytest.mark.parametrize("text", ["[1, 2", "just words", "- a\n- b", "\xff"])
def test_a_config_that_is_no_mapping_is_one_line(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_is_one_line(build, tmp_path):
    with pytest.raises(PairmillError, match="does not exist"):
        build(tmp_path / "nowhere")


def test_an_empty_corpus_publishes_an_empty_version(build, tmp_path):
    (tmp_path / "empty").mkdir()
    result = build(tmp_path / "empty")
    assert result["records"] == result["pairs"] == result["work"]["objects_listed"] == 0


@pytest.fixture
def pictures(few: Path) -> list[Path]:
    return sorted(p for p in few.rglob("*") if p.suffix in (".png", ".jpg"))


def test_one_image(build, tmp_path, pictures):
    (tmp_path / "one").mkdir()
    shutil.copy(pictures[0], tmp_path / "one")
    result = build(tmp_path / "one")
    assert result["fates"]["unpaired"] == 1
    assert result["pairs"] == 0


def test_all_images_identical(build, tmp_path, pictures):
    (tmp_path / "same").mkdir()
    for number in range(5):
        shutil.copy(pictures[0], tmp_path / "same" / f"{number}{pictures[0].suffix}")
    result = build(tmp_path / "same")
    assert result["fates"]["exact_duplicate"] == 4
    assert result["fates"]["unpaired"] == 1


def test_no_captions_at_all_still_mines_by_picture(build, tmp_path, pictures):
    (tmp_path / "bare").mkdir()
    for path in pictures[:60]:
        shutil.copy(path, tmp_path / "bare")
    result = build(tmp_path / "bare")
    assert result["pairs"] > 0
    assert result["records"] == 0


def test_k_larger_than_the_corpus(build, tmp_path, pictures):
    (tmp_path / "few").mkdir()
    for path in pictures[:6]:
        shutil.copy(path, tmp_path / "few")
    assert build(tmp_path / "few", neighbours={"k": 2000})["work"]["objects_listed"] == 6


def test_bad_images_are_fates_and_never_the_end(build, tmp_path, pictures):
    from tests.pictures import UNREADABLE

    folder = tmp_path / "bad"
    folder.mkdir()
    for name, make in UNREADABLE.items():
        (folder / f"{name.replace('/', '_').replace(' ', '_')}.jpg").write_bytes(make())
    shutil.copy(pictures[0], folder)
    result = build(folder)
    assert result["fates"]["unpaired"] == 1
    refused = ("unreadable", "too_large", "too_small", "extreme_aspect")
    assert sum(result["fates"][fate] for fate in refused) == len(UNREADABLE)
    assert result["fates"]["unreadable"] > 15


def test_a_model_file_that_is_not_one(few, build, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "open_clip_config.json").write_text("{}")
    models = {"clip": {"library": "open_clip", "name": str(model)}}
    with pytest.raises(ConfigError, match="open_clip can't load") as caught:
        build(few, models=models, spaces={"clip": {"model": "clip"}})
    assert "\n" not in str(caught.value)


def test_the_command_ends_with_status_two_and_one_line(few, config_file):
    path = config_file(few)
    data = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(data | {"typo": 1}))
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "run", str(path), "--json"],
        capture_output=True, text=True, timeout=60, env={**os.environ, "NO_COLOR": "1"},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert '"stage": "config"' in done.stdout
