"""The main flow: a bucket of images in, a published dataset of MegaPairs-style pairs out."""

from functools import partial
from typing import Any, NamedTuple

from prefect import flow

from flows.checks import Checked, checked, trusted
from flows.config import BuildConfig, open_build
from flows.progress import reporter
from flows.step import completed, link, step
from flows.summary import measured, outcome, summary, tell_refused, unpublished, waiting
from infra.build import Build
from infra.errors import Refused
from infra.product import Contents
from infra.tables import Table
from tasks.align_captions import Aligned, AlignParams, align_captions
from tasks.deduplicate import Unique, deduplicate
from tasks.describe import Described, describe
from tasks.filter_captions import Filtered, check_model, filter_captions
from tasks.find_neighbours import find_neighbours, search_params
from tasks.fold_fates import Fates, fold_fates
from tasks.label_pairs import LabelTables, label_pairs
from tasks.make_records import Records, make_records
from tasks.mine_pairs import Mined, mine_pairs, mining_params
from tasks.publish import publish
from tasks.report import Examined, render
from tasks.score_captions import Scored, score_captions, scoring_params
from tasks.snapshot import Snapshot, snapshot
from tasks.tidy import check_forgotten, tidy

PASSES = 5  # a file that changes all the time is not waited for


class Searched(NamedTuple):
    """Images and lists of every space."""

    members: dict[str, Table]
    lists: dict[str, Table]


class Across(NamedTuple):
    """What the stages across images gave, by their names."""

    align_captions: Aligned
    deduplicate: Unique
    score_captions: Scored
    filter_captions: Filtered
    find_neighbours: Searched
    mine_pairs: Mined
    label_pairs: LabelTables
    checks: Checked
    make_records: Records
    fold_fates: Fates


@flow(name="build", flow_run_name="{config.dataset}")
def build(config: BuildConfig) -> dict[str, Any]:
    """Build a dataset from a bucket of images, redoing only what changed."""
    with reporter() as progress, open_build(config, progress) as run:
        try:
            result = stages(run, config)
        except Refused as refused:
            tell_refused(refused)
            raise
        for place in ("manifest", "report"):
            if result[place]:
                link(place, result[place])
        return completed(outcome(result), result)


def known(run: Build, config: Any, step: Any = step) -> tuple[Snapshot, Described]:
    """What lies in the corpus, and what is known of it, by the config of any recipe.

    Listed once more where a file that was read turned out to be forgotten: from then on it is
    known by its name and stamp, so neither it nor its captions are in any table that is kept.
    """
    for _ in range(PASSES):
        run.footprint.records.clear()
        listed = step(snapshot)(run, config.corpus)
        seen = step(describe)(run, *listed[:2], config.corpus, config.models, config.describe)
        if run.planning or seen.listing == listed.listing:
            break
    return listed._replace(listing=seen.listing), seen


def stages(run: Build, config: BuildConfig, step: Any = step) -> dict[str, Any]:
    """The stages in order. Each is skipped where the ledger has its result.

    `step` makes a stage a Prefect task; a plan gives another that only looks at it.
    """
    listed, seen = known(run, config, step)
    found = across(run, config, listed, seen, step)
    keep = (config.publish.keep_versions, config.publish.keep_days)
    ran = {"snapshot": listed, "describe": seen, **found._asdict(), **found.checks.ran}
    pending = waiting(run, ran)
    if pending and not config.labels.publish_partial and not run.planning:
        tidied = step(tidy)(run, config.dataset, seen.objects, False, keep, config.tidy)
        return {**unpublished(run, config.dataset, pending), "tidied": tidied._asdict()}
    contents = Contents(
        found.make_records.records,
        found.fold_fates.fates,
        seen.images,
        found.filter_captions.eligible,
        seen.captions,
        seen.objects,
    )
    report = partial(
        render,
        run,
        contents,
        found.deduplicate.survivors,
        found.filter_captions.facts,
        found.find_neighbours.lists,
        found.mine_pairs.bands,
        pairs=found.mine_pairs.pairs,
        checked=examined(found),
    )
    measure = partial(measured, run, config.dataset, ran, pending, config.labels.currency)
    about = {"config": config.published()}
    check_forgotten(run)
    version = step(publish)(run, config.dataset, contents, about, report, config.publish, measure)
    result = summary(run, version)
    tidied = step(tidy)(run, config.dataset, seen.objects, version.fresh, keep, config.tidy)
    return {**result, "waiting": pending, "tidied": tidied._asdict()}


def examined(found: Across) -> Examined:
    """What the report shows of the checks."""
    ran = found.checks.ran
    verdicts = ran["judge_labels"].verdicts if "judge_labels" in ran else Table("verdicts")
    line_ups = ran["line_up"].line_ups if "line_up" in ran else Table("line_ups")
    return Examined(found.label_pairs.labels, verdicts, line_ups)


def across(
    run: Build, config: BuildConfig, listed: Snapshot, seen: Described, step: Any = step
) -> Across:
    """From what is known of every image to records and fates: the stages across images."""
    images, captions, vectors, texts = seen.images, seen.captions, seen.vectors, seen.texts
    clip = config.clip_score.model
    check_model(clip, texts)
    matched = step(align_captions)(
        run, images, seen.image_captions, vectors[clip], texts[clip], AlignParams(model=clip)
    )
    aligned = matched.aligned
    compared = {m: vectors[m] for m in vectors if config.dedup.uses(m)}
    unique = step(deduplicate)(run, images, seen.looks, aligned, captions, compared, config.dedup)
    survivors = unique.survivors
    scored = step(score_captions)(
        run, aligned, survivors, vectors[clip], texts[clip], scoring_params(config.clip_score)
    )
    fitting = step(filter_captions)(run, aligned, survivors, scored.values, config.clip_score)
    near = _neighbours(run, config, fitting.eligible, {"image": vectors, "caption": texts}, step)
    used = {space.model for space in config.spaces.values()}
    spaced = ({m: table for m, table in kind.items() if m in used} for kind in (vectors, texts))
    mined = step(mine_pairs)(
        run, fitting.eligible, *near, *spaced, mining_params(config.pairs, config.spaces)
    )
    judge, agreement = trusted(run, config, seen.objects, step)
    labelled = step(label_pairs)(
        run, mined.pairs, fitting.eligible, captions, seen.objects, config.labels
    )
    sure = checked(
        run, config, mined, labelled.labels, fitting.eligible, seen.objects, (vectors, texts), step
    )
    records = step(make_records)(
        run, sure.pairs, sure.labels, fitting.eligible, captions, images, survivors,
        sure.positives, config.split,
    )  # fmt: skip
    dropping = (listed, seen, unique, fitting, mined, labelled, *sure.ran.values())
    drops = {type(stage).__name__: stage.drops for stage in dropping}
    fates = step(fold_fates)(run, seen.objects, images, mined.pairs, sure.labels, drops)
    sure = sure._replace(ran={**judge, **sure.ran}, agreement=agreement)
    return Across(matched, unique, scored, fitting, near, mined, labelled, sure, records, fates)


def _neighbours(
    run: Build,
    config: BuildConfig,
    eligible: Table,
    embedded: dict[str, dict[str, Table]],
    step: Any,
) -> Searched:
    """Lists of every space."""
    found = {
        name: step(find_neighbours)(
            run,
            eligible,
            embedded[space.of][space.model],
            search_params(config.neighbours, name, space),
        )
        for name, space in config.spaces.items()
    }
    return Searched(
        {name: space.members for name, space in found.items()},
        {name: space.lists for name, space in found.items()},
    )
