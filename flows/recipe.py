"""What all recipes over samples share: their config, and the way from records to a version.

A recipe is a file here with a RECIPE and a flow. Recipes are found, not registered.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import polars as pl
from pydantic import BaseModel, ConfigDict, Field, model_validator
from rich.table import Table as RichTable

import flows
from flows.build import known as known
from flows.config import Name, StoreParams, open_build
from flows.progress import reporter
from flows.step import completed, link, step
from flows.summary import (
    NAMED,
    costs,
    numerics,
    outcome,
    summary,
    tell_refused,
    told,
    unpublished,
    waiting,
)
from flows.trail import Stop, Trail, named_tables, samples_in
from infra import tables
from infra.build import Build
from infra.cluster import ClusterParams
from infra.errors import ConfigError, Refused
from infra.models import ModelParams as EmbeddingParams
from infra.product import Contents
from infra.provenance import own
from infra.record_formats import schema
from infra.sample_files import EXPORTS, Files, samples_of
from infra.tables import Table
from tasks.account_for_samples import account_for_samples
from tasks.ask_model import ModelParams
from tasks.describe import Described, DescribeParams
from tasks.import_records import Imported, ImportParams, find_files, import_records
from tasks.publish import PublishParams, publish
from tasks.record_samples import RecordParams, record_samples
from tasks.report import Story, render_samples
from tasks.snapshot import CorpusParams, Snapshot
from tasks.take_images import Taken, take_images
from tasks.tidy import TidyParams, check_forgotten, tidy


class RecipeConfig(BaseModel):
    """What every recipe depends on. `recipe`, `dataset`, `corpus.uri`, `store.uri` are required."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)
    name: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]] = ()  # columns that every one of its records must have

    recipe: str = Field(description="Name of the recipe; `pairmill recipes` lists them.")
    dataset: str = Field(
        pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$", description="Name of the dataset in the store."
    )
    corpus: CorpusParams
    store: StoreParams
    models: dict[Name, EmbeddingParams] = Field(
        {}, description="Embedding models, for recipes that compare pictures and texts."
    )
    cluster: ClusterParams = ClusterParams()
    describe: DescribeParams = DescribeParams()
    model: ModelParams = Field(ModelParams(), description="The model that is asked.")
    validation: float = Field(
        0.0, ge=0, le=0.5, description="Share of images whose records are for validation."
    )
    publish_partial: bool = Field(
        True,
        description="Publish a version, marked partial, while samples wait for an answer. `false`:"
        " nothing is published until all have theirs.",
    )
    publish: PublishParams = PublishParams()
    tidy: TidyParams = TidyParams()

    @model_validator(mode="after")
    def _is_this_recipe(self) -> "RecipeConfig":
        if self.name and self.recipe != self.name:
            raise ValueError(f"recipe is {self.recipe!r}, and this is {self.name!r}")
        return self

    @model_validator(mode="after")
    def _records_have_what_it_needs(self) -> "RecipeConfig":
        records = getattr(self, "records", None)
        given = set(schema(records)) - set(records.optional) if records else set(self.needs)
        if lacking := [name for name in self.needs if name not in given]:
            raise ValueError(
                f"{self.name} needs records with {' and '.join(lacking)}: use a records.format that"
                " has them, or rows, with each in records.columns and not in records.optional"
            )
        return self

    def published(self) -> dict[str, Any]:
        """What a version says of its config: without places, hosts, keys or money."""
        ours = {"corpus", "store", "cluster", "dataset", "publish", "tidy", "publish_partial"}
        shown = self.model_dump(mode="json", exclude=ours)
        for key, value in self:
            model = getattr(value, "local", None) or getattr(value, "endpoint", None)
            for hidden in ("endpoint", "local", "budget") if hasattr(value, "local") else ():
                shown[key].pop(hidden, None)
            if model:
                shown[key]["model"] = model.model
            if hasattr(value, "published"):
                shown[key] = value.published()
        shown["describe"].pop("threads")
        shown["models"] = {
            name: {"library": m.library, "name": Path(m.name).name}
            for name, m in self.models.items()
        }
        return shown


class Recipe(NamedTuple):
    """A recipe as it is listed, its config and its stages: `stages(run, config, step) -> Made`;
    without stages where a flow of another shape runs it.
    """

    name: str
    says: str
    takes: str
    gives: str
    needs: str
    config: type[BaseModel]
    stages: Callable[..., "Made"] | None


class Made(NamedTuple):
    """What the stages of a recipe made, for publishing: the samples that are recorded, the results
    of all stages that dropped something, by names that the report shows, how it is told, what the
    manifest says beside, and more files of a version, from its records.
    """

    listed: Snapshot
    seen: Described
    files: Table
    samples: Table
    ran: Mapping[str, Any]
    export: str
    story: Story
    about: Mapping[str, Any] = {}
    beside: Callable[[pl.DataFrame], Files] | None = None


def imported(
    run: Build, params: ImportParams, seen: Described, step: Any = step
) -> tuple[Table, Imported]:
    """The files of records, and their samples."""
    files = find_files(run, params)
    return files, step(import_records)(run, files, seen.objects, seen.images, params)


def pictured(run: Build, seen: Described, step: Any = step) -> tuple[Table, Taken]:
    """No files of records: every picture is a sample."""
    none = tables.write(run.store, "files", [])
    return none, step(take_images)(run, seen.images, seen.image_captions, seen.captions)


def embedder(config: RecipeConfig, name: str) -> EmbeddingParams:
    """An embedding model of a config by its name. Raises ConfigError where it has none of it."""
    if name not in config.models:
        raise ConfigError(f"{config.recipe} needs the embedding model {name!r}; add it to `models`")
    return config.models[name]


def run_recipe(recipe: Recipe, config: RecipeConfig) -> dict[str, Any]:
    """Run a recipe and publish what it made, redoing only what changed."""
    with reporter() as progress, open_build(config, progress) as run:
        try:
            result = build_recipe(run, recipe, config)
        except Refused as refused:
            tell_refused(refused)
            raise
        for place in ("manifest", "report"):
            if result[place]:
                link(place, result[place])
        return completed(outcome(result), result)


def build_recipe(
    run: Build, recipe: Recipe, config: RecipeConfig, step: Any = step
) -> dict[str, Any]:
    """The stages of a recipe, then what all have in common: records, fates, a version."""
    assert recipe.stages is not None
    trail = Trail(step)
    made = recipe.stages(run, config, trail.step)
    stops = list(trail.stops(made.ran))
    recorded = step(record_samples)(
        run, made.samples, made.seen.images, RecordParams(round(10_000 * config.validation))
    )
    ran = {"snapshot": made.listed, "describe": made.seen, **made.ran}
    drops = {name: stage.drops for name, stage in ran.items() if hasattr(stage, "drops")}
    fates = step(account_for_samples)(
        run, made.seen.objects, made.seen.images, made.files, samples_in(stops), recorded.records,
        drops,
    )  # fmt: skip
    keep = (config.publish.keep_versions, config.publish.keep_days)
    pending = waiting(run, ran)
    if pending and not config.publish_partial and not run.planning:
        tidied = step(tidy)(run, config.dataset, made.seen.objects, False, keep, config.tidy)
        waits = {"samples": sum(pending.values()), "tidied": tidied._asdict()}
        return {**unpublished(run, config.dataset, pending), **waits}
    contents = Contents(
        recorded.records, fates.fates, made.seen.images, fates.eligible, made.seen.captions,
        made.seen.objects,
    )  # fmt: skip
    report = partial(render_samples, run, contents, made.story)
    shown = config.published()
    about = {
        "config": shown, "recipe": recipe.name, "says": recipe.says,
        "not_from_source": [row._asdict() for row in own(config, shown)], **made.about,
    }  # fmt: skip
    check_forgotten(run)
    version = step(publish)(
        run, config.dataset, contents, about, report, config.publish,
        partial(measured, run, ran, stops, pending, config), samples_of(partial(_files, made)),
    )  # fmt: skip
    result = summary(run, version)
    count = sum(version.counts["fates"].get("sample", {}).values())
    tidied = step(tidy)(run, config.dataset, made.seen.objects, version.fresh, keep, config.tidy)
    told = {"samples": count, "pairs": None, "waiting": pending, "tidied": tidied._asdict()}
    return {**result, **told}


def _files(made: Made, rows: pl.DataFrame) -> Files:
    """What trainers read, and what a recipe has beside."""
    yield from EXPORTS[made.export](rows)
    if made.beside:
        yield from made.beside(rows)


def measured(
    run: Build,
    ran: Mapping[str, Any],
    stops: list[Stop],
    pending: Mapping[str, int],
    config: RecipeConfig,
) -> dict[str, Any]:
    """What a manifest says beyond files and config: stages and their tables, yields, work, cost."""
    return {
        "stages": [[stop.name, stop.stage] for stop in stops],
        "yields": [list(row) for row in yields(run, ran)],
        "work": dict(run.work),
        "seconds": {stage: round(spent, 3) for stage, spent in run.seconds.items()},
        "cost": costs(run),
        "currency": config.model.currency,
        "partial": dict(pending),
        "tables": told(ran, NAMED) | named_tables(stops, True),
        "passing_tables": named_tables(stops, False),
        "numerics": numerics(ran["describe"]),
        "mining": {},
    }


def yields(run: Build, ran: Mapping[str, Any]) -> Iterator[tuple[str, int, dict[str, int]]]:
    """(stage, samples it left, how many it dropped by rule), in the order of the stages."""
    for name, stage in ran.items():
        if hasattr(stage, "samples") and hasattr(stage, "drops"):
            rules = tables.frame(run.store, stage.drops, ["level", "rule"])
            counts = rules.filter(rules["level"] == "sample")["rule"].value_counts().sort("rule")
            yield name, stage.samples.rows, dict(counts.iter_rows())


def discover() -> Sequence[Recipe]:
    """All recipes, by name: every module here that has a RECIPE."""
    names = sorted(module.name for module in pkgutil.iter_modules(flows.__path__))
    modules = (importlib.import_module(f"flows.{name}") for name in names)
    return [m.RECIPE for m in modules if isinstance(getattr(m, "RECIPE", None), Recipe)]


def named(name: str) -> Recipe:
    """The recipe of a name."""
    found: Recipe = importlib.import_module(f"flows.{name}").RECIPE
    return found


def find(name: str) -> Callable[[RecipeConfig], dict[str, Any]]:
    """The flow of a recipe: the function of its name in the module of its name."""
    return getattr(importlib.import_module(f"flows.{name}"), name)


def listed(found: Sequence[Recipe]) -> RichTable:
    """Recipes as a table for people."""
    table = RichTable("recipe", "what it makes", "takes", "gives", "needs", box=None)
    for recipe in found:
        table.add_row(recipe.name, recipe.says, recipe.takes, recipe.gives, recipe.needs)
    return table
