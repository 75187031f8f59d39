"""Describe: read each new image once, decode it once, keep hashes, quality and vectors."""

import tarfile
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import chain, groupby
from typing import Any, NamedTuple

import polars as pl
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from infra import corpus, features, growing, tables, tombstones
from infra.build import Build
from infra.captions import Columns, caption_id
from infra.cluster import Crash
from infra.corpus import Bounds, Source
from infra.features import DECODE_VERSION, Job, Limits, Shards
from infra.growing import Grown
from infra.ledger import family
from infra.licences import stricter
from infra.models import ModelFacts, ModelParams, choose_device
from infra.schema import SCHEMAS
from infra.tables import Shard, Table

VERSION = 2
# A larger tar is cut by its index, so that one shard is minutes of work at most.
TAR_BYTES = 1 << 30
CAPTIONS_A_SHARD = 2_048
LISTED = ("key", "kind", "stamp", "size", "sidecars")
FORGOTTEN = dict.fromkeys(SCHEMAS["forgotten"].names, pl.String)


class DescribeParams(BaseModel):
    """Limits on pictures, judged from the header, and where models run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_side: int = Field(32, ge=1, description="Shortest side in pixels; below: too_small.")
    max_pixels: int = Field(
        100_000_000, ge=1, le=178_956_970, description="Width * height; above: too_large."
    )
    max_aspect: float = Field(8.0, ge=1, description="Long / short side; above: extreme_aspect.")
    device: str = Field(
        "auto", pattern="^(auto|cpu|cuda)$", description="cuda where there is one, else cpu."
    )
    shard_images: int = Field(
        1_000, ge=1, le=100_000, description="Images in a task at most; small corpora use less."
    )
    threads: int = Field(2, ge=1, le=64, description="Decoding threads in a worker.")


class Described(NamedTuple):
    """What is known of every object and image, and where vectors lie.

    `vectors` and `texts` are tables by model name; they may hold more rows than this corpus.
    `listing` is without files that turned out to be forgotten when they were read.
    """

    objects: Table
    images: Table
    looks: Table
    captions: Table
    image_captions: Table
    vectors: dict[str, Table]
    texts: dict[str, Table]
    drops: Table
    listing: Table


def describe(
    build: Build,
    listing: Table,
    file_captions: Table,
    corpus_params: Any,
    models: Mapping[str, ModelParams],
    params: DescribeParams,
) -> Described:
    """Describe what is new; what was seen before costs a look-up.

    Raises ConfigError for a model that can't be loaded.
    """
    device = choose_device(params.device)
    facts = {name: features.facts_of(build, spec, device) for name, spec in models.items()}
    job = _job(build, corpus_params, models, facts, params, device)
    state = _State(build, job)
    job = job._replace(forgotten=state.gone.digest)
    listed = tables.frame(build.store, listing)
    known = state.frame("objects").join(
        listed.select("key", "stamp"), on=["key", "stamp"], how="semi"
    )
    known = known.unique(["key", "member"], keep="last", maintain_order=True)
    new = listed.join(known.select("key").unique(), on="key", how="anti")
    hidden = state.frame("forgotten").join(listed, on=["key", "stamp"], how="semi")
    new = new.join(hidden.select("key").unique(), on="key", how="anti")
    if new.height and (moved := _renamed(state, new)).height:
        known = pl.concat([known, _add_objects(build, state, moved)])
        new = new.join(moved.select("key").unique(), on="key", how="anti")
    # Once more where an image was lost to a model it lacked, and a copy lies elsewhere.
    while todo := list(_todo(state, job, known, new, params.shard_images)):
        build.begin("describe", _ahead(new, todo))
        found = _run(build, state, job, todo)
        known = pl.concat([known, found]).unique(
            ["key", "member"], keep="last", maintain_order=True
        )
        new = new.clear()
    hidden = pl.concat([hidden, *state.met])
    objects = _with_file_captions(known, file_captions, corpus_params, build)
    captions = _captions(build, objects)
    state.release(objects, captions)
    for name, (_, model, _) in job.models.items():
        if model.has_text:
            _embed_captions(build, state, job, name, captions)
    listing = _without(build, state, listing, hidden)
    return _described(build, state, job, objects, captions, hidden, listing)


def _ahead(new: pl.DataFrame, todo: list[Shards]) -> dict[str, Any]:
    """What is to be read, for a plan: new files, and images known before that lack something."""
    fresh = set(new["key"])
    again = [shard.needs for shard in todo for source in shard.sources if source.key not in fresh]
    return {
        "new": new.height,
        "bytes": int(new["size"].sum()),
        "again": len(again),
        "lacking": sorted({name for needs in again for name in needs}),
    }


def _job(
    build: Build,
    corpus_params: Any,
    models: Mapping[str, ModelParams],
    facts: Mapping[str, ModelFacts],
    params: DescribeParams,
    device: str,
) -> Job:
    limits = Limits(params.min_side, params.max_pixels, params.max_aspect)
    columns = Columns("", corpus_params.caption_column, corpus_params.licence_column or None)
    bounds = Bounds(max_chars=corpus_params.max_caption_chars, columns=columns)
    short_side = max((model.geometry.size for model in facts.values()), default=96)
    decode = [DECODE_VERSION, short_side]
    numerics = {name: facts[name].numerics(models[name], device, decode) for name in models}
    shared = {
        "corpus": build.corpus.uri,
        "limits": list(limits),
        "bounds": list(bounds),
        "models": numerics,
        "decode": decode,
    }
    specs = {name: (models[name], facts[name], numerics[name]) for name in models}
    kin = family("describe", VERSION, shared)
    stores = (build.corpus, build.store)
    return Job(*stores, kin, limits, bounds, specs, device, None, params.threads, short_side)


class _State:
    """The growing tables of describe: what any build in this store has found out so far.

    They are freed of what was forgotten before anybody reads them. `met` collects hashes of
    forgotten objects that this build came upon.
    """

    def __init__(self, build: Build, job: Job):
        self.build = build
        self.gone = tombstones.load(build.store)
        build.footprint.tombstones = self.gone.digest
        self.met: list[pl.DataFrame] = []
        shared = {"corpus": build.corpus.uri, "bounds": list(job.bounds)}
        self.names = {
            "objects": family("objects", DECODE_VERSION, shared),
            "forgotten": family("objects", DECODE_VERSION, shared),
            "headers": family("headers", DECODE_VERSION, {}),
            "looks": family("looks", DECODE_VERSION, {"decoded": job.short_side}),
        }
        for name, (_, _, numerics) in job.models.items():
            self.names[f"vectors/{name}"] = numerics
            self.names[f"texts/{name}"] = numerics
        build.footprint.families.update(self.names)
        self.grown: dict[str, Grown] = {}
        for name, kin in self.names.items():
            self.grown[name] = growing.load(build.ledger, name.partition("/")[0], kin)
        dirty = [name for name in self.names if self.grown[name].free_of != self.gone.digest]
        for name in dirty if self.gone else ():
            self._free(name)

    @property
    def tables(self) -> dict[str, Table]:
        return {name: grown.table for name, grown in self.grown.items()}

    def _free(self, name: str) -> None:
        """Rewrite what tombstones name, and record that the rest is free of them."""
        grown = self.grown[name]
        table, removed = growing.clean(self.build.store, grown, self.gone)
        if table != grown.table:
            rows = grown.table.rows - table.rows
            self.build.begin("describe", {"forgotten": rows})
        if removed:
            self.forget(pl.DataFrame(removed, FORGOTTEN))
        if not self.build.planning and (table.shards or grown.table.shards):
            self.grown[name] = growing.save(self.build.ledger, grown, table, self.gone.digest)

    def forget(self, rows: pl.DataFrame) -> None:
        """Note forgotten objects by their hashes: loose ones for the next listing to leave out,
        members of containers in a table beside the objects.
        """
        loose = rows.filter(pl.col("key").is_null())
        objects = dict(loose.select("place", "image").iter_rows())
        tombstones.add(self.build.store, self.gone, objects=objects, names=rows["id"].to_list())
        members = rows.filter(pl.col("key").is_not_null())
        if members.height:
            written = tables.write_frame(self.build.store, "forgotten", members)
            self.add("forgotten", list(written.shards))

    def release(self, objects: pl.DataFrame, captions: pl.DataFrame) -> None:
        """Names and captions that were forgotten, and are in use again by what was not."""
        if not self.gone or self.build.planning:
            return
        present = objects.filter(pl.col("rule").ne_missing("vanished"))
        names = {self.gone.keyed(name) for name in corpus.object_ids(present)}
        texts = {self.gone.keyed(caption) for caption in captions["caption_id"].unique()}
        tombstones.add(self.build.store, self.gone, released=names | texts)

    def add(self, name: str, new: list[Shard]) -> None:
        """Append shards and record the table as it now stands."""
        self.grown[name] = growing.append(
            self.build.ledger, self.grown[name], new, self.gone.digest
        )

    def frame(self, name: str, columns: list[str] | None = None) -> pl.DataFrame:
        return tables.frame(self.build.store, self.tables[name], columns)


def _renamed(state: _State, new: pl.DataFrame) -> pl.DataFrame:
    """Object rows of new files that are known under another name, as they would be read again.

    A container with forgotten members is read: of those, only the hashes of old names are known.
    """
    partly = state.frame("forgotten", ["key", "stamp"]).drop_nulls()
    seen = state.frame("objects").join(partly, on=["key", "stamp"], how="anti")
    seen = seen.with_columns(pl.col("stamp").map_elements(corpus.identity, pl.String).alias("same"))
    wanted = new.select(
        pl.col("key").alias("now"),
        pl.col("stamp").alias("as_listed"),
        pl.col("kind"),
        pl.col("stamp").map_elements(corpus.identity, pl.String).alias("same"),
    )
    rows = seen.drop_nulls("same").join(wanted.drop_nulls("same"), on="same", how="inner")
    kinds = [corpus.kind_of(*row) for row in rows.select("key", "member").iter_rows()]
    rows = rows.filter(pl.Series(kinds, dtype=pl.String) == pl.col("kind"))
    # One of several old names, and no file of which nothing but a verdict on its name is known.
    first = rows.group_by("now").agg(pl.col("key").min())
    rows = rows.join(first, on=["now", "key"], how="semi").filter(
        pl.col("member").is_not_null() | pl.col("image_id").is_not_null()
    )
    return rows.with_columns(key="now", stamp="as_listed").select(SCHEMAS["objects"].names)


def _todo(
    state: _State, job: Job, known: pl.DataFrame, new: pl.DataFrame, shard_images: int
) -> Iterator[Shards]:
    """Shards of work: new sources, then images seen before that lack a family."""
    everything = ("looks", *job.models)
    fresh = [
        Source(key, kind, stamp, size, tuple(sidecars or ()))
        for key, kind, stamp, size, sidecars in new.select(LISTED).iter_rows()
    ]
    for sources in _shards([s for s in fresh if s.kind == "loose"], shard_images):
        yield Shards(sources, everything)
    for source in fresh:
        if source.kind == "tar" and source.size > TAR_BYTES:
            yield from _cut_tar(job, Shards((source,), everything), shard_images)
        elif source.kind != "loose":
            yield Shards((source,), everything)
    lacking = _lacking(state, job, known)
    for needs, part in groupby(sorted(lacking, key=lambda row: (row[0], row[1])), lambda r: r[0]):
        for sources in _shards([source for _, source in part], shard_images):
            yield Shards(sources, needs)


def _shards(sources: list[Source], most: int) -> Iterator[tuple[Source, ...]]:
    """Equal runs of sources: eight at least where there are enough, `most` sources each at most."""
    size = max(64, min(most, -(-len(sources) // 8)))
    for at in range(0, len(sources), size):
        yield tuple(sources[at : at + size])


def _lacking(state: _State, job: Job, known: pl.DataFrame) -> list[tuple[tuple[str, ...], Source]]:
    """Images whose rows are known and who lack hashes or a model's vectors, one source each."""
    usable = _usable(state, job, known)
    lack = {"looks": usable.join(state.frame("looks", ["image_id"]), on="image_id", how="anti")}
    broken = state.frame("looks", ["image_id", "rule"]).filter(pl.col("rule").is_not_null())
    for name in job.models:
        have = state.frame(f"vectors/{name}", ["image_id"])
        lack[name] = usable.join(have, on="image_id", how="anti").join(
            broken, on="image_id", how="anti"
        )
    needs: dict[Source, list[str]] = {}
    for name, frame in lack.items():
        for key, member, stamp, offset, size in frame.select(
            "key", "member", "stamp", "offset", "size"
        ).iter_rows():
            kind = corpus.kind_of(key, member)
            source = Source(key, kind, stamp, size, (), member, offset)
            needs.setdefault(source, []).append(name)
    return [(tuple(names), source) for source, names in needs.items()]


def _usable(state: _State, job: Job, objects: pl.DataFrame) -> pl.DataFrame:
    """One object an image, the first by key, where header and limits let it pass."""
    headers = state.frame("headers").unique("image_id").filter(pl.col("rule").is_null())
    small = [
        job.limits.rule(width, height) is None
        for width, height in headers.select("width", "height").iter_rows()
    ]
    headers = headers.filter(pl.Series(small, dtype=pl.Boolean)).drop("rule", "detail")
    return (
        objects.filter(pl.col("image_id").is_not_null())
        .sort("key", "member", nulls_last=False)
        .unique("image_id", keep="first", maintain_order=True)
        .join(headers, on="image_id", how="inner")
    )


def _cut_tar(job: Job, shard: Shards, shard_images: int) -> Iterator[Shards]:
    """A tar as shards of whole samples; one that can't be indexed stays as it is."""
    try:
        members = corpus.index_tar(job.corpus, shard.sources[0])
    except tarfile.TarError:
        yield shard
        return
    part: list[Source] = []
    for sample in _samples(members):
        part += sample
        if len(part) >= shard_images:
            yield shard._replace(sources=tuple(part))
            part = []
    if part:
        yield shard._replace(sources=tuple(part))


def _samples(sources: Iterable[Source]) -> list[list[Source]]:
    """Members of a sample together, wherever they stand in the tar."""
    samples: dict[tuple[str, str], list[Source]] = {}
    for source in sources:
        stem = corpus.sample_stem(source.member) if source.member else ""
        samples.setdefault((source.key, stem), []).append(source)
    return list(samples.values())


def _split(job: Job, shard: Shards) -> list[Shards]:
    """Halves of a shard that killed its workers; a tar is cut by its index first."""
    if len(shard.sources) == 1:
        source = shard.sources[0]
        return list(_cut_tar(job, shard, 64)) if source.kind == "tar" and not source.member else []
    samples = _samples(shard.sources)
    half = len(samples) // 2
    parts = [samples[:half], samples[half:]] if half else []
    return [shard._replace(sources=tuple(chain.from_iterable(part))) for part in parts]


def _run(build: Build, state: _State, job: Job, todo: list[Shards]) -> pl.DataFrame:
    """Do the shards, append what they found to the state, return the new object rows."""
    job = job._replace(known=_complete(build, state, job))
    total = sum(source.size for shard in todo for source in shard.sources)
    written: dict[str, list[Shard]] = {name: [] for name in state.names}
    done, crashed = 0, []
    work, split = partial(features.describe_shard, job), partial(_split, job)
    needs = features.resources(job.device)
    for shard, result in build.pool.map(work, todo, split=split, resources=needs):
        done += sum(source.size for source in shard.sources)
        build.progress("describe", done, total)
        if isinstance(result, Crash):
            crashed += [_crash(source, result) for source in shard.sources]
            continue
        if result["fresh"]:
            build.work.update(result["work"])
        for name, row in result["tables"].items():
            written[name].append(Shard(*row))
    if crashed:
        rows = pa.Table.from_pylist(crashed, schema=SCHEMAS["objects"])
        written["objects"].append(tables.write_shard(build.store, rows))
    for name, shards in written.items():
        if shards and name not in ("objects", "forgotten"):
            state.add(name, sorted(shards))
    if written["forgotten"]:
        state.met.append(
            tables.frame(build.store, Table("forgotten", tuple(sorted(written["forgotten"]))))
        )
        state.forget(state.met[-1])
    rows = tables.frame(build.store, Table("objects", tuple(sorted(written["objects"]))))
    return _add_objects(build, state, rows)


def _add_objects(build: Build, state: _State, rows: pl.DataFrame) -> pl.DataFrame:
    """Keep new object rows in the state, but nothing of a file that vanished: the next listing
    settles that. An image read once more has its row; only one lost meanwhile has a new one.
    """
    place = ["key", "member", "stamp"]
    before = state.frame("objects", [*place, "image_id"]).unique(place, keep="last")
    rows = rows.join(
        before.with_columns(known=True), on=place, how="left", suffix="_known", nulls_equal=True
    )
    other = (pl.col("image_id") != pl.col("image_id_known")).fill_null(False)
    rows = rows.with_columns(
        pl.when(~other).then("image_id").alias("image_id"),
        pl.when(other).then(pl.lit("vanished")).otherwise("rule").alias("rule"),
        pl.when(other).then(pl.lit("changed meanwhile")).otherwise("detail").alias("detail"),
    )
    lost = pl.col("image_id").is_null() & pl.col("image_id_known").is_not_null()
    seen = rows.filter(pl.col("known").is_null() | lost).select(SCHEMAS["objects"].names)
    gone = seen.filter(pl.col("rule") == "vanished")
    lasting = seen.join(gone, on="key", how="anti")
    if lasting.height:
        state.add("objects", list(tables.write_frame(build.store, "objects", lasting).shards))
    return seen


def _crash(source: Source, crash: Crash) -> dict[str, Any]:
    name = source.member or source.key
    rule = "crashed_decoder" if corpus.is_image_name(name) or source.member is None else "metadata"
    return {
        "key": source.key,
        "member": source.member,
        "stamp": source.stamp,
        "offset": source.offset,
        "size": source.size,
        "captions": [],
        "rule": rule,
        "detail": crash.reason[:200],
    }


def _complete(build: Build, state: _State, job: Job) -> Table | None:
    """Ids of images with everything this job computes, so that renamed files cost a read only."""
    headers = state.frame("headers", ["image_id"])
    if not headers.height:
        return None
    done = headers.unique()
    for name in ("looks", *(f"vectors/{model}" for model in job.models)):
        done = done.join(state.frame(name, ["image_id"]), on="image_id", how="semi")
    return tables.write_frame(build.store, "members", done.sort("image_id"))


def _with_file_captions(
    objects: pl.DataFrame, file_captions: Table, corpus_params: Any, build: Build
) -> pl.DataFrame:
    """Object rows with the captions and licences of caption files merged in."""
    rows = tables.frame(build.store, file_captions)
    by_key = rows.group_by("key").agg(
        pl.col("caption").filter(pl.col("caption") != "").unique().alias("more"),
        pl.col("licence").drop_nulls().unique().alias("stated"),
    )
    joined = objects.join(by_key, on="key", how="left")
    merged = joined.with_columns(
        pl.when(pl.col("member").is_null())
        .then(pl.concat_list(pl.col("captions").fill_null([]), pl.col("more").fill_null([])))
        .otherwise(pl.col("captions").fill_null([]))
        .list.unique()
        .list.sort()
        .alias("captions"),
        pl.Series("licence", _licences(joined)),
    ).with_columns(pl.col("licence").fill_null(corpus_params.licence))
    return merged.drop("more", "stated").sort("key", "member", nulls_last=False)


def _licences(objects: pl.DataFrame) -> list[str | None]:
    """The strictest licence that any copy of an image states, for each object, or None."""
    rows = list(objects.select("image_id", "licence", "stated").iter_rows())
    strictest: dict[str, str] = {}
    for image_id, licence, stated in rows:
        for one in filter(None, (licence, *(stated or ())) if image_id else ()):
            strictest[image_id] = stricter(strictest.get(image_id, one), one)
    return [strictest.get(image_id) for image_id, _, _ in rows]


def _captions(build: Build, objects: pl.DataFrame) -> pl.DataFrame:
    """Every caption of every image: image_id, caption_id, text."""
    rows = (
        objects.filter(pl.col("image_id").is_not_null())
        .select("image_id", pl.col("captions").alias("text"))
        .explode("text")
        .drop_nulls()
        .unique()
    )
    texts = rows["text"].unique().to_list()
    ids = pl.DataFrame(
        {"text": texts, "caption_id": [caption_id(text) for text in texts]},
        schema={"text": pl.String, "caption_id": pl.String},
    )
    return rows.join(ids, on="text").sort("image_id", "caption_id")


def _embed_captions(
    build: Build, state: _State, job: Job, name: str, captions: pl.DataFrame
) -> None:
    have = state.frame(f"texts/{name}", ["caption_id"])
    new = captions.select("caption_id", "text").unique().join(have, on="caption_id", how="anti")
    if not new.height:
        return
    build.begin("describe", {"captions": new.height})
    rows = list(new.sort("caption_id").iter_rows())
    size = max(256, min(CAPTIONS_A_SHARD, -(-len(rows) // 4)))
    shards = [tuple(rows[at : at + size]) for at in range(0, len(rows), size)]
    work, written = partial(features.embed_captions, job, name), []
    results = build.pool.map(work, shards, resources=features.resources(job.device))
    for done, (_, result) in enumerate(results, 1):
        if isinstance(result, Crash):
            raise RuntimeError(f"embedding captions with {name} ended its worker: {result.reason}")
        build.progress("describe captions", done, len(shards))
        written += [Shard(*row) for row in result["tables"].values()]
    state.add(f"texts/{name}", sorted(written))


def _described(
    build: Build,
    state: _State,
    job: Job,
    objects: pl.DataFrame,
    captions: pl.DataFrame,
    hidden: pl.DataFrame,
    listing: Table,
) -> Described:
    usable = _usable(state, job, objects)
    good = state.frame("looks", ["image_id", "rule"]).filter(pl.col("rule").is_null())
    images = usable.join(good.unique("image_id"), on="image_id", how="semi").sort("image_id")
    paired = captions.join(images, on="image_id", how="semi")
    texts = paired.select("caption_id", "text").unique().sort("caption_id")

    def write(name: str, frame: pl.DataFrame) -> Table:
        return tables.write_frame(build.store, name, frame)

    return Described(
        objects=write("objects", objects),
        images=write("images", images),
        looks=state.tables["looks"],
        captions=write("captions", texts),
        image_captions=write("image_captions", paired),
        vectors={name: state.tables[f"vectors/{name}"] for name in job.models},
        texts={
            name: state.tables[f"texts/{name}"]
            for name, (_, facts, _) in job.models.items()
            if facts.has_text
        },
        drops=tables.write(
            build.store, "drops", [*_drops(state, job, objects), *_forgotten(hidden)]
        ),
        listing=listing,
    )


def _drops(state: _State, job: Job, objects: pl.DataFrame) -> Iterator[dict[str, Any]]:
    """Objects with a rule of their own, and images that the limits or the decoder refused."""
    for row in objects.filter(pl.col("rule").is_not_null()).iter_rows(named=True):
        yield {
            "level": "object",
            "id": corpus.object_id(row["key"], row["member"]),
            "stage": "describe",
            "rule": row["rule"],
            "detail": row["detail"],
        }
    present = objects.select("image_id").drop_nulls().unique()
    headers = state.frame("headers").unique("image_id").join(present, on="image_id", how="semi")
    looks = state.frame("looks", ["image_id", "rule", "detail"]).unique("image_id")
    broken = headers.join(looks, on="image_id", how="left", suffix="_look")
    for row in broken.sort("image_id").iter_rows(named=True):
        drop = {"level": "image", "id": row["image_id"], "stage": "describe"}
        limit = None if row["rule"] else job.limits.rule(row["width"], row["height"])
        if row["rule"]:
            yield {**drop, "rule": row["rule"], "detail": row["detail"]}
        elif limit:
            yield {**drop, "rule": limit[0], "value": limit[1]}
        elif row["rule_look"]:
            yield {**drop, "rule": row["rule_look"], "detail": row["detail_look"]}


def _without(build: Build, state: _State, listing: Table, hidden: pl.DataFrame) -> Table:
    """The listing without loose files that are forgotten, as those read just now are not yet."""
    loose = hidden.filter(pl.col("key").is_null())
    if not loose.height:
        return listing
    rows, names = tables.frame(build.store, listing), set(loose["id"])
    kept = [state.gone.keyed(key) not in names for key in rows["key"]]
    return tables.write_frame(build.store, "listing", rows.filter(pl.Series(kept)))


def _forgotten(hidden: pl.DataFrame) -> Iterator[dict[str, Any]]:
    """A drop for each forgotten object and each forgotten image, under keyed hashes."""
    drop = {"stage": "forget", "rule": "forgotten"}
    for name in sorted(set(hidden["id"])):
        yield {**drop, "level": "object", "id": name}
    for image in sorted(set(hidden["image"].drop_nulls())):
        yield {**drop, "level": "image", "id": image}
