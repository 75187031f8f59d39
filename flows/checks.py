"""The checks of labels and hard negatives, in their order; what is off costs nothing."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flows.config import BuildConfig
from infra import gold, tables
from infra.build import Build
from infra.errors import ConfigError
from infra.judging import Judge, JudgeModel
from infra.schema import SCHEMAS
from infra.tables import Table
from tasks.judge_labels import (
    Agreement,
    Calibrated,
    Judging,
    agreement_of,
    calibrate_judge,
    check_gold,
    check_judge,
    judge_labels,
)
from tasks.line_up import LiningUp, line_up
from tasks.round_trip import RoundTripping, round_trip


class Checked(NamedTuple):
    """Pairs, further positives and labels after all checks; the stages that ran, by their names."""

    pairs: Table
    positives: Table
    labels: Table
    ran: Mapping[str, Any]
    agreement: dict[str, Any] | None = None  # of the judge with people, as a manifest says it


def judge_of(config: BuildConfig) -> Judge:
    """The judge. Raises ConfigError where the config names no model for one."""
    chosen = {name: getattr(config.checks.judge, name) for name in JudgeModel.model_fields}
    try:
        return Judge(model=JudgeModel(**chosen), asking=config.judge_asking())
    except ValueError as error:
        raise ConfigError(str(error)) from None


def judging(config: BuildConfig) -> Judging:
    """What judging depends on."""
    chosen = config.checks.judge
    return Judging(
        judge=judge_of(config),
        share=chosen.share,
        partly=chosen.partly,
        unjudged=chosen.unjudged,
        needed=_needed(config),
    )


def _needed(config: BuildConfig) -> int:
    """How many instructions a pair must keep."""
    return config.labels.instructions if config.labels.labeller == "mllm" else 1


def calibrated(
    run: Build, config: BuildConfig, objects: Table, step: Any
) -> tuple[Calibrated, Agreement]:
    """The judge asked about the gold set, and how it agrees with people.

    Items whose pictures are not in the corpus are left out: they may have been forgotten. Raises
    Refused for a gold set on which no judge could pass the gate.
    """
    verdicts = gold.settled(gold.read(Path(config.checks.gold.path or ""))).verdicts
    here = set(tables.frame(run.store, objects, ["image_id"])["image_id"].drop_nulls())
    items = [verdict for verdict in verdicts if {verdict.query, verdict.target} <= here]
    check_gold(len(items), config.checks.judge.least_agreement)
    rows = [verdict.model_dump(include={*SCHEMAS["gold"].names}) for verdict in items]
    written, params = tables.write(run.store, "gold", rows), judging(config)
    found = step(calibrate_judge)(run, written, objects, params)
    people, by_judge = (tables.frame(run.store, table) for table in (written, found.verdicts))
    gone = len(verdicts) - len(items)
    return found, agreement_of(people, by_judge, params)._replace(gone=gone)


def trusted(
    run: Build, config: BuildConfig, objects: Table, step: Any
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The judge calibrated before anything is paid for, where it is to be used and there is a gold
    set; the stage by its name, and the agreement as a manifest says it.

    Raises Refused for a judge that does not agree with people well enough.
    """
    if not (config.checks.asks and config.checks.gold.path):
        return {}, None
    found, agreement = calibrated(run, config, objects, step)
    if not run.planning:
        least, on = config.checks.judge.least_agreement, config.checks.judge.agree_on
        check_judge(agreement, least, on)
    said = {name: list(getattr(agreement, name)[:2]) for name in ("scale", "decision")}
    kappa = None if agreement.kappa is None else f"{agreement.kappa:.3f}"
    return {"calibrate_judge": found}, {**said, "kappa": kappa}


def checked(
    run: Build,
    config: BuildConfig,
    mined: Any,
    labels: Table,
    eligible: Table,
    objects: Table,
    embedded: tuple[Mapping[str, Table], Mapping[str, Table]],
    step: Any,
) -> Checked:
    """Second opinion, line-up and round trip, one after the other, each where it is on.

    `embedded` are vectors of images and of captions by model.
    """
    checks, pairs, positives = config.checks, mined.pairs, Table("positives")
    ran: dict[str, Any] = {}
    if checks.judge.share:
        ran["judge_labels"] = step(judge_labels)(
            run, pairs, labels, eligible, objects, judging(config)
        )
        labels = ran["judge_labels"].labels
    if checks.line_up.share:
        params = LiningUp(judge=judge_of(config), **checks.line_up.model_dump())
        ran["line_up"] = found = step(line_up)(
            run, pairs, labels, mined.bands, eligible, objects, params
        )
        pairs, positives, labels = found.pairs, found.positives, found.labels
    if checks.round_trip.mode != "off":
        name = checks.round_trip.model or config.clip_score.model
        vectors, texts = (tables_of[name] for tables_of in embedded)
        ran["round_trip"] = step(round_trip)(
            run, pairs, labels, vectors, texts, _round_tripping(config, name)
        )
        labels = ran["round_trip"].labels
    return Checked(pairs, positives, labels, ran)


def _round_tripping(config: BuildConfig, name: str) -> RoundTripping:
    chosen = config.checks.round_trip
    return RoundTripping(
        mode=chosen.mode,
        weight=chosen.weight,
        needed=_needed(config),
        model=config.models[name],
        device=config.describe.device,
    )
