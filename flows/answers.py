"""Questions to a published version: where its report is, and why something is in it or not."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from flows.config import BuildConfig, load_config
from infra.errors import ConfigError, PairmillError
from infra.store import Location, Store, open_store
from infra.versions import find_version, refused, refused_folder, version_folder


def open_dataset(config: Path | None, store: str | None, dataset: str | None) -> tuple[Store, str]:
    """The store and dataset that `-c CONFIG`, or `--store` and `--dataset`, name."""
    if config:
        parsed = load_config(config)
        place = parsed.store.model_dump(exclude={"single_writer"})
        if store:
            place["uri"] = store
        return open_store(Location(**place)), dataset or parsed.dataset
    if not store or not dataset:
        raise ConfigError("name a dataset: give -c CONFIG, or --store URI and --dataset NAME")
    return open_store(Location(uri=store)), dataset


def load_pairs(config: Path, changes: Sequence[str]) -> BuildConfig:
    """The config of a recipe of pairs. Raises ConfigError for one of samples."""
    parsed = load_config(config, changes)
    if not isinstance(parsed, BuildConfig):
        raise ConfigError(
            f"{config}: the recipe {parsed.recipe!r} makes samples, and this command is about "
            "pairs; give the config of a build"
        )
    return parsed


def fetch_report(
    version: str, config: Path | None, store: str | None, dataset: str | None, output: Path | None
) -> str:
    """Where the report of a version is; with `output` a copy is written there first.

    `refused` is the build that a quality gate refused since the last version.
    """
    place, name = open_dataset(config, store, dataset)
    if version == "refused":
        if refused(place, name) is None:
            raise PairmillError(f"no build of {name!r} was refused since its last version")
        key = f"{refused_folder(name)}/report.html"
    else:
        manifest = find_version(place, name, version)
        key = f"{version_folder(name, manifest['version'])}/report.html"
    if output is None:
        return f"{place.uri}/{key}"
    output.write_bytes(place.get(key))
    return str(output)


def why(
    names: Sequence[str],
    version: str,
    config: Path | None,
    store: str | None,
    dataset: str | None,
    most: int = 6,
) -> Iterator[str]:
    """What became of one name, or why two images are or are not query and target."""
    from flows import why as chain

    place, name = open_dataset(config, store, dataset)
    manifest = find_version(place, name, version)
    if len(names) == 2:
        yield from chain.why_not(place, manifest, *names)
    elif len(names) == 1:
        yield from chain.why(place, manifest, names[0], most)
    else:
        raise ConfigError("why takes one name, or two images: a query and a target")
