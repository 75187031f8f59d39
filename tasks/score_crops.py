"""Score crops: does a text fit the view it was written of, and is the view what it is called?

The cosine of CLIP's two towers (Radford et al. 2021), as RegionGPT (arXiv 2403.02330) filters
captions of regions. CLIP reads 77 tokens and such captions are longer, so sentences are scored.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import polars as pl
from pydantic import BaseModel, ConfigDict, Field

from infra import corpus, features, samples, tables
from infra.build import Build
from infra.cluster import Crash
from infra.ledger import stage
from infra.models import ModelParams, choose_device
from infra.pictures import View, cut
from infra.store import Store
from infra.tables import Shard, Table

SHARD = 256
PARTS = 1_000_000
SENTENCE = re.compile(r"(?<=[.!?。！？])\s+|\n+")  # noqa: RUF001


class ScoreParams(BaseModel):
    """How crops are compared with texts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field("clip", description="Which of `models`; it must have a text tower.")
    over: Literal["mean", "first"] = Field(
        "mean",
        description="`mean` of a caption's sentences, or its `first`. Which one RegionGPT scores is"
        " not given in the source; our own default, because 87 words are more than CLIP's 77"
        " tokens.",
    )
    classes: int = Field(
        20,
        ge=2,
        le=1_000,
        description="Classes among which the crop must rank its own. Not given in the source; our"
        " own addition.",
    )
    template: str = Field(
        "a photo of a {}", description="Text of a class; `{}` is its name. CLIP's own wording."
    )
    seed: int = Field(0, description="Of the draw of classes.")


class Scoring(NamedTuple):
    """Columns of the view, of its text and of its class; how; the model, and where it runs."""

    view: str
    text: str
    label: str | None
    params: ScoreParams
    model: ModelParams
    device: str = "auto"


class Scored(NamedTuple):
    """Samples with `clip_score` in millionths, and `class_rank` from 1 where they have a label.

    `views` and `texts` are the vectors that the next run starts from.
    """

    samples: Table
    views: Table
    texts: Table


def meaning(scoring: Scoring) -> Any:
    said = scoring.params.model_dump(mode="json", exclude={"model"})
    return [scoring.view, scoring.text, scoring.label, said]


@stage(
    version=1,
    reads={"given": tables.ALL, "objects": (), "vectors": ()},
    meaning=meaning,
    starts_from=("given", "sample_id"),
)
def score_crops(
    build: Build,
    given: Table,
    objects: Table,
    vectors: Table,
    params: Scoring,
    before: Scored | None = None,
) -> Scored:
    """Score every sample; one without a view or a text has null. `vectors` says by what weights.

    The classes that a sample is ranked among are drawn from those of all samples by its id.
    """
    rows = tables.frame(build.store, given)
    seen = rows[params.view].drop_nulls().unique().sort().to_list()
    labels = rows[params.label].drop_nulls().unique().sort().to_list() if params.label else []
    over = params.params.over
    spoken: dict[str | None, list[str]] = {
        text: sentences(text, over) for text in rows[params.text].drop_nulls()
    }
    wanted = {s for parts in spoken.values() for s in parts} | {_called(n, params) for n in labels}
    views = _views(build, seen, objects, params, before)
    texts = _texts(build, sorted(wanted), params, before)
    scores, ranks = [], []
    for row in rows.iter_rows(named=True):
        shown, said = views.of(row[params.view]), spoken.get(row[params.text])
        scores.append(_mean(shown, texts, said))
        label = row[params.label] if params.label else None
        among = classes(row["sample_id"], label, labels, params)
        ranks.append(_rank(shown, [texts.of(_called(name, params)) for name in among]))
    added = [pl.Series("clip_score", scores, pl.Int64)]
    if params.label:
        added.append(pl.Series("class_rank", ranks, pl.Int64))
    return Scored(
        samples.write(build.store, rows.with_columns(added)),
        tables.write(build.store, "views", views.rows()),
        tables.write(build.store, "spoken", texts.rows()),
    )


class _Vectors(NamedTuple):
    """Vectors by name."""

    place: Mapping[str, int]
    matrix: np.ndarray

    def of(self, name: str | None) -> np.ndarray | None:
        return self.matrix[self.place[name]] if name and name in self.place else None

    def rows(self) -> Any:
        return tables.vector_rows("id", self.place, self.matrix)


def sentences(text: str, over: str) -> list[str]:
    """The sentences of a text that are scored."""
    found = [part.strip() for part in SENTENCE.split(text) if part and part.strip()]
    return found[:1] if over == "first" else found


def classes(name: str, label: str | None, labels: Sequence[str], params: Scoring) -> list[str]:
    """The class of a sample, then others drawn by hash; none where it has no class."""
    if label is None:
        return []

    def draw(other: str) -> str:
        return hashlib.sha256(f"class {params.params.seed} {name} {other}".encode()).hexdigest()

    others = sorted((other for other in labels if other != label), key=draw)
    return [label, *others[: params.params.classes - 1]]


def _called(label: str, params: Scoring) -> str:
    return params.params.template.replace("{}", label)


def score(one: np.ndarray, other: np.ndarray) -> int:
    """rint(10^6 cos) of two float16 vectors; their sums are exact in float64."""
    a, b = one.astype(np.float64), other.astype(np.float64)
    norm = np.sqrt((a @ a) * (b @ b))
    return int(np.rint(PARTS * (a @ b) / norm)) if norm else 0


def _mean(shown: np.ndarray | None, texts: _Vectors, said: Sequence[str] | None) -> int | None:
    """Mean score of sentences, rounded down."""
    if shown is None or not said:
        return None
    found = [score(shown, texts.matrix[texts.place[sentence]]) for sentence in said]
    return sum(found) // len(found)


def _rank(shown: np.ndarray | None, among: Sequence[np.ndarray | None]) -> int | None:
    """Place of the first among all by score; one that ties with it is before it."""
    if shown is None or not among:
        return None
    found = [score(shown, vector) for vector in among if vector is not None]
    return 1 + sum(other >= found[0] for other in found[1:])


def _views(
    build: Build, seen: list[str], objects: Table, params: Scoring, before: Scored | None
) -> _Vectors:
    known = _known(build, before.views if before else None, seen)
    places = corpus.sources(tables.frame(build.store, objects))
    new = [(name, places[View.of(name).image_id]) for name in seen if name not in known.place]
    # Views of one image go together, so that it is read and decoded once.
    new.sort(key=lambda row: View.of(row[0]).image_id)
    device = choose_device(params.device)
    facts = features.facts_of(build, params.model, device)
    place = (build.corpus, build.store, params.model, facts, device)
    return _merged(known, _run(build, partial(embed_views, place), new, device), seen)


def _texts(build: Build, wanted: list[str], params: Scoring, before: Scored | None) -> _Vectors:
    known = _known(build, before.texts if before else None, wanted)
    new = [text for text in wanted if text not in known.place]
    device = choose_device(params.device)
    facts = features.facts_of(build, params.model, device)
    place = (build.store, params.model, facts, device)
    return _merged(known, _run(build, partial(features.embed_texts, place), new, device), wanted)


def _known(build: Build, table: Table | None, wanted: Iterable[str]) -> _Vectors:
    """Vectors of an earlier run, of those that are wanted today."""
    if table is None or not table.rows:
        return _Vectors({}, np.zeros((0, 0), np.float16))
    have = tables.read(build.store, table, ["id"])["id"].to_pylist()
    ids, matrix = tables.gather(build.store, table, sorted({*have}.intersection(wanted)))
    return _Vectors({name: at for at, name in enumerate(ids)}, matrix)


def _run(build: Build, work: Any, new: Sequence[Any], device: str) -> _Vectors:
    """What workers embed, by name; `work` numbers the rows of a shard in their order."""
    shards = [tuple(new[at : at + SHARD]) for at in range(0, len(new), SHARD)]
    place: dict[str, int] = {}
    parts: list[np.ndarray] = []
    for shard, row in build.pool.map(work, shards, resources=features.resources(device)):
        if isinstance(row, Crash):
            raise RuntimeError(f"embedding crops ended its worker: {row.reason}")
        table = tables.read(build.store, Table("vectors", (Shard(*row),)))
        order = [shard[int(at)] for at in table.column(0).to_pylist()]
        for item in order:
            place[item if isinstance(item, str) else item[0]] = len(place)
        parts.append(tables.matrix(table["vector"]))
        build.progress("score_crops", len(place), len(new))
    return _Vectors(place, np.concatenate(parts) if parts else np.zeros((0, 0), np.float16))


def _merged(known: _Vectors, new: _Vectors, wanted: Sequence[str]) -> _Vectors:
    """Vectors of all that is wanted, in that order."""
    if not wanted:
        return _Vectors({}, np.zeros((0, 1), np.float16))
    found = [(known if name in known.place else new).of(name) for name in wanted]
    return _Vectors({name: at for at, name in enumerate(wanted)}, np.stack(found))  # type: ignore[arg-type]


def embed_views(
    place: tuple[Store, Store, ModelParams, features.ModelFacts, str],
    shard: Sequence[tuple[str, corpus.Source]],
) -> list[Any]:
    """Embed views with a model's image tower: vectors by number, as the row of a shard.

    `place` is (corpus, store, params, facts, device). A crop is cut at the picture's full size.
    """
    bucket, store, params, facts, device = place
    model = features.load_checked(params, device, facts)
    pixels, last = [], ("", b"")
    for name, source in shard:
        view = View.of(name)
        if last[0] != view.image_id:
            last = (view.image_id, corpus.fetch(bucket, source))
        pixels.append(features.square(cut(last[1], view), facts.geometry))
    batch = params.batch
    vectors = [model.embed_images(np.stack(pixels[at : at + batch]))
               for at in range(0, len(pixels), batch)]  # fmt: skip
    rows = tables.vector_rows("id", [str(at) for at in range(len(shard))], np.concatenate(vectors))
    return list(tables.write_shard(store, rows))
