"""Publishing: what is in a version, and that no reader ever sees half of one."""

import hashlib
import io
import json
import tarfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest
from PIL import Image

from infra import tables
from infra.build import WouldRun
from infra.canonical import canonical
from infra.errors import PairmillError, Refused
from infra.folder import FolderStore
from infra.product import Contents
from infra.versions import find_version, read_latest
from tasks.publish import GateParams, PublishParams, content_digest, publish
from tests.tasks.examples import new_build, put

TEXT = pa.string()
RECORD = pa.schema(
    {
        **{"pair_id": TEXT, "query": TEXT, "target": TEXT, "instructions": pa.list_(TEXT)},
        **{"description": TEXT, "positives": pa.list_(TEXT), "negatives": pa.list_(TEXT)},
        "ties": pa.list_(
            pa.struct(
                {"space": TEXT, "score": pa.int32(), "rank": pa.int32(), "in_band": pa.bool_()}
            )
        ),
        **{"query_caption": TEXT, "target_caption": TEXT, "query_key": TEXT, "query_member": TEXT},
        **{"target_key": TEXT, "target_member": TEXT, "query_licence": TEXT},
        **{"target_licence": TEXT, "licence": TEXT, "labeller": TEXT, "model": TEXT, "split": TEXT},
    }
)
TIE = {"space": "look", "score": 912_345, "rank": 1, "in_band": True}


def png(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(buffer, "PNG")
    return buffer.getvalue()


PICTURES = {"ash": png("grey"), "oak": png("green"), "elm": png("olive"), "fir": png("navy")}
IDS = {name: hashlib.sha256(data).hexdigest() for name, data in PICTURES.items()}
# ash and oak are files; elm and fir are members of a tar, behind one another.
PLACES = {
    "ash": ("a.png", None, None),
    "oak": ("o.png", None, None),
    "elm": ("trees.tar", "elm.png", 0),
    "fir": ("trees.tar", "fir.png", len(PICTURES["elm"])),
}
CAPTIONS = {"ash": "серый ясень", "oak": "a <b>green</b> oak\n```"}
RECORDS = [
    ("p1", "ash", "oak", "train"),
    ("p2", "oak", "ash", "train"),
    ("p3", "elm", "fir", "validation"),
]


def record(pair_id, query, target, split):
    return {
        "pair_id": pair_id,
        "query": IDS[query],
        "target": IDS[target],
        "instructions": [f"make it {target}", "другое"],
        "description": None,
        "positives": [],
        "negatives": [IDS[query]],
        "ties": [TIE],
        "query_caption": CAPTIONS.get(query),
        "target_caption": CAPTIONS.get(target),
        "query_key": PLACES[query][0],
        "query_member": PLACES[query][1],
        "target_key": PLACES[target][0],
        "target_member": PLACES[target][1],
        "query_licence": "CC0",
        "target_licence": "CC BY 4.0",
        "licence": "CC BY 4.0",
        "labeller": "captions",
        "model": None,
        "split": split,
    }


def contents(build, records=RECORDS, order=list, key_of_ash="a.png"):
    """Tables of a finished build; pictures are in its corpus."""
    for key, data in {
        **{key_of_ash: PICTURES["ash"], "o.png": PICTURES["oak"]},
        "trees.tar": PICTURES["elm"] + PICTURES["fir"],
    }.items():
        build.corpus.put(key, data)
    places = {**PLACES, "ash": (key_of_ash, None, None)}
    rows = pa.Table.from_pylist(order([record(*r) for r in records]), schema=RECORD)
    shard = tables.write_shard(build.store, rows)
    fates = [
        ("object", "::".join(filter(None, places[name][:2])), "paired", "publish", IDS[name])
        for name in PICTURES
    ]
    fates += [("object", "b.png", "unreadable", "describe", None)]
    fates += [("object", "captions.csv", "metadata", "snapshot", None)]
    fates += [("image", IDS[name], "paired", "publish", IDS[name]) for name in PICTURES]
    fates += [("pair", pair_id, "published", "publish", None) for pair_id, *_ in records]
    fates += [("pair", "p9", "reverse_kept", "mine_pairs", None)]
    return Contents(
        records=tables.Table("records", (shard,)),
        fates=put(build, "fates", "level id fate stage image_id", order(fates)),
        images=put(
            build,
            *("images", "image_id key member bytes format width height licence"),
            [
                (IDS[n], *places[n][:2], len(PICTURES[n]), "PNG", 8, 6, "CC0")
                for n in order(list(PICTURES))
            ],
        ),
        eligible=put(
            build,
            *("eligible", "image_id caption_id clip_score"),
            [(IDS[n], n if n in CAPTIONS else None, 250_000) for n in PICTURES],
        ),
        captions=put(build, "captions", "caption_id text", list(CAPTIONS.items())),
        objects=put(
            build,
            *("objects", "key member offset size image_id stamp"),
            [(*places[n], len(PICTURES[n]), IDS[n], "1") for n in PICTURES],
        ),
    )


def described(**changes):
    """What a manifest says of the run, as the flow gives it; the config is what may be shown."""
    config = {
        "models": {"clip": {"library": "open_clip", "name": "ViT-B-32"}},
        "spaces": {"look": {"model": "clip", "of": "image"}},
        "describe": {"min_side": 64, "max_aspect": 3.5},
        "dedup": {"near": "hash", "cosine": 0.95},
        "clip_score": {"model": "clip", "keep": "neg_clip_loss", "fraction": 0.9},
        "neighbours": {"k": 50},
        "pairs": {"targets": 3, "negatives": 5, "direction": "both"},
        "labels": {"labeller": "captions"},
        "split": {"validation": 0.05},
        "corpus": {"licence": "unknown"},
        "publish": {"images": False},
    }
    return {
        "config": config | changes,
        "bands": [
            {"space": "look", "low": 7, "high": 9, "scores": 12, "truncated": 0, "crowded": 0}
        ],
        "clip_score_cut": 123_456,
        "mining": {"pairs": 3, "pairs_with_too_few_negatives": 3},
        "members": {"look": 4},
        "work": {"images_decoded": 4},
        "seconds": {"describe": 0.25},
    }


def publish_trees(build, made=None, dataset="trees", report=None, config=None, **params):
    return publish(
        build,
        dataset,
        made or contents(build),
        described(**(config or {})),
        report or (lambda manifest: b"<!doctype html>"),
        PublishParams(**params),
    )


def folder_of(build, version, dataset="trees"):
    return Path(build.store.uri, "datasets", dataset, f"v{version.number:06d}")


class Watched:
    """A folder store that calls `before(key)` and `after(key)` around every put."""

    def __init__(self, uri: str, before: Callable = str, after: Callable = str):
        self.store, self.before, self.after = FolderStore(uri), before, after

    def put(self, key, data, **conditions):
        self.before(key)
        etag = self.store.put(key, data, **conditions)
        self.after(key)
        return etag

    def __getattr__(self, name):
        return getattr(self.store, name)


def watched(build, **hooks):
    return new_build(Path(build.store.uri).parent, Watched(build.store.uri, **hooks))


# What a version is ---------------------------------------------------------------------------


def test_files_come_first_then_the_manifest_then_the_pointer(build):
    made, order = contents(build), []
    publish_trees(watched(build, after=order.append), made)
    folder = "datasets/trees/v000001"
    assert order == [
        f"{folder}/claim",
        f"{folder}/records/train.parquet",
        f"{folder}/records/validation.parquet",
        f"{folder}/megapairs.jsonl",
        f"{folder}/images.parquet",
        f"{folder}/fates.parquet",
        f"{folder}/README.md",
        f"{folder}/report.html",
        f"{folder}/manifest.json",
        "datasets/trees/latest.json",
    ]


def test_the_manifest_names_every_file_with_its_digest(build):
    version = publish_trees(build, images=True)
    folder = folder_of(build, version)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for file in manifest["files"]:
        data = (folder / file["name"]).read_bytes()
        assert (file["sha256"], file["bytes"]) == (hashlib.sha256(data).hexdigest(), len(data))
    named = {file["name"] for file in manifest["files"]}
    there = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert there - named == {"claim", "manifest.json"}
    assert version.manifest == f"{folder}/manifest.json"
    assert version.report == f"{folder}/report.html"


def test_the_manifest_counts_what_the_version_holds(build):
    version = publish_trees(build)
    assert version.counts == {
        "objects": 6,
        "images": 4,
        "eligible": 4,
        "pairs": 3,
        "records": 3,
        "fates": {
            "object": {"metadata": 1, "paired": 4, "unreadable": 1},
            "image": {"paired": 4},
            "pair": {"published": 3, "reverse_kept": 1},
        },
        "splits": {"train": 2, "validation": 1},
        "licences": {"CC BY 4.0": 3},
    }


def test_megapairs_lines(build):
    folder = folder_of(build, publish_trees(build))
    lines = (folder / "megapairs.jsonl").read_bytes().decode().split("\n")
    assert lines.pop() == ""
    first, _, third = map(json.loads, lines)
    assert first == {
        "q_img": IDS["ash"],
        "q_text": ["make it oak", "другое"],
        "t_img": IDS["oak"],
        "hns": [IDS["ash"]],
        "positives": [],
        "pair_id": "p1",
        "ties": [TIE],
        "captions": ["серый ясень", "a <b>green</b> oak\n```"],
        "sources": [["a.png", None], ["o.png", None]],
        "licence": "CC BY 4.0",
        "split": "train",
    }
    assert third["sources"] == [["trees.tar", "elm.png"], ["trees.tar", "fir.png"]]
    assert third["captions"] == [None, None]


def test_images_that_records_name_are_described(build):
    made = contents(build, [("p1", "ash", "oak", "train")])
    folder = folder_of(build, publish_trees(build, made))
    found = pl.read_parquet(folder / "images.parquet").sort("key")
    assert found["key"].to_list() == ["a.png", "o.png"]
    assert found["caption"].to_list() == [CAPTIONS["ash"], CAPTIONS["oak"]]
    assert found["clip_score"].to_list() == [250_000, 250_000]


def test_a_build_without_records_publishes_its_fates(build):
    version = publish_trees(build, contents(build, []))
    names = {file["name"] for file in find_version(build.store, "trees", "latest")["files"]}
    assert names == {
        "megapairs.jsonl",
        "images.parquet",
        "fates.parquet",
        "README.md",
        "report.html",
    }
    assert version.counts["records"] == 0
    assert (folder_of(build, version) / "megapairs.jsonl").read_bytes() == b""


# Readers of other projects -------------------------------------------------------------------


def test_datasets_reads_both_splits(build, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from datasets import load_dataset

    folder = folder_of(build, publish_trees(build))
    files = {split: str(folder / f"records/{split}.parquet") for split in ("train", "validation")}
    loaded = load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))
    assert loaded["train"]["pair_id"] == ["p1", "p2"]
    assert loaded["validation"][0] == record(*RECORDS[2])
    # The card's metadata says the same of the folder as a whole.
    whole = load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert {split: rows["pair_id"][:] for split, rows in whole.items()} == {
        "train": ["p1", "p2"],
        "validation": ["p3"],
    }


def test_webdataset_reads_the_pictures(build):
    from webdataset import WebDataset

    folder = folder_of(build, publish_trees(build, images=True))
    samples = list(WebDataset(str(folder / "images/00000.tar"), shardshuffle=False))
    found = {sample["__key__"]: (sample["png"], json.loads(sample["json"])) for sample in samples}
    assert {key: png for key, (png, _) in found.items()} == {
        IDS[name]: data for name, data in PICTURES.items()
    }
    assert found[IDS["oak"]][1] == {
        "key": "o.png",
        "member": None,
        "caption": CAPTIONS["oak"],
        "licence": "CC0",
        "width": 8,
        "height": 6,
    }


def test_pictures_are_spread_over_tars_by_size(build, monkeypatch):
    sizes = {IDS[name]: len(data) for name, data in PICTURES.items()}
    one, two, three, four = sorted(sizes)
    monkeypatch.setattr("tasks.publish.TAR_BYTES", sizes[one] + sizes[two])
    folder = folder_of(build, publish_trees(build, images=True))
    found = {}
    for path in (folder / "images").iterdir():
        with tarfile.open(path) as tar:
            found[path.name] = tar.getnames()
    assert found == {
        "00000.tar": [f"{one}.png", f"{one}.json", f"{two}.png", f"{two}.json"],
        "00001.tar": [f"{three}.png", f"{three}.json", f"{four}.png", f"{four}.json"],
    }


def test_a_picture_that_changed_since_it_was_described_is_not_published(build):
    made = contents(build)
    build.corpus.put("o.png", png("red"))
    with pytest.raises(PairmillError, match=r"o\.png changed while the build ran; run it again"):
        publish_trees(build, made, images=True)
    assert read_latest(build.store, "trees") == (None, None)


# The digest ----------------------------------------------------------------------------------


def test_the_digest_is_of_records_then_fates(build):
    made = contents(build)
    version = publish_trees(build, made)
    parts = [
        tables.digest_columns(tables.read(build.store, table))
        for table in (made.records, made.fates)
    ]
    assert version.digest == hashlib.sha256(canonical(parts)).hexdigest()


def test_the_digest_knows_neither_name_nor_number_nor_time_nor_order(build, tmp_path):
    first = publish_trees(build)
    again = publish_trees(build, dataset="other", config={"neighbours": {"k": 3}})
    other = new_build(tmp_path / "elsewhere")
    backwards = contents(other, order=lambda rows: rows[::-1])
    publish_trees(other, contents(other, []))
    second = publish_trees(other, backwards)
    assert (first.number, again.number, second.number) == (1, 1, 2)
    assert first.digest == again.digest == second.digest


def test_object_keys_count_in_the_digest(build, tmp_path):
    other = new_build(tmp_path / "elsewhere")
    renamed = contents(other, key_of_ash="renamed.png")
    assert publish_trees(build).digest != publish_trees(other, renamed).digest


def test_the_digest_of_no_records_is_that_of_no_columns(build):
    fates = tables.frame(build.store, contents(build).fates)
    no_rows = tables.frame(build.store, contents(build).records).clear()
    assert content_digest(no_rows, fates) == content_digest(pl.DataFrame(), fates)


# Versions ------------------------------------------------------------------------------------


def test_nothing_new_is_the_same_version(build):
    first = publish_trees(build)
    order = []
    again = publish_trees(watched(build, after=order.append), contents(build))
    assert (first.fresh, again.fresh) == (True, False)
    assert again._replace(fresh=True) == first
    assert order == []


def test_a_changed_config_is_a_new_version_of_the_same_digest(build):
    first = publish_trees(build)
    second = publish_trees(build, config={"pairs": {"targets": 9}})
    assert (second.number, second.digest, second.fresh) == (2, first.digest, True)
    assert find_version(build.store, "trees", "latest")["version"] == 2


def test_versions_are_found_by_number_by_digest_and_as_latest(build):
    one = publish_trees(build)
    two = publish_trees(build, contents(build, RECORDS[:2]))
    three = publish_trees(build, contents(build, RECORDS[:2]), config={"pairs": {"targets": 9}})

    def number(name):
        return find_version(build.store, "trees", name)["version"]

    assert [number(name) for name in ("1", "000002", "3", "latest")] == [1, 2, 3, 3]
    assert number(one.digest) == number(one.digest[:12]) == 1
    assert two.digest == three.digest
    assert number(two.digest[:12]) == 3, "of equal versions the newest"


@pytest.mark.parametrize("name", ["4", "0", "", "zzzz", "12345678", "-1", "²"])
def test_an_unknown_version_is_an_error_that_lists_those_there_are(build, name):
    publish_trees(build)
    publish_trees(build, contents(build, RECORDS[:2]))
    with pytest.raises(PairmillError, match=rf"'trees' has no version '{name}'; versions: 1, 2$"):
        find_version(build.store, "trees", name)


def test_a_digest_prefix_of_several_versions_is_refused(build):
    for number, digest in enumerate(["ab12cd", "ab13cd", "ab13cd"], 1):
        manifest = canonical({"version": number, "digest": digest})
        build.store.put(f"datasets/trees/v{number:06d}/manifest.json", manifest)
    build.store.put("datasets/trees/latest.json", manifest)
    assert find_version(build.store, "trees", "ab12")["version"] == 1
    assert find_version(build.store, "trees", "ab13")["version"] == 3
    with pytest.raises(
        PairmillError, match="'trees' has several versions 'ab1'; versions: 1, 2, 3"
    ):
        find_version(build.store, "trees", "ab1")


def test_before_the_first_version_there_is_none(build):
    with pytest.raises(PairmillError, match=r"has no published version of 'trees'; run a build"):
        find_version(build.store, "trees", "latest")


def test_a_plan_says_that_it_would_publish_and_only_where_it_would(build):
    made = contents(build)
    planning = new_build(Path(build.store.uri).parent)
    object.__setattr__(planning, "planning", True)
    with pytest.raises(WouldRun) as would:
        publish_trees(planning, made)
    assert (would.value.stage, would.value.inputs) == ("publish", {"records": 3})
    publish_trees(build, made)
    assert publish_trees(planning, made).fresh is False


# Gates and errors ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ({"min_images": 5}, "min_images is 5, this build has 4"),
        ({"min_records": 4}, "min_records is 4, this build has 3"),
        # One of five: captions.csv is no picture.
        ({"max_failures": 0.19}, "max_failures is 0.19, this build has 0.200: 1 unreadable of 5"),
    ],
)
def test_a_gate_refuses_and_latest_stays(build, gate, message):
    old = publish_trees(build, contents(build, RECORDS[:1]))
    with pytest.raises(Refused, match=message) as refused:
        publish_trees(build, gates=GateParams(**gate))
    assert refused.value.exit_code == 3
    assert find_version(build.store, "trees", "latest")["digest"] == old.digest
    assert not Path(build.store.uri, "datasets/trees/v000002").exists()


def test_gates_at_their_bounds_let_pass(build):
    gates = GateParams(min_images=4, min_records=3, max_failures=0.2)
    assert publish_trees(build, gates=gates).number == 1


def test_a_missing_shard_is_a_clear_error(build):
    made = contents(build)
    shard = made.records.shards[0]
    build.store.delete(tables.shard_key(shard.sha256))
    with pytest.raises(PairmillError, match=rf"shard {shard.sha256[:12]} of table records is gone"):
        publish_trees(build, made)


def test_a_damaged_shard_is_a_clear_error(build):
    made = contents(build)
    shard = made.fates.shards[0]
    build.store.put(tables.shard_key(shard.sha256), b"not parquet")
    with pytest.raises(PairmillError, match=rf"{shard.sha256[:12]} of table fates is damaged"):
        publish_trees(build, made)
    assert not Path(build.store.uri, "datasets").exists()


# Crashes and races ---------------------------------------------------------------------------


class Killed(Exception):
    """Stands for the end of the process."""


def killer(at):
    """A hook that raises on its call number `at`."""
    calls = iter(range(10_000))

    def hook(key):
        if next(calls) == at:
            raise Killed(key)

    return hook


def is_whole(store, manifest):
    folder = f"datasets/{manifest['dataset']}/v{manifest['version']:06d}"
    return all(
        hashlib.sha256(store.get(f"{folder}/{file['name']}")).hexdigest() == file["sha256"]
        for file in manifest["files"]
    )


PUTS = 10


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("at", range(PUTS))
def test_after_a_crash_at_any_put_readers_see_a_whole_version_and_a_re_run_publishes(
    build, at, when
):
    old = publish_trees(build, contents(build, RECORDS[:1]))
    made = contents(build)
    with pytest.raises(Killed):
        publish_trees(watched(build, **{when: killer(at)}), made)
    seen = find_version(build.store, "trees", "latest")
    moved = (at, when) == (PUTS - 1, "after")
    assert (seen["digest"] == old.digest) is not moved
    assert is_whole(build.store, seen)
    again = publish_trees(build, made)
    assert again.fresh is not moved
    now = find_version(build.store, "trees", "latest")
    assert (now["version"], now["digest"]) == (again.number, again.digest)
    assert is_whole(build.store, now)


def test_a_version_that_only_latest_lacks_is_named_and_not_written_again(build):
    made = contents(build)
    with pytest.raises(Killed):
        publish_trees(watched(build, before=killer(PUTS - 1)), made)
    order = []
    again = publish_trees(watched(build, after=order.append), made)
    assert (again.number, again.fresh) == (1, True)
    assert order == ["datasets/trees/latest.json"]


def test_a_publish_puts_as_often_as_the_crash_test_thinks(build):
    order = []
    publish_trees(watched(build, after=order.append), contents(build))
    assert len([key for key in order if key.startswith("datasets/")]) == PUTS


def test_another_version_published_meanwhile_is_an_error_that_names_it(build):
    publish_trees(build, contents(build, RECORDS[:1]))

    def report(_):
        publish_trees(build, contents(build, RECORDS[:2]))
        return b"<!doctype html>"

    mine = contents(build)
    with pytest.raises(PairmillError, match="another build published version 3 of trees meanwhile"):
        publish_trees(build, mine, report=report)
    assert find_version(build.store, "trees", "latest")["version"] == 3
    assert publish_trees(build, mine).number == 4


def test_the_same_version_published_meanwhile_is_that_version(build):
    made = contents(build)

    def report(_):
        publish_trees(build, made)
        return b"<!doctype html>"

    version = publish_trees(build, made, report=report)
    assert (version.number, version.fresh) == (2, False)
    assert find_version(build.store, "trees", "latest")["version"] == 2


@pytest.mark.parametrize("first", [True, False], ids=["first version", "second version"])
@pytest.mark.parametrize("same", [True, False], ids=["same content", "different content"])
def test_two_publishes_at_once_leave_latest_on_a_whole_version(build, first, same):
    if not first:
        publish_trees(build, contents(build, []))
    both = [contents(build), contents(build, RECORDS if same else RECORDS[:2])]
    together = threading.Barrier(2)
    outcomes = []

    def wait_at_the_claim(key):
        if key.endswith("v000001/claim" if first else "v000002/claim"):
            together.wait(20)

    def run(made):
        # Both have read `latest` and want the same number before either has it.
        with suppress(PairmillError):
            outcomes.append(publish_trees(watched(build, before=wait_at_the_claim), made))

    threads = [threading.Thread(target=run, args=(made,)) for made in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    latest = find_version(build.store, "trees", "latest")
    assert is_whole(build.store, latest)
    assert len(outcomes) == (2 if same else 1)
    assert {version.number for version in outcomes} == {latest["version"]}
    assert sum(version.fresh for version in outcomes) == 1
    number = 1 if first else 2
    assert {find_version(build.store, "trees", str(n))["version"] for n in (number, number + 1)}
