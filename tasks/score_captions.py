"""Score captions: how well each survivor's caption fits, by the value that a filter ranks."""

from typing import Any, Literal, NamedTuple

import numpy as np
import polars as pl
from pydantic import BaseModel, ConfigDict

from infra import reference_sums, tables
from infra.build import Build
from infra.ledger import stage
from infra.reference_sums import Sums
from infra.tables import Table


class ScoringParams(BaseModel):
    """The measure, and what it compares with; where a filter cuts plays no part in it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    by: Literal["clip_score", "neg_clip_loss"] = "neg_clip_loss"
    temperature: float = 0.01
    references: int = 2_048


def scoring_params(params: Any) -> ScoringParams:
    """What of the filter's parameters (`keep`, `temperature`, `references`) values depend on."""
    if params.keep != "neg_clip_loss":
        return ScoringParams(by="clip_score")
    return ScoringParams(temperature=params.temperature, references=params.references)


class Scored(NamedTuple):
    """A value in units of 10^-6 for every captioned survivor.

    What the next scoring starts from: sums over the references by image and by caption.
    """

    values: Table
    image_sums: Table
    caption_sums: Table
    references: Table


@stage(
    version=1,
    reads={
        "aligned": ("image_id", "caption_id", "clip_score"),
        "survivors": ("image_id", "survivor_id"),
        "vectors": (),
        "texts": (),
    },
    meaning=lambda params: params if params.by == "neg_clip_loss" else {"by": params.by},
    starts_from=("aligned", "image_id"),
)
def score_captions(
    build: Build,
    aligned: Table,
    survivors: Table,
    vectors: Table,
    texts: Table,
    params: ScoringParams,
    before: Scored | None = None,
) -> Scored:
    """Score the caption of every survivor that has one.

    clip_score: the cosine of the two towers. neg_clip_loss (negCLIPLoss, Wang et al. 2024, arXiv
    2405.19547): the cosine less tau/2 times log-sum-exps of the image against reference captions
    and of the caption against reference images, so a caption that fits everything, or is shared by
    hundreds of pictures, does not win. Values are `rint(value * 10^6)`.
    """
    alive = tables.frame(build.store, survivors).filter(pl.col("image_id") == pl.col("survivor_id"))
    rows = tables.frame(build.store, aligned).join(alive, on="image_id", how="semi")
    rows = rows.filter(pl.col("caption_id").is_not_null()).sort("image_id")
    values = rows["clip_score"].to_numpy().astype(np.int64)
    state = (Table("sums"), Table("sums"), Table("references"))
    if params.by == "neg_clip_loss" and len(values):
        loss, state = _loss(build, rows, vectors, texts, params, before)
        values = np.rint(values - loss * 1e6).astype(np.int64)
    scored = rows.select("image_id", pl.Series("value", values, pl.Int64))
    return Scored(tables.write_frame(build.store, "values", scored), *state)


def _loss(
    build: Build,
    rows: pl.DataFrame,
    vectors: Table,
    texts: Table,
    params: ScoringParams,
    before: Scored | None,
) -> tuple[np.ndarray, tuple[Table, Table, Table]]:
    """What the references take from each row's cosine, float64[n], and the sums it comes from.

    Ids are SHA-256: the least ones are a fair draw that a few new images hardly change. Captions
    are drawn with their images, so that one shared by hundreds is met as often as it occurs.
    """
    drawn = rows.select("image_id", "caption_id").head(params.references)
    if before is not None and not _described(build, before.references, vectors, texts):
        before = None
    left, joined = _exchanged(build, drawn, before)
    total, state = np.zeros(rows.height), []
    for table, own, others, other in (
        (vectors, "image_id", texts, "caption_id"),
        (texts, "caption_id", vectors, "image_id"),
    ):
        ids, matrix = tables.gather(build.store, table, rows[own].to_list())
        old = (before.image_sums if own == "image_id" else before.caption_sums) if before else None
        references, gone, come = (
            _matrix(build, others, part[other]) for part in (drawn, left, joined)
        )
        known = _known(build, ids, old)
        found, computed = reference_sums.update(
            known, matrix, references, gone, come, params.temperature
        )
        build.work["similarities_computed"] += computed
        means = reference_sums.log_means(found, drawn.height, params.temperature)
        total += means[np.searchsorted(np.array(ids), rows[own].to_numpy())]
        frame = pl.DataFrame({"id": ids, "largest": found.largest, "total": found.total})
        state.append(tables.write_frame(build.store, "sums", frame))
    kept = tables.write_frame(build.store, "references", drawn)
    return params.temperature / 2 * total, (state[0], state[1], kept)


def _described(build: Build, references: Table, vectors: Table, texts: Table) -> bool:
    """Whether all references of old still have vectors, with which they could be taken away."""
    rows = tables.frame(build.store, references)
    return all(
        rows.join(tables.frame(build.store, table, [column]), on=column, how="anti").is_empty()
        for table, column in ((vectors, "image_id"), (texts, "caption_id"))
    )


def _exchanged(
    build: Build, drawn: pl.DataFrame, before: Scored | None
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """References that left and that joined since."""
    if before is None:
        return drawn.clear(), drawn.clear()
    old, pair = tables.frame(build.store, before.references), ["image_id", "caption_id"]
    return old.join(drawn, on=pair, how="anti"), drawn.join(old, on=pair, how="anti")


def _known(build: Build, ids: list[str], old: Table | None) -> Sums:
    """The sums of old of each id, where there are any."""
    rows = tables.frame(build.store, old or Table("sums"))
    found = pl.DataFrame({"id": ids}).join(rows, on="id", how="left", maintain_order="left")
    largest = found["largest"].fill_null(reference_sums.UNKNOWN)
    return Sums(largest.to_numpy(), found["total"].fill_null(0).to_numpy())


def _matrix(build: Build, table: Table, ids: pl.Series) -> np.ndarray:
    """The vector of each id, repeated where an id is."""
    names, matrix = tables.gather(build.store, table, ids.to_list())
    return matrix[np.searchsorted(np.array(names), ids.to_numpy())] if names else matrix
