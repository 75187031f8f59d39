"""The main flow: a bucket of images in, a published dataset of MegaPairs-style pairs out."""

from functools import partial
from typing import Any, NamedTuple

from prefect import flow

from flows.config import BuildConfig, open_build
from flows.progress import reporter
from flows.step import completed, link, step
from flows.summary import measured, outcome, summary, tell_refused
from infra.build import Build
from infra.errors import Refused
from infra.tables import Table
from tasks.align_captions import AlignParams, align_captions
from tasks.deduplicate import deduplicate
from tasks.describe import describe
from tasks.filter_captions import check_model, filter_captions
from tasks.find_neighbours import find_neighbours, search_params
from tasks.fold_fates import fold_fates
from tasks.label_pairs import label_pairs
from tasks.make_records import make_records
from tasks.mine_pairs import mine_pairs, mining_params
from tasks.publish import Contents, publish
from tasks.report import render
from tasks.score_captions import score_captions, scoring_params
from tasks.snapshot import snapshot
from tasks.tidy import check_forgotten, tidy


class Searched(NamedTuple):
    """Images and lists of every space."""

    members: dict[str, Table]
    lists: dict[str, Table]


@flow(name="build", flow_run_name="{config.dataset}")
def build(config: BuildConfig) -> dict[str, Any]:
    """Build a dataset from a bucket of images, redoing only what changed."""
    with reporter() as progress, open_build(config, progress) as run:
        try:
            result = stages(run, config)
        except Refused as refused:
            tell_refused(refused)
            raise
        link("manifest", result["manifest"])
        link("report", result["report"])
        return completed(outcome(result), result)


def stages(run: Build, config: BuildConfig, step: Any = step) -> dict[str, Any]:
    """The stages in order. Each is skipped where the ledger has its result.

    `step` makes a stage a Prefect task; a plan gives another that only looks at it.
    """
    listed = step(snapshot)(run, config.corpus)
    seen = step(describe)(run, *listed[:2], config.corpus, config.models, config.describe)
    listed = listed._replace(listing=seen.listing)
    images, captions, vectors, texts = seen.images, seen.captions, seen.vectors, seen.texts
    clip = config.clip_score.model

    check_model(clip, texts)
    matched = step(align_captions)(
        run, images, seen.image_captions, vectors[clip], texts[clip], AlignParams(model=clip)
    )
    aligned = matched.aligned
    unique = step(deduplicate)(run, images, seen.looks, aligned, captions, vectors, config.dedup)
    survivors = unique.survivors
    scored = step(score_captions)(
        run, aligned, survivors, vectors[clip], texts[clip], scoring_params(config.clip_score)
    )
    fitting = step(filter_captions)(run, aligned, survivors, scored.values, config.clip_score)
    eligible = fitting.eligible

    embedded = {"image": vectors, "caption": texts}
    found = {
        name: step(find_neighbours)(
            run,
            eligible,
            embedded[space.of][space.model],
            search_params(config.neighbours, name, space),
        )
        for name, space in config.spaces.items()
    }
    near = Searched(
        {name: space.members for name, space in found.items()},
        {name: space.lists for name, space in found.items()},
    )
    mined = step(mine_pairs)(
        run, eligible, *near, vectors, texts, mining_params(config.pairs, config.spaces)
    )
    labelled = step(label_pairs)(run, mined.pairs, eligible, captions, seen.objects, config.labels)

    records = step(make_records)(
        run, mined.pairs, labelled.labels, eligible, captions, images, survivors, config.split
    ).records
    drops = [stage.drops for stage in (listed, seen, unique, fitting, mined, labelled)]
    fates = step(fold_fates)(run, seen.objects, images, mined.pairs, labelled.labels, drops).fates
    contents = Contents(records, fates, images, eligible, captions, seen.objects)
    tables = (contents, survivors, fitting.facts, near.lists, mined.bands)
    report = partial(render, run, *tables, pairs=mined.pairs)
    ran = {
        "snapshot": listed, "describe": seen, "align_captions": matched, "deduplicate": unique,
        "score_captions": scored, "filter_captions": fitting, "find_neighbours": near,
        "mine_pairs": mined, "label_pairs": labelled,
    }  # fmt: skip
    measure = partial(measured, run, ran)
    about = {"config": config.published()}
    check_forgotten(run)
    version = step(publish)(run, config.dataset, contents, about, report, config.publish, measure)
    result = summary(run, version)
    keep = (config.publish.keep_versions, config.publish.keep_days)
    tidied = step(tidy)(run, config.dataset, seen.objects, version.fresh, keep, config.tidy)
    return {**result, "tidied": tidied._asdict()}
