"""Describe: every object ends as an image or with a rule, and only what changed costs anything."""

import dataclasses
import os
import tarfile
import time
from pathlib import Path

import boto3
import numpy as np
import pytest

from infra import tables
from infra.build import Build, WouldRun
from infra.cluster import ClusterParams, open_pool
from infra.errors import ConfigError
from infra.models import ModelParams
from infra.store import Location, open_store
from tasks import describe as stage
from tasks.snapshot import CorpusParams, snapshot
from tests import pictures, stores
from tests.conftest import BATCH, make_build, write_timm
from tests.corpora import (
    captions,
    described,
    details,
    fates,
    fill,
    jsonl,
    licences,
    member,
    parquet,
    rows,
    tar,
    touch,
)
from tests.infra.conftest import aws_environment, create_bucket, moto_endpoint  # noqa: F401

COLOURS = {f"{n}.jpg": pictures.jpeg(40, 36, n) for n in range(6)}


def again(build: Build, **more) -> Build:
    """The next build on the same folders: nothing done yet."""
    return Build(build.corpus, build.store, build.pool, **more)


def work(build: Build) -> dict[str, int]:
    return dict(build.work)


def images(build: Build, seen) -> dict[str, str]:
    return {row["key"]: row["image_id"] for row in rows(build, seen.images)}


def vectors(build: Build, seen, model: str) -> dict[str, bytes]:
    ids = [row["image_id"] for row in rows(build, seen.images)]
    found, matrix = tables.gather(build.store, seen.vectors[model], ids)
    return {image_id: vector.tobytes() for image_id, vector in zip(found, matrix, strict=True)}


# Fates ---------------------------------------------------------------------------------------


def test_an_empty_corpus_is_described(build, models):
    seen = described(build, models)
    assert (seen.objects.rows, seen.images.rows, seen.drops.rows) == (0, 0, 0)
    assert work(build) == {}


def test_every_picture_of_the_catalogues_is_an_image_or_says_why_not(build, models):
    catalogue = {**pictures.READABLE, **pictures.UNREADABLE}
    fill(build, {f"{name}.jpg": make() for name, make in catalogue.items()})
    seen = described(build, models, max_aspect=20.0)
    found = fates(build, seen)
    odd = {key: rule for key, rule in found.items() if rule != "image"}
    assert odd == {
        **{f"{name}.jpg": "unreadable" for name in pictures.UNREADABLE},
        "png_bomb.jpg": "too_large",
        "png_144_megapixels.jpg": "too_large",
        "jpeg_wide.jpg": "extreme_aspect",
        "png_wide.jpg": "extreme_aspect",
        **{key: rule for key, rule in odd.items() if "_bomb" in key},
    }
    assert odd["png_text_bomb.jpg"] in ("unreadable", "too_large")
    said = details(build, seen)
    bad = {row["id"]: row["rule"] for row in rows(build, seen.drops)}
    assert all(said[name] for name, rule in bad.items() if rule == "unreadable")
    assert len(images(build, seen)) == len(vectors(build, seen, "clip"))
    assert len(vectors(build, seen, "dino")) == len(images(build, seen))


def test_limits_are_judged_by_the_header(build):
    fill(
        build,
        {
            "small.png": pictures.png(100, 31),
            "wide.png": pictures.png(900, 100),
            "bomb.png": pictures.raw_png(60_000, 60_000, 1, 0, bytes(100)),
            "large.png": pictures.raw_png(9_000, 9_000, 1, 0, bytes(100)),
            "good.png": pictures.png(100, 32),
            "turned.jpg": pictures.turned(6, "JPEG", 64, 40),
        },
    )
    seen = described(build, min_side=32, max_pixels=10_000_000)
    assert fates(build, seen) == {
        "small.png": "too_small",
        "wide.png": "extreme_aspect",
        "bomb.png": "too_large",
        "large.png": "too_large",
        "good.png": "image",
        "turned.jpg": "image",
    }
    values = {row["rule"]: row["value"] for row in rows(build, seen.drops) if row["value"]}
    assert values == {"too_small": 31, "extreme_aspect": 9000, "too_large": 81_000_000}
    assert work(build)["images_decoded"] == 2
    sizes = {row["key"]: (row["width"], row["height"]) for row in rows(build, seen.images)}
    assert sizes["turned.jpg"] == (64, 40)


def test_objects_that_are_no_images_have_their_fates(build):
    fill(
        build,
        {
            "photo": pictures.jpeg(),
            "README": "words",
            "empty.jpg": b"",
            "page.jpg": "<!DOCTYPE html>",
            "broken.tar": b"no tar",
            "table.parquet": parquet({"a": [1]}),
        },
    )
    seen = described(build)
    assert fates(build, seen) == {
        "photo": "image",
        "README": "ignored",
        "empty.jpg": "unreadable",
        "page.jpg": "unreadable",
        "broken.tar": "unreadable",
        "table.parquet": "ignored",
    }


def test_a_file_that_goes_between_listing_and_reading_has_vanished(build):
    fill(build, COLOURS)
    fill(build, {"a.tar": tar([("x.jpg", COLOURS["0.jpg"])])})
    settings = CorpusParams(uri=build.corpus.uri)
    found = snapshot(build, settings)
    for key in ("1.jpg", "a.tar"):
        build.corpus.delete(key)
    params = stage.DescribeParams(min_side=1, device="cpu")
    seen = stage.describe(build, found.listing, found.file_captions, settings, {}, params)
    assert {key for key, rule in fates(build, seen).items() if rule == "vanished"} == {
        "1.jpg",
        "a.tar",
    }
    assert len(images(build, seen)) == 5
    # Back with another time it is not what was listed; the next listing finds it.
    Path(build.corpus.uri, "1.jpg").write_bytes(COLOURS["1.jpg"])
    seen = stage.describe(build, found.listing, found.file_captions, settings, {}, params)
    assert fates(build, seen)["1.jpg"] == "vanished"
    assert fates(build, described(build))["1.jpg"] == "image"


# Captions ------------------------------------------------------------------------------------


def test_an_image_has_the_strictest_licence_that_any_of_its_copies_states(build):
    same = COLOURS["0.jpg"]
    fill(build, {"a.jpg": same, "b.jpg": same, "c.jpg": same, "d.jpg": COLOURS["1.jpg"]})
    fill(build, {"captions.csv": "file_name,caption,licence\na.jpg,x,CC0\nb.jpg,x,CC-BY-SA-4.0\n"})
    seen = described(build, corpus={"licence": "house"})
    assert licences(build, seen) == {
        **dict.fromkeys(("a.jpg", "b.jpg", "c.jpg"), "CC-BY-SA-4.0"),
        "d.jpg": "house",
    }


def test_captions_of_loose_images_come_from_files_and_sidecars(build):
    fill(build, {key: COLOURS[key] for key in ("0.jpg", "1.jpg", "2.jpg", "3.jpg")})
    fill(
        build,
        {
            "captions.csv": "file_name,caption,licence\n0.jpg,from the file,MIT\n2.jpg,,CC0\n",
            "0.txt": "from the sidecar",
            "0.json": '{"caption": "from json", "license": "CC BY 4.0"}',
            "1.txt": "x" * 100_000,
            "3.txt": "Müll".encode("latin-1"),
        },
    )
    seen = described(build, corpus={"licence": "house"})
    assert captions(build, seen) == {
        "0.jpg": ["from json", "from the file", "from the sidecar"],
        "1.jpg": [],
        "2.jpg": [],
        "3.jpg": [],
    }
    refused = {row["key"]: row["detail"] for row in rows(build, seen.objects) if row["detail"]}
    assert refused == {"1.jpg": "caption_too_long", "3.jpg": "caption_unreadable"}
    assert licences(build, seen) == {
        "0.jpg": "CC BY 4.0",
        "1.jpg": "house",
        "2.jpg": "CC0",
        "3.jpg": "house",
    }
    texts = {row["caption_id"]: row["text"] for row in rows(build, seen.captions)}
    pairs = [texts[row["caption_id"]] for row in rows(build, seen.image_captions)]
    assert sorted(pairs) == ["from json", "from the file", "from the sidecar"]


def test_a_wider_bound_on_captions_reads_them_again_but_decodes_nothing(build):
    fill(build, {"0.jpg": COLOURS["0.jpg"], "0.txt": "a long caption"})
    assert captions(build, described(build, corpus={"max_caption_chars": 5})) == {"0.jpg": []}
    wider = again(build)
    assert captions(wider, described(wider)) == {"0.jpg": ["a long caption"]}
    assert not work(wider)


def test_captions_have_vectors_of_every_model_with_text(build, models):
    lines = "0.jpg,a cat\n1.jpg,a cat\n2.jpg,月\n"
    fill(build, {**COLOURS, "captions.csv": f"file_name,caption\n{lines}"})
    seen = described(build, models)
    assert list(seen.texts) == ["clip"]
    ids = [row["caption_id"] for row in rows(build, seen.captions)]
    found, matrix = tables.gather(build.store, seen.texts["clip"], ids)
    assert (found, matrix.shape, matrix.dtype) == (sorted(ids), (2, 16), np.float16)


# Containers ----------------------------------------------------------------------------------


def webdataset() -> bytes:
    """As img2dataset writes, and worse."""
    return tar(
        [
            ("000.txt", b"before"),
            ("000.jpg", COLOURS["0.jpg"]),
            ("000.json", b'{"caption": "before", "license": "CC0"}'),
            ("001.jpg", COLOURS["1.jpg"]),
            ("002.jpg", b"not a picture"),
            ("002.txt", b"of nothing"),
            ("/abs/003.jpg", COLOURS["2.jpg"]),
            ("../004.jpg", COLOURS["3.jpg"]),
            (member("link.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd"), b""),
            ("/abs/003.txt", b"absolute"),
            ("../004.txt", b"above"),
            ("001.txt", b"far away"),
        ]
    )


MEMBERS = {
    "t.tar::000.txt": "metadata",
    "t.tar::000.jpg": "image",
    "t.tar::000.json": "metadata",
    "t.tar::001.jpg": "image",
    "t.tar::002.jpg": "unreadable",
    "t.tar::002.txt": "metadata",
    "t.tar::/abs/003.jpg": "image",
    "t.tar::../004.jpg": "image",
    "t.tar::link.jpg": "ignored",
    "t.tar::/abs/003.txt": "metadata",
    "t.tar::../004.txt": "metadata",
    "t.tar::001.txt": "metadata",
}
TEXTS = {
    "t.tar::000.jpg": ["before"],
    "t.tar::001.jpg": ["far away"],
    "t.tar::002.jpg": ["of nothing"],
    "t.tar::/abs/003.jpg": ["absolute"],
    "t.tar::../004.jpg": ["above"],
}


@pytest.mark.parametrize("tar_bytes", [stage.TAR_BYTES, 1000], ids=["whole", "cut by its index"])
def test_a_tar_is_its_members_with_their_captions(tar_bytes, build, models, monkeypatch):
    monkeypatch.setattr(stage, "TAR_BYTES", tar_bytes)
    fill(build, {"t.tar": webdataset()})
    seen = described(build, models, shard_images=2)
    assert fates(build, seen) == MEMBERS
    assert captions(build, seen) == TEXTS
    assert licences(build, seen)["t.tar::000.jpg"] == "CC0"
    assert not list(Path(build.corpus.uri).parent.parent.glob("00*"))
    assert len(vectors(build, seen, "clip")) == 4
    quiet = again(build)
    assert described(quiet, models, shard_images=2) == seen and not work(quiet)


def test_members_of_one_name_are_all_images_and_can_be_embedded_later(build, models):
    twice = [("a.jpg", COLOURS["0.jpg"]), ("a.jpg", COLOURS["1.jpg"]), ("a.txt", b"both")]
    fill(build, {"t.tar": tar(twice)})
    seen = described(build)
    assert list(captions(build, seen).values()) == [["both"], ["both"]]
    later = again(build)
    assert len(vectors(later, described(later, models), "dino")) == 2


def test_parquet_as_datasets_writes_it(build, models):
    struct = [{"bytes": data, "path": key} for key, data in COLOURS.items()]
    struct[2] = None
    texts = [f"caption {n}" for n in range(6)]
    fill(build, {"p.parquet": parquet({"image": struct, "text": texts}, row_group_size=2)})
    seen = described(build)
    assert fates(build, seen) == {
        f"p.parquet::{n:08d}": "unreadable" if n == 2 else "image" for n in range(6)
    }
    assert captions(build, seen)["p.parquet::00000005"] == ["caption 5"]
    later = again(build)
    assert len(vectors(later, described(later, models), "dino")) == 5


# Only what changed ---------------------------------------------------------------------------


def test_a_second_describe_does_nothing(build, models):
    fill(build, {**COLOURS, "captions.csv": "file_name,caption\n0.jpg,a cat\n"})
    fill(build, {"broken.jpg": b"x", "empty.tar": tar([]), "words": "no picture"})
    first = described(build, models)
    assert work(build) == {"images_decoded": 6, "images_embedded": 6}
    plan = again(build, planning=True)
    assert described(plan, models) == first
    assert not work(plan)
    with pytest.raises(WouldRun):
        fill(build, {"7.jpg": pictures.jpeg(seed=7)})
        described(plan, models)


def test_a_renamed_file_costs_a_read_and_no_decode(build, models):
    fill(build, COLOURS)
    before = images(build, described(build, models))
    fill(build, {"moved/0.jpg": COLOURS["0.jpg"]})
    build.corpus.delete("0.jpg")
    after = again(build)
    seen = described(after, models)
    assert work(after) == {}
    assert images(after, seen)["moved/0.jpg"] == before["0.jpg"]
    assert len(fates(after, seen)) == 6


def test_a_file_that_was_moved_costs_nothing(tmp_path, pool, models):
    build = noting(make_build(tmp_path, pool))
    fill(build, {**COLOURS, "t.tar": webdataset(), "0.txt": "beside it"})
    before = described(build, models)
    root = Path(build.corpus.uri)
    (root / "moved").mkdir()
    for name in ("0.jpg", "0.txt", "1.jpg", "t.tar"):
        (root / name).rename(root / "moved" / name)
    stores.READS.clear()
    after = again(build)
    seen = described(after, models)
    assert work(after) == {} and stores.READS == []
    assert captions(after, seen)["moved/0.jpg"] == ["beside it"]
    assert set(images(after, seen).values()) == set(images(build, before).values())
    assert fates(after, seen)["moved/t.tar::000.jpg"] == "image"
    assert len(fates(after, seen)) == len(fates(build, before))


def test_a_moved_file_whose_caption_stayed_is_read_again(tmp_path, pool):
    build = noting(make_build(tmp_path, pool))
    fill(build, {"0.jpg": COLOURS["0.jpg"], "0.txt": "beside it"})
    described(build)
    Path(build.corpus.uri, "0.jpg").rename(Path(build.corpus.uri, "1.jpg"))
    stores.READS.clear()
    seen = described(again(build))
    assert captions(build, seen) == {"1.jpg": []} and stores.READS == ["1.jpg"]


def test_bytes_that_change_behind_an_equal_stamp_are_found_by_their_digest(build):
    fill(build, {"0.jpg": pictures.jpeg(40, 36, 1), "1.jpg": pictures.jpeg(40, 36, 2)})
    path = Path(build.corpus.uri, "0.jpg")
    digests = {"check": "digest"}
    first = described(build, corpus=digests)
    assert described(again(build), corpus=digests) == first
    stat, data = path.stat(), bytearray(path.read_bytes())
    plain = described(again(build))
    data[-3] ^= 1
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert images(build, described(again(build))) == images(build, plain)
    found = images(build, described(again(build), corpus=digests))
    assert found["0.jpg"] != images(build, first)["0.jpg"]
    path.rename(path.with_name("9.jpg"))
    after = again(build)
    assert set(images(build, described(after, corpus=digests))) == {"1.jpg", "9.jpg"}
    assert not work(after)


def test_a_file_written_within_the_second_of_its_listing_is_read_once_more(tmp_path, pool):
    """Where times have whole seconds; they are made so here."""
    build = noting(make_build(tmp_path, pool))
    fill(build, {"0.jpg": COLOURS["0.jpg"]})
    now = int(time.time()) * 1_000_000_000
    path = Path(build.corpus.uri, "0.jpg")
    os.utime(path, ns=(now, now))
    before = images(build, described(build))
    with path.open("r+b") as file:
        file.write(pictures.jpeg(40, 36, 9).ljust(path.stat().st_size, b"\0"))
    os.utime(path, ns=(now, now))
    assert images(build, described(again(build))) != before
    time.sleep(max(0.0, now / 1e9 + 2.1 - time.time()))
    described(again(build))
    stores.READS.clear()
    described(again(build))
    assert stores.READS == []


def test_what_was_read_and_is_not_what_was_listed_is_left_to_the_next_build(tmp_path, pool):
    build = make_build(tmp_path, pool)
    fill(build, {"0.jpg": COLOURS["0.jpg"], "t.tar": webdataset()})
    settings = CorpusParams(uri=build.corpus.uri)
    found = snapshot(build, settings)
    for key in ("0.jpg", "t.tar"):
        touch(build, key)
    params = stage.DescribeParams(min_side=1, device="cpu")
    seen = stage.describe(build, found.listing, found.file_captions, settings, {}, params)
    assert fates(build, seen) == {"0.jpg": "vanished", "t.tar": "vanished"}
    assert fates(build, described(again(build)))["0.jpg"] == "image"


def test_a_changed_file_under_an_old_name_is_noticed(build, models):
    fill(build, COLOURS)
    before = images(build, described(build, models))
    fill(build, {"0.jpg": pictures.jpeg(seed=9)})
    after = again(build)
    found = images(after, described(after, models))
    assert found["0.jpg"] != before["0.jpg"]
    assert {key: found[key] for key in found if key != "0.jpg"} == {
        key: before[key] for key in before if key != "0.jpg"
    }
    assert work(after) == {"images_decoded": 1, "images_embedded": 1}


def test_a_removed_file_is_in_nothing_that_follows(build, models):
    fill(build, {**COLOURS, "0.txt": "a cat"})
    described(build, models)
    build.corpus.delete("0.jpg")
    after = again(build)
    seen = described(after, models)
    assert "0.jpg" not in fates(after, seen) and "0.jpg" not in images(after, seen)
    assert rows(after, seen.captions) == [] and not work(after)


def test_a_copy_takes_over_when_the_first_of_its_kind_goes(build, models):
    fill(build, {"a.jpg": COLOURS["0.jpg"], "b.jpg": COLOURS["0.jpg"]})
    assert list(images(build, described(build, models))) == ["a.jpg"]
    build.corpus.delete("a.jpg")
    after = again(build)
    assert list(images(after, described(after, models))) == ["b.jpg"] and not work(after)


def test_a_changed_model_costs_its_own_vectors_alone(build, models, tmp_path):
    fill(build, COLOURS)
    first = described(build, models)
    folder = write_timm(tmp_path / "new", seed=3)
    changed = {**models, "dino": ModelParams(library="timm", name=str(folder), batch=BATCH)}
    after = again(build)
    second = described(after, changed)
    assert work(after) == {"images_decoded": 6, "images_embedded": 6}
    assert second.looks == first.looks and second.vectors["clip"] == first.vectors["clip"]
    assert second.images == first.images
    old, new = vectors(build, first, "dino"), vectors(after, second, "dino")
    assert old.keys() == new.keys() and all(old[key] != new[key] for key in old)
    back = again(build)
    assert described(back, models).vectors == first.vectors and not work(back)


def test_a_model_added_later_embeds_what_is_there(build, models):
    fill(build, COLOURS)
    described(build, {"clip": models["clip"]})
    after = again(build)
    seen = described(after, models)
    assert len(vectors(after, seen, "dino")) == 6
    assert len(vectors(after, seen, "clip")) == 6
    assert work(after) == {"images_decoded": 6, "images_embedded": 6}


def test_moved_limits_let_images_in_and_out_and_read_no_others(tmp_path, pool, models):
    build = noting(make_build(tmp_path, pool))
    fill(build, {f"{side}.png": pictures.png(side, side, side) for side in (20, 40, 60)})
    strict = described(build, models, min_side=50)
    assert sorted(images(build, strict)) == ["60.png"]
    stores.READS.clear()
    loose = again(build)
    assert sorted(images(loose, described(loose, models, min_side=30))) == ["40.png", "60.png"]
    assert stores.READS == ["40.png"]
    assert work(loose) == {"images_decoded": 1, "images_embedded": 1}
    stores.READS.clear()
    back = again(build)
    seen = described(back, models, min_side=50)
    assert sorted(images(back, seen)) == ["60.png"] and not work(back) and not stores.READS
    assert fates(back, seen) == {"20.png": "too_small", "40.png": "too_small", "60.png": "image"}


def noting(build: Build) -> Build:
    return dataclasses.replace(build, corpus=stores.NotingStore(build.corpus.uri))


def test_an_image_that_goes_before_a_new_model_saw_it_has_vanished(tmp_path, pool, models):
    build = make_build(tmp_path, pool)
    fill(build, {"a.jpg": COLOURS["0.jpg"], "b.jpg": COLOURS["0.jpg"], "c.jpg": COLOURS["1.jpg"]})
    described(build)
    settings = CorpusParams(uri=build.corpus.uri)
    found = snapshot(build, settings)
    for key in ("a.jpg", "c.jpg"):
        build.corpus.delete(key)
    params = stage.DescribeParams(min_side=1, device="cpu")
    seen = stage.describe(build, found.listing, found.file_captions, settings, models, params)
    assert fates(build, seen) == {"a.jpg": "vanished", "b.jpg": "image", "c.jpg": "vanished"}
    assert list(images(build, seen)) == ["b.jpg"]
    assert len(vectors(build, seen, "dino")) == 1


# A function of the set -----------------------------------------------------------------------


def test_neither_order_nor_shards_nor_history_change_images_or_vectors(tmp_path, pool, models):
    files = {f"{n:03d}.jpg": pictures.jpeg(40, 36, n) for n in range(70)}
    at_once = make_build(tmp_path / "once", pool)
    fill(at_once, files)
    whole = described(at_once, models)
    in_parts = make_build(tmp_path / "parts", pool)
    for start in (35, 0):
        fill(in_parts, dict(list(files.items())[start : start + 35]))
        parts = described(again(in_parts), models, shard_images=7, threads=1)
    assert rows(at_once, whole.images) == rows(in_parts, parts.images)
    for model in models:
        assert vectors(at_once, whole, model) == vectors(in_parts, parts, model)
    looks = [
        {row["image_id"]: row for row in rows(build, seen.looks)}
        for build, seen in ((at_once, whole), (in_parts, parts))
    ]
    assert looks[0] == looks[1] and len(looks[0]) == 70


# Interruptions -------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


def test_an_interrupted_describe_does_finished_shards_no_more(tmp_path, pool, models):
    build = make_build(tmp_path, pool)
    fill(build, {f"{n:03d}.jpg": pictures.jpeg(40, 36, n) for n in range(200)})

    def stop(name: str, done: int, total: int | None) -> None:
        if name == "describe":
            raise Interrupted

    with pytest.raises(Interrupted):
        described(again(build, progress=stop), models)
    receipts = [s.key for s in build.store.list("ledger/describe/") if "/receipts/" in s.key]
    assert 1 <= len(receipts) <= 4
    resumed = again(build)
    seen = described(resumed, models)
    assert work(resumed)["images_decoded"] <= 200 - 8
    assert len(images(resumed, seen)) == 200 == len(vectors(resumed, seen, "clip"))


def test_an_image_that_kills_its_worker_costs_nobody_else(tmp_path):
    files = {f"{n}.jpg": pictures.jpeg(40, 36, n) for n in range(3)}
    with open_pool(ClusterParams(kind="local", workers=1)) as cluster:
        build = make_build(tmp_path, cluster)
        fill(build, files)
        deadly = stores.DeadlyStore(build.corpus.uri, poison="1.jpg", driver=os.getpid())
        build = dataclasses.replace(build, corpus=deadly)
        seen = described(build)
        assert {key: rule for key, rule in fates(build, seen).items() if rule != "image"} == {
            "1.jpg": "crashed_decoder"
        }
        assert "killed" in details(build, seen)["1.jpg"]
        quiet = again(build)
        assert described(quiet) == seen and not work(quiet)


# Elsewhere -----------------------------------------------------------------------------------


def test_s3_is_described_as_a_folder_is(moto_endpoint, build, models):  # noqa: F811
    files = {
        **COLOURS,
        "captions.csv": "file_name,caption\n0.jpg,a cat\n",
        "t.tar": webdataset(),
        "p.parquet": parquet({"image": list(COLOURS.values())}, row_group_size=2),
        "sub/": b"",
    }
    create_bucket(moto_endpoint, "pictures")
    client = boto3.client("s3", endpoint_url=moto_endpoint)
    for key, data in files.items():
        body = data.encode() if isinstance(data, str) else data
        client.put_object(Bucket="pictures", Key=f"set/{key}", Body=body)
    place = {"endpoint": moto_endpoint, "region": "us-east-1"}
    bucket = Build(
        open_store(Location(uri="s3://pictures/set", **place)),
        open_store(Location(uri="s3://pictures/store", **place)),
        build.pool,
    )
    fill(build, {key: data for key, data in files.items() if not key.endswith("/")})
    seen, here = described(bucket, models, corpus=place), described(build, models)
    assert fates(bucket, seen) == fates(build, here)
    assert captions(bucket, seen) == captions(build, here)
    assert rows(bucket, seen.images) == rows(build, here.images)
    assert vectors(bucket, seen, "clip") == vectors(build, here, "clip")
    quiet = again(bucket)
    assert described(quiet, models, corpus=place) == seen and not work(quiet)


def test_on_s3_a_renamed_object_costs_nothing_and_a_new_upload_a_read(
    moto_endpoint,  # noqa: F811
    build,
    models,
    monkeypatch,
):
    from infra.s3 import S3Store

    create_bucket(moto_endpoint, "nights")
    client = boto3.client("s3", endpoint_url=moto_endpoint)
    for key in ("0.jpg", "1.jpg"):
        client.put_object(Bucket="nights", Key=f"set/{key}", Body=COLOURS[key])
    place = {"endpoint": moto_endpoint, "region": "us-east-1"}
    corpus = open_store(Location(uri="s3://nights/set", **place))
    bucket = dataclasses.replace(build, corpus=corpus)
    before = images(bucket, described(bucket, models, corpus=place))
    read, get = [], S3Store.get
    monkeypatch.setattr(S3Store, "get", lambda self, *a: read.append(a[0]) or get(self, *a))
    client.copy_object(Bucket="nights", Key="set/9.jpg", CopySource="nights/set/0.jpg")
    client.delete_object(Bucket="nights", Key="set/0.jpg")
    moved = again(bucket)
    found = images(moved, described(moved, models, corpus=place))
    assert (found["9.jpg"], read, work(moved)) == (before["0.jpg"], [], {})
    client.put_object(Bucket="nights", Key="set/1.jpg", Body=COLOURS["2.jpg"])
    later = again(bucket)
    assert images(later, described(later, models, corpus=place))["1.jpg"] != before["1.jpg"]
    assert read == ["1.jpg"]


def test_a_model_that_does_not_load_ends_it_before_any_work(build, tmp_path):
    fill(build, COLOURS)
    wrong = {"clip": ModelParams(library="open_clip", name=str(tmp_path))}
    with pytest.raises(ConfigError, match="open_clip can't load"):
        described(build, wrong)
    assert not work(build)


def test_a_replaced_model_file_is_noticed(build, tmp_path):
    folder = write_timm(tmp_path / "model")
    fill(build, {"captions.jsonl": jsonl({"file_name": "0.jpg", "text": "x"}), **COLOURS})
    model = {"dino": ModelParams(library="timm", name=str(folder), batch=BATCH)}
    old = vectors(build, described(build, model), "dino")
    write_timm(folder, seed=8)
    after = again(build)
    assert vectors(after, described(after, model), "dino") != old
    assert work(after)["images_embedded"] == 6
