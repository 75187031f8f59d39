"""The config of a build: every stage's parameters, read from YAML, checked before any work."""

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from infra import pins
from infra.asking import AskParams
from infra.build import Build, Progress, silent
from infra.cluster import ClusterParams, open_pool
from infra.errors import ConfigError
from infra.ledger import check_format
from infra.models import ModelParams
from infra.store import Location, open_store, overlaps, probe_conditional_writes
from tasks.deduplicate import DedupParams
from tasks.describe import DescribeParams
from tasks.filter_captions import ClipScoreParams
from tasks.find_neighbours import NeighbourParams, Space
from tasks.judge_labels import JudgeParams
from tasks.label_pairs import LabelParams
from tasks.line_up import LineUpParams
from tasks.make_records import SplitParams
from tasks.mine_pairs import PairParams
from tasks.publish import PublishParams
from tasks.round_trip import RoundTripParams
from tasks.snapshot import CorpusParams
from tasks.tidy import TidyParams

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,39}$")]


class StoreParams(Location):
    """Where features, the ledger and published versions lie."""

    single_writer: bool = Field(
        False,
        description="Nobody else writes to this store: needed where the server does not keep "
        "conditional writes.",
    )


class GoldParams(BaseModel):
    """What people say of labels."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str | None = Field(
        None,
        description="The gold set, a JSONL file that `pairmill gold serve` writes; the judge is"
        " calibrated on it.",
    )


class ChecksParams(BaseModel):
    """Checks of labels and hard negatives; each is off unless it is asked for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    judge: JudgeParams = JudgeParams()
    line_up: LineUpParams = LineUpParams()
    round_trip: RoundTripParams = RoundTripParams()
    gold: GoldParams = GoldParams()

    @property
    def asks(self) -> bool:
        """Whether any check asks the judge."""
        return self.judge.share > 0 or self.line_up.share > 0


# What MegaPairs (arXiv 2412.14475) states, by notes on it that agree; `*` stands for every space of
# the config. What it leaves open (targets a query, length of lists, order of negatives, whether the
# query is one of the five) stays at our defaults: docs/recipes.md lists both.
PAPER: dict[str, Any] = {
    # One window for every space; given as open, and both of our ends count, 10^-6 apart.
    "spaces": {"*": {"band": {"unit": "cosine", "low": 0.8, "high": 0.96}}},
    "dedup": {"near": "off"},  # none is stated but the window's upper end
    "clip_score": {"keep": "all"},  # no filter of captions is stated
    # "Other images of the retrieved set", five a pair.
    "pairs": {"negatives": 5, "negatives_from": "retrieved"},
    # One model describes, from the pictures alone; another writes at least three instructions.
    "labels": {"calls": "two", "instructions": 3, "show_captions": False},
}


def _under(data: Any, defaults: dict[str, Any]) -> Any:
    """Settings with defaults under them."""
    if not isinstance(data, dict):
        return data
    merged = dict(data)
    for key, value in defaults.items():
        for name in data if key == "*" else (key,):
            given = data.get(name, {} if isinstance(value, dict) else value)
            merged[name] = _under(given, value) if isinstance(value, dict) else given
    return merged


class BuildConfig(BaseModel):
    """Everything a build depends on. `dataset`, `corpus.uri` and `store.uri` are required."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    recipe: Literal["megapairs"] = Field("megapairs", description="The recipe of the main flow.")
    preset: Literal["ours", "paper"] = Field(
        "ours",
        description="Defaults of what the config does not set. paper: as far as the paper of"
        " MegaPairs states them, see docs/recipes.md; ours: as in these tables.",
    )
    dataset: str = Field(
        pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$", description="Name of the dataset in the store."
    )
    corpus: CorpusParams
    store: StoreParams
    models: dict[Name, ModelParams] = Field(
        min_length=1, description="Embedding models by a name of your choice."
    )
    spaces: dict[Name, Space] = Field(
        min_length=1, description="Spaces in which neighbours are sought, in the order of turns."
    )
    cluster: ClusterParams = ClusterParams()
    describe: DescribeParams = DescribeParams()
    dedup: DedupParams = DedupParams()
    clip_score: ClipScoreParams = ClipScoreParams()
    neighbours: NeighbourParams = NeighbourParams()
    pairs: PairParams = PairParams()
    labels: LabelParams = LabelParams()
    checks: ChecksParams = ChecksParams()
    split: SplitParams = SplitParams()
    publish: PublishParams = PublishParams()
    tidy: TidyParams = TidyParams()

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, data: Any) -> Any:
        return (
            _under(data, PAPER)
            if isinstance(data, dict) and data.get("preset") == "paper"
            else data
        )

    @model_validator(mode="after")
    def _models_exist(self) -> "BuildConfig":
        uses = {f"spaces.{name}.model": space.model for name, space in self.spaces.items()}
        uses["clip_score.model"] = self.clip_score.model
        if self.dedup.near == "cosine":
            uses["dedup.model"] = self.dedup.model
        if self.checks.round_trip.model:
            uses["checks.round_trip.model"] = self.checks.round_trip.model
        for key, model in uses.items():
            if model not in self.models:
                raise ValueError(f"{key} is {model!r}, which is not among models: {[*self.models]}")
        return self

    @model_validator(mode="after")
    def _judge_exists(self) -> "BuildConfig":
        if self.checks.asks:
            self.judge_asking()
        if self.checks.judge.least_agreement and self.checks.asks and not self.checks.gold.path:
            raise ValueError(
                "checks.judge.least_agreement needs a gold set: name its file in checks.gold.path"
            )
        return self

    def judge_asking(self) -> AskParams:
        """How the judge is asked: where it is served, or else as the labeller is.

        Raises ValueError where there is neither.
        """
        asking = {name: getattr(self.labels, name) for name in AskParams.model_fields}
        judge = self.checks.judge
        asking["budget"] = judge.budget or self.labels.budget
        if judge.endpoint or judge.local:
            asking |= {"endpoint": judge.endpoint, "local": judge.local}
        elif self.labels.labeller != "mllm":
            raise ValueError(
                "the judge needs a model: set checks.judge.endpoint.url and .model, or"
                " checks.judge.local.name, or use labels.labeller: mllm"
            )
        return AskParams(**asking)

    def published(self) -> dict[str, Any]:
        """What a version says of its config: an allow-list, without places, hosts or key names."""
        data = self.model_dump(mode="json")
        shown = {
            key: data[key]
            for key in (
                "spaces", "describe", "dedup", "clip_score", "neighbours", "pairs", "split",
            )
        }  # fmt: skip
        shown["describe"].pop("threads")
        shown["models"] = {
            name: {"library": m.library, "name": Path(m.name).name}
            for name, m in self.models.items()
        }
        hidden = ("endpoint", "local", "budget", "publish_partial")  # how it was paid for
        shown["labels"] = {k: v for k, v in data["labels"].items() if k not in hidden}
        if self.labels.endpoint:
            shown["labels"]["model"] = self.labels.endpoint.model
        if self.labels.local:
            shown["labels"]["model"] = self.labels.local.model
        shown["checks"] = {k: data["checks"][k] for k in ("judge", "line_up", "round_trip")}
        for ours in ("endpoint", "local", "budget"):
            shown["checks"]["judge"].pop(ours)
        if self.checks.asks:
            shown["checks"]["judge"]["model"] = self.judge_asking().model
        shown["corpus"] = {k: data["corpus"][k] for k in ("licence", "max_caption_chars")}
        shown["publish"] = {"images": self.publish.images}
        return shown


def load_config(path: Path, changes: Sequence[str] = ()) -> Any:
    """The config in a YAML file, with `a.b=value` changes applied.

    Relative paths in the file are relative to it, those in changes to the working directory.
    Raises ConfigError, in one line, that names the key and the fix.
    """
    try:
        data = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"config {path}: {error.strerror}; name a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        raise ConfigError(f"config {path}{line} is not YAML; mend that line") from error
    if not isinstance(data, dict):
        raise ConfigError(f"config {path} must be a mapping with dataset, corpus and store")
    _resolve_paths(data, path.resolve().parent)
    for change in changes:
        _apply(data, change)
    return parse_config(data, str(path))


def parse_config(data: dict[str, Any], name: str = "config") -> Any:
    """A checked config: that of the recipe that `recipe` names, or of the main flow without one.

    Raises ConfigError for the first mistake, in one line.
    """
    model = _model_of(data, name)
    try:
        config = model.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{name}: {_first(error, model)}") from None
    check_places(config, name)
    return config


def _model_of(data: dict[str, Any], name: str) -> type[BaseModel]:
    if data.get("recipe", "megapairs") == "megapairs":
        return BuildConfig
    from flows.recipe import discover

    known = {recipe.name: recipe.config for recipe in discover()}
    if data["recipe"] not in known:
        close = difflib.get_close_matches(str(data["recipe"]), known, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(known)}"
        raise ConfigError(f"{name}: recipe: no recipe {data['recipe']!r}; {hint}")
    return known[data["recipe"]]


def check_places(config: Any, name: str = "config") -> None:
    """Raises ConfigError where corpus or store can't be opened, or one lies in the other."""
    for section in ("corpus", "store"):
        try:
            open_store(getattr(config, section))
        except ConfigError as error:
            raise ConfigError(f"{name}: {section}: {error}") from None
    if overlaps(config.corpus, config.store):
        raise ConfigError(
            f"{name}: store.uri and corpus.uri overlap; put the store beside the corpus, not in it"
        )


def _first(error: ValidationError, root: type[BaseModel]) -> str:
    """The first mistake as `key: what is wrong`, with the nearest known key for a typo."""
    problem = error.errors(include_url=False, include_input=False)[0]
    key = ".".join(str(part) for part in problem["loc"]) or "config"
    if problem["type"] != "extra_forbidden":
        return f"{key}: {problem['msg'].removeprefix('Value error, ')}"
    known = _fields_at(problem["loc"][:-1], root)
    close = difflib.get_close_matches(str(problem["loc"][-1]), known, 1)
    hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(sorted(known))}"
    return f"{key}: unknown key; {hint}"


def _fields_at(loc: tuple[int | str, ...], root: type[BaseModel]) -> list[str]:
    model: Any = root
    for part in loc:
        fields = getattr(model, "model_fields", {})
        kind = fields[part].annotation if part in fields else model
        inner = getattr(kind, "__args__", (kind,))
        model = next((k for k in reversed(inner) if hasattr(k, "model_fields")), kind)
    return list(getattr(model, "model_fields", {}))


def _apply(data: dict[str, Any], change: str) -> None:
    key, sign, text = change.partition("=")
    *path, last = key.split(".")
    if not sign or not all((*path, last)):
        raise ConfigError(f"--set {change!r}: write it as key.key=value")
    for part in path:
        data = data.setdefault(part, {})
        if not isinstance(data, dict):
            raise ConfigError(f"--set {key}: {part!r} is a value, not a section")
    try:
        data[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {key}: {text!r} is not a YAML value; quote it") from error


def _resolve_paths(data: dict[str, Any], folder: Path) -> None:
    """Make the paths of a config file absolute: corpus, store, gold set, models and weights.

    Any section may have a model in process, under `local`.
    """
    places = [(data.get("corpus"), "uri"), (data.get("store"), "uri")]
    checks = data.get("checks")
    places += [(checks.get("gold"), "path")] if isinstance(checks, dict) else []
    models = data.get("models")
    for model in models.values() if isinstance(models, dict) else ():
        places += [(model, "name"), (model, "weights")]
    sections = (section for section in data.values() if isinstance(section, dict))
    places += [(section.get("local"), "name") for section in sections]
    judge = checks.get("judge") if isinstance(checks, dict) else None
    if isinstance(judge, dict):
        places.append((judge.get("local"), "name"))
    difficulty = data.get("difficulty")
    if isinstance(difficulty, dict):
        places += [(difficulty.get(side), "name") for side in ("text", "vision")]
    for section, key in places:
        if not isinstance(section, dict):
            continue
        value = section.get(key)
        if not isinstance(value, str) or value.startswith(("/", "~")) or ":" in value:
            continue
        if key in ("uri", "path") or value.startswith(".") or (folder / value).exists():
            section[key] = str((folder / value).resolve())


@contextmanager
def open_build(
    config: Any, progress: Progress = silent, *, planning: bool = False
) -> Iterator[Build]:
    """Open stores and pool for a config; the pool starts when a stage first needs it.

    Raises ConfigError for a store that does not keep conditional writes, unless the config says
    `store.single_writer: true`; PairmillError for one that a newer Pairmill made.
    """
    check_places(config)
    store = open_store(Location(**config.store.model_dump(exclude={"single_writer"})))
    corpus = open_store(Location(**{f: getattr(config.corpus, f) for f in Location.model_fields}))
    remote = store.uri.startswith("s3://")
    if remote and not config.store.single_writer and not probe_conditional_writes(store):
        raise ConfigError(
            f"{store.uri} does not keep conditional writes, so two builds could overwrite each "
            "other; use another store, or set store.single_writer: true and run one at a time"
        )
    check_format(store, write=not planning)
    life = 60 * config.tidy.pin_minutes
    with pins.hold(store, life) as pin, open_pool(config.cluster) as pool:
        yield Build(corpus, store, pool, progress, planning, pin=pin, secrets=_block_secret)


def _block_secret(name: str) -> str:
    """The value of a Prefect Secret block. Raises ConfigError where it can't be read."""
    from prefect.blocks.system import Secret

    try:
        block: Any = Secret.load(name)
        return str(block.get())
    except ValueError as error:
        raise ConfigError(
            f"endpoint.api_key_block: Prefect has no Secret block {name!r} "
            f"({str(error).partition(chr(10))[0]}); create it, or use api_key_env"
        ) from None
