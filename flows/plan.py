"""What the next run would compute, found by walking the stages until one has work to do."""

from collections.abc import Iterator

from flows.config import BuildConfig, open_build
from infra.build import WouldRun
from infra.tables import Table

ORDER = (
    "snapshot",
    "load models",
    "describe",
    "align_captions",
    "deduplicate",
    "score_captions",
    "filter_captions",
    "find_neighbours",
    "mine_pairs",
    "label_pairs",
    "make_records",
    "fold_fates",
    "publish",
)


def plan(config: BuildConfig) -> Iterator[str]:
    """Yield the plan line by line. Lists the corpus and writes small tables; computes nothing."""
    from flows.build import stages

    with open_build(config, planning=True) as build:
        try:
            result = stages(build, config)
        except WouldRun as stop:
            yield from _from(stop)
            return
    yield f"nothing to do: version {result['version']} ({result['digest'][:12]}) is up to date"


def _from(stop: WouldRun) -> Iterator[str]:
    at = ORDER.index(stop.stage)
    for stage in ORDER[1:at]:
        yield f"{stage:<16} done before, nothing to compute"
    yield f"{stop.stage:<16} {_cause(stop)}"
    for stage in ORDER[at + 1 :]:
        yield f"{stage:<16} depends on {stop.stage}"


def _cause(stop: WouldRun) -> str:
    if "new" in stop.inputs:
        size = stop.inputs["bytes"] / 1e6
        return f"{stop.inputs['new']} new or changed files ({size:.1f} MB) to read"
    if "captions" in stop.inputs and not isinstance(stop.inputs["captions"], Table):
        return f"{stop.inputs['captions']} new captions to embed"
    if "model" in stop.inputs:
        return f"{stop.inputs['model']} was never used with this store"
    if stop.stage == "publish":
        return f"{stop.inputs['records']} records to publish as a new version"
    rows = sum(v.rows for v in stop.inputs.values() if isinstance(v, Table))
    return f"its input or parameters changed ({rows} rows to go through)"
