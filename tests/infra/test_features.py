"""Features: limits, one decode for all, and vectors that depend on their picture alone."""

import numpy as np
import pytest
from PIL import Image

from infra import features, images, tables
from infra.corpus import Bounds, Source
from infra.errors import ConfigError
from infra.features import Job, Limits, Shards
from infra.models import Geometry, ModelParams, load
from infra.tables import Shard, Table
from tests import pictures
from tests.conftest import write_timm
from tests.corpora import fill

LIMITS = Limits(min_side=32, max_pixels=1_000_000, max_aspect=8.0)


@pytest.mark.parametrize(
    ("width", "height", "verdict"),
    [
        (32, 32, None),
        (31, 500, ("too_small", 31)),
        (1000, 1000, None),
        (1001, 1000, ("too_large", 1_001_000)),
        (60_000, 60_000, ("too_large", 3_600_000_000)),
        (256, 32, None),
        (257, 32, ("extreme_aspect", 8031)),
        (32, 257, ("extreme_aspect", 8031)),
        (1, 100, ("too_small", 1)),
    ],
)
def test_limits_name_the_rule_and_the_value_that_decided(width, height, verdict):
    assert LIMITS.rule(width, height) == verdict


def look(data: bytes, *geometries: Geometry) -> features.Seen:
    return features.look(("id", data), LIMITS, geometries, 32)


def test_one_look_gives_hashes_quality_and_the_input_of_every_model():
    data = pictures.jpeg(640, 480)
    sizes = [
        Geometry(32, "squash", "bicubic", 0, 1.0),
        Geometry(24, "shortest", "bilinear", 255, 0.9),
        Geometry(16, "longest", "bicubic", 255, 1.0),
    ]
    seen = look(data, *sizes)
    assert seen.header == {
        "image_id": "id",
        "bytes": len(data),
        "format": "JPEG",
        "width": 640,
        "height": 480,
        "frames": 1,
    }
    picture = images.decode(data, 32)
    assert seen.look["phash"] == images.phash(picture)
    assert seen.look["dhash"] == images.dhash(picture)
    assert len(seen.look["thumbnail"]) == 16 * 16 * 3
    assert seen.look["informative"] is True
    assert [seen.pixels[g].shape for g in sizes] == [(32, 32, 3), (24, 24, 3), (16, 16, 3)]
    assert (seen.pixels[sizes[0]] == images.fit(picture, 32, "squash", "bicubic", 0)).all()


def test_a_bomb_is_judged_by_its_header(monkeypatch):
    monkeypatch.setattr(images, "decode", None)
    assert look(pictures.UNREADABLE["png_bomb"]()).header["rule"] == "too_large"
    seen = look(pictures.png(1001, 1000))
    assert (seen.header["width"], seen.look, seen.pixels) == (1001, None, {})


def test_a_header_that_reads_well_does_not_promise_pixels():
    seen = look(pictures.UNREADABLE["png_cut"]())
    assert "rule" not in seen.header and seen.pixels == {}
    assert seen.look["rule"] == "unreadable" and "truncated" in seen.look["detail"]


def test_the_detail_of_what_can_not_be_read_is_bounded():
    for make in pictures.UNREADABLE.values():
        seen = look(make())
        row = seen.header if "rule" in seen.header else seen.look or {}
        assert row.get("rule", "too_small") in ("unreadable", "too_large", "too_small")
        assert len(row.get("detail", "")) <= 200


# Shards --------------------------------------------------------------------------------------


def job(build, models, **more) -> Job:
    facts = {name: load(params, "cpu").facts for name, params in models.items()}
    specs = {name: (models[name], facts[name], name) for name in models}
    fields = {"known": None, "threads": 2, "short_side": 32, **more}
    return Job(build.corpus, build.store, "fam", LIMITS, Bounds(), specs, "cpu", **fields)


def shard(build, *keys: str, needs=("looks", "clip", "dino")) -> Shards:
    stats = [build.corpus.head(key) for key in keys]
    return Shards(tuple(Source(s.key, "loose", s.etag, s.size) for s in stats), needs)


def vectors(build, record, name: str) -> dict[str, bytes]:
    table = Table(f"vectors-{name}", (Shard(*record["tables"][f"vectors/{name}"]),))
    rows = tables.read(build.store, table)
    ids, matrix = rows["image_id"].to_pylist(), tables.matrix(rows["vector"])
    return {image_id: vector.tobytes() for image_id, vector in zip(ids, matrix, strict=True)}


def test_a_shard_has_a_receipt_and_is_done_once(build, models):
    fill(build, {f"{n}.jpg": pictures.jpeg(40, 36, n) for n in range(3)})
    work = shard(build, "0.jpg", "1.jpg", "2.jpg")
    first = features.describe_shard(job(build, models), work)
    again = features.describe_shard(job(build, models), work)
    assert (first["fresh"], again["fresh"]) == (True, False)
    assert first["tables"] == again["tables"]
    assert first["work"] == {"images_decoded": 3, "images_embedded": 3}


def test_a_shard_from_which_something_vanished_has_none(build):
    fill(build, {"a.jpg": pictures.jpeg()})
    gone = Source("b.jpg", "loose", "s", 9)
    work = shard(build, "a.jpg", needs=("looks",))
    work = work._replace(sources=(*work.sources, gone))
    for _ in range(2):
        assert features.describe_shard(job(build, {}), work)["fresh"]


def test_vectors_are_bit_equal_whatever_shares_their_shard(build, models):
    keys = [f"{n:02d}.jpg" for n in range(19)]
    fill(build, {key: pictures.jpeg(40, 36, n) for n, key in enumerate(keys)})
    together = features.describe_shard(job(build, models), shard(build, *keys))
    apart = [
        features.describe_shard(job(build, models, threads=1), shard(build, *part))
        for part in (keys[:1], keys[5:0:-1], keys[6:])
    ]
    for name in models:
        parts: dict[str, bytes] = {}
        for record in apart:
            parts |= vectors(build, record, name)
        assert parts == vectors(build, together, name) and len(parts) == 19


def test_a_byte_copy_is_decoded_once_in_a_shard(build):
    data = pictures.jpeg(40, 36)
    fill(build, {"a.jpg": data, "b.jpg": data})
    record = features.describe_shard(
        job(build, {}), shard(build, "a.jpg", "b.jpg", needs=("looks",))
    )
    assert record["work"] == {"images_decoded": 1}
    objects = tables.read(build.store, Table("objects", (Shard(*record["tables"]["objects"]),)))
    assert len(set(objects["image_id"].to_pylist())) == 1 and objects.num_rows == 2


def test_weights_that_are_not_the_drivers_are_refused(timm_folder, tmp_path):
    params = ModelParams(library="timm", name=str(timm_folder), batch=8)
    other = ModelParams(library="timm", name=str(write_timm(tmp_path / "o", seed=4)), batch=8)
    with pytest.raises(ConfigError, match="are not those this store was built with"):
        features.load_checked(other, "cpu", load(params, "cpu").facts)
    assert (
        features.load_checked(params, "cpu", features.model_facts(params, "cpu")).params == params
    )


def test_captions_are_embedded_with_a_receipt(build, models):
    rows = tuple((f"{n:064x}", f"a photo of {n} cats") for n in range(19))
    spec = job(build, {"clip": models["clip"]})
    record = features.embed_captions(spec, "clip", rows)
    assert features.embed_captions(spec, "clip", rows)["tables"] == record["tables"]
    found = tables.read(build.store, Table("texts-clip", (Shard(*record["tables"]["texts/clip"]),)))
    assert found["caption_id"].to_pylist() == [row[0] for row in rows]
    norms = np.linalg.norm(tables.matrix(found["vector"]).astype(np.float64), axis=1)
    assert np.allclose(norms, 1, atol=2e-3)


def test_pixels_are_rgb_on_white():
    clear = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    seen = look(pictures.encode(clear, "PNG"), Geometry(32, "squash", "bicubic", 0, 1.0))
    assert (next(iter(seen.pixels.values())) == 255).all()
