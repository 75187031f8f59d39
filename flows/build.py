"""The main flow: a bucket of images in, a published dataset of MegaPairs-style pairs out."""

from functools import partial
from typing import Any

from prefect import flow

from flows.config import BuildConfig, open_build
from flows.progress import reporter
from flows.step import step
from flows.summary import described, summary
from infra.build import Build
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
from tasks.snapshot import snapshot


@flow(name="build", flow_run_name="{config.dataset}", validate_parameters=True)
def build(config: BuildConfig) -> dict[str, Any]:
    """Build a dataset from a bucket of images, redoing only what changed."""
    with reporter() as progress, open_build(config, progress) as run:
        return stages(run, config)


def stages(run: Build, config: BuildConfig) -> dict[str, Any]:
    """The stages in order. Each is skipped where the ledger has its result."""
    clip = config.clip_score.model

    listed = step(snapshot)(run, config.corpus)
    seen = step(describe)(
        run, listed.listing, listed.file_captions, config.corpus, config.models, config.describe
    )
    check_model(clip, seen.texts)
    aligned = step(align_captions)(
        run, seen.images, seen.image_captions, seen.vectors[clip], seen.texts[clip],
        AlignParams(model=clip),
    )
    unique = step(deduplicate)(
        run, seen.images, seen.looks, aligned.aligned, seen.captions, seen.vectors, config.dedup
    )
    fitting = step(filter_captions)(
        run, aligned.aligned, unique.survivors, seen.vectors[clip], seen.texts[clip],
        config.clip_score,
    )
    near = step(find_neighbours)(
        run, fitting.eligible, seen.vectors, seen.texts,
        search_params(config.neighbours, config.spaces),
    )
    mined = step(mine_pairs)(
        run, fitting.eligible, near.members, near.lists, seen.vectors, seen.texts,
        mining_params(config.pairs, config.spaces),
    )
    labelled = step(label_pairs)(
        run, mined.pairs, fitting.eligible, seen.captions, seen.objects, config.labels
    )
    made = step(make_records)(
        run, mined.pairs, labelled.labels, fitting.eligible, seen.captions, seen.images,
        unique.survivors, config.split,
    )
    drops = [s.drops for s in (listed, seen, unique, fitting, mined, labelled)]
    folded = step(fold_fates)(
        run, seen.objects, seen.images, mined.pairs, labelled.labels, drops
    )
    contents = Contents(
        made.records, folded.fates, seen.images, fitting.eligible, seen.captions, seen.objects
    )
    version = step(publish)(
        run, config.dataset, contents, described(run, config, mined, fitting, near),
        partial(render, run, contents, unique.survivors, fitting.facts, near.lists, mined.bands),
        config.publish,
    )
    return summary(run, version)
