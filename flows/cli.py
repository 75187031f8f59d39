"""The command line: `pairmill run`, `plan`, `report`, `why`."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from infra.errors import PairmillError, Refused
from infra.text import plain

app = typer.Typer(
    help="A dataset factory for vision-language training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
gold_app = typer.Typer(help="Verdicts of people on labels, and the judge against them.")
app.add_typer(gold_app, name="gold", no_args_is_help=True)
Config = Annotated[Path, typer.Argument(help="YAML config of the build.", metavar="CONFIG")]
Changes = Annotated[
    list[str] | None, typer.Option("--set", help="Change a key: a.b=value. May be repeated.")
]
VersionArgument = Annotated[
    str, typer.Argument(help="Number, digest prefix, or latest.", metavar="VERSION")
]
ConfigOption = Annotated[Path | None, typer.Option("-c", "--config", help="YAML config.")]
StoreOption = Annotated[str | None, typer.Option("--store", help="URI of the store.")]
DatasetOption = Annotated[str | None, typer.Option("--dataset", help="Name of the dataset.")]


@app.command()
def run(
    config: Config,
    changes: Changes = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one last line of JSON.")] = False,
) -> None:
    """Build a dataset and publish it, redoing only what changed."""
    try:
        result = _run(config, changes or [])
    except PairmillError as error:
        _fail(error, as_json)
    except Exception as error:
        if as_json:
            line = {"error": f"{type(error).__name__}: {error}", "stage": _stage_of(error)}
            print(json.dumps(line), flush=True)
        raise
    if as_json:
        print(json.dumps(result))
    else:
        from flows.summary import show

        show(result, Console())


def _run(config: Path, changes: list[str]) -> dict[str, Any]:
    from flows.config import load_config
    from flows.step import prefect_environment

    # First of all: looking for recipes imports Prefect, which reads its settings as it comes in.
    for name, value in prefect_environment().items():
        os.environ.setdefault(name, value)
    parsed = load_config(config, changes)
    if hasattr(parsed, "recipe"):
        from flows.recipe import find

        return find(parsed.recipe)(parsed)
    from flows.build import build

    return build(parsed)


def _stage_of(error: Exception) -> str:
    return getattr(error, "stage", "config")


def _wide() -> Console:
    """A console that cuts no table short where its output goes to a file or another program."""
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 160
    return console


def _fail(error: PairmillError, as_json: bool = False) -> NoReturn:
    """Say what went wrong in one line and end with the error's exit status."""
    Console(stderr=True).print(Text(f"error: {plain(str(error), 2_000)}"), soft_wrap=True)
    if as_json:
        more: dict[str, Any] = {}
        if isinstance(error, Refused):
            more = {"refused": error.reasons, "report": error.report}
        print(json.dumps({"error": str(error), "stage": _stage_of(error), **more}))
    raise typer.Exit(error.exit_code)


@app.command()
def plan(
    config: Config,
    changes: Changes = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what the next run would compute, why, and how long. Writes nothing but small tables."""
    from flows import plan as planning
    from flows.config import load_config

    try:
        found = planning.plan(load_config(config, changes or []))
    except PairmillError as error:
        _fail(error, as_json)
    if as_json:
        print(json.dumps(planning.as_json(found)))
    else:
        planning.show(found, _wide())


@app.command()
def recipes() -> None:
    """List the recipes: what each takes, gives and needs."""
    from flows.recipe import discover, listed

    _wide().print(listed(discover()))


@app.command()
def report(
    version: VersionArgument,
    config: ConfigOption = None,
    store: StoreOption = None,
    dataset: DatasetOption = None,
    output: Annotated[Path | None, typer.Option("-o", help="Write the HTML here.")] = None,
) -> None:
    """Find the report of a version, or of the `refused` build; -o writes it to a local file."""
    from flows.answers import fetch_report

    try:
        print(fetch_report(version, config, store, dataset, output))
    except PairmillError as error:
        _fail(error)


@app.command()
def versions(
    config: ConfigOption = None,
    store: StoreOption = None,
    dataset: DatasetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the versions of a dataset."""
    from flows.answers import open_dataset
    from flows.versions import listed, show
    from infra.versions import refused as find_refused

    try:
        place, name = open_dataset(config, store, dataset)
        rows, refused = listed(place, name), find_refused(place, name)
    except PairmillError as error:
        _fail(error, as_json)
    if as_json:
        print(json.dumps([row._asdict() for row in rows]))
    else:
        show(rows, refused, _wide())


@app.command()
def verify(
    version: VersionArgument = "latest",
    config: ConfigOption = None,
    store: StoreOption = None,
    dataset: DatasetOption = None,
) -> None:
    """Read and hash again everything that a version names. Exit status 1 where it is not whole."""
    from flows.answers import open_dataset
    from flows.versions import verify as check

    try:
        manifest, problems = check(*open_dataset(config, store, dataset), version)
    except PairmillError as error:
        _fail(error)
    for problem in problems:
        print(problem)
    named = f"version {manifest['version']} of {manifest['dataset']}"
    if problems:
        _fail(PairmillError(f"{named} is not whole: {len(problems)} problems, see above"))
    size = sum(file["bytes"] for file in manifest["files"])
    print(
        f"{named} is whole: {len(manifest['files'])} files, {size / 1e6:,.1f} MB, digest ", end=""
    )
    print(manifest["digest"][:12])


@app.command()
def diff(
    first: Annotated[str, typer.Argument(help="The older version.", metavar="V1")],
    second: Annotated[str, typer.Argument(help="The newer version.", metavar="V2")] = "latest",
    config: ConfigOption = None,
    store: StoreOption = None,
    dataset: DatasetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    output: Annotated[
        Path | None, typer.Option("-o", help="Write every row: .parquet, .csv or .jsonl.")
    ] = None,
) -> None:
    """Say what came, went and changed between two versions, and why."""
    from flows import diff as difference
    from flows.answers import open_dataset

    try:
        found = difference.compare(*open_dataset(config, store, dataset), first, second)
        if output:
            difference.write_rows(found, output)
    except PairmillError as error:
        _fail(error, as_json)
    if as_json:
        print(json.dumps(difference.as_json(found)))
    else:
        difference.show(found, _wide())


@app.command()
def why(
    names: Annotated[
        list[str],
        typer.Argument(
            help="Object key, file name, id of an image, pair or sample, or the start of one; "
            "KEY#ROW of a records file; two images ask why the second is no target of the first.",
            metavar="ID [ID]",
        ),
    ],
    config: ConfigOption = None,
    store: StoreOption = None,
    dataset: DatasetOption = None,
    version: Annotated[str, typer.Option(help="Number, digest prefix, or latest.")] = "latest",
    neighbours: Annotated[int, typer.Option(min=0, help="Neighbours shown in each space.")] = 6,
) -> None:
    """Say what became of an object, an image, a pair or a sample, and the numbers that decided."""
    from flows.answers import why as explain

    console = Console()
    try:
        for line in explain(names, version, config, store, dataset, neighbours):
            console.print(Text(line), soft_wrap=True, highlight=False)
    except PairmillError as error:
        _fail(error)


@app.command()
def forget(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Image ids (or starts of them), object keys, or files of them."),
    ] = None,
    prefix: Annotated[
        str | None, typer.Option(help="Every object whose key begins so.", metavar="KEYPREFIX")
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Only these bytes, not their near-duplicates.")
    ] = False,
    purge: Annotated[
        bool, typer.Option("--purge", help="Also withdraw older versions that hold them.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Also for more than half of all.")] = False,
    config: ConfigOption = None,
    store: StoreOption = None,
    dataset: DatasetOption = None,
) -> None:
    """Forget images: from the next build on they are in nothing that a build makes."""
    from flows.answers import open_dataset
    from flows.config import BuildConfig, load_config
    from flows.forget import Options, read_names
    from flows.forget import forget as record
    from infra.likeness import RADIUS

    try:
        place, _ = open_dataset(config, store, dataset or ("any" if store else None))
        options = Options(exact, purge, yes)
        parsed = load_config(config) if config else None
        radius = parsed.dedup.radius if isinstance(parsed, BuildConfig) else RADIUS
        for line in record(place, read_names(names or []), prefix, options, radius):
            print(line)
    except PairmillError as error:
        _fail(error)


@app.command("verify-absent")
def verify_absent(config: ConfigOption = None, store: StoreOption = None) -> None:
    """Read all that the store holds and name what is forgotten and still there."""
    from flows.absent import verify_absent as verify
    from flows.answers import open_dataset

    try:
        place, _ = open_dataset(config, store, "any" if store else None)
        for line in verify(place):
            print(plain(line, 2_000))
    except PairmillError as error:
        _fail(error)


@app.command("verify-store")
def verify_store(
    config: ConfigOption = None,
    store: StoreOption = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Remove what is damaged; the next build makes it anew.")
    ] = False,
) -> None:
    """Re-hash every shard that the ledger names, and say which are damaged or missing."""
    from flows.answers import open_dataset
    from flows.verify_store import verify_store as verify

    try:
        place, _ = open_dataset(config, store, "any" if store else None)
        for line in verify(place, repair):
            print(plain(line, 2_000))
    except PairmillError as error:
        _fail(error)


@app.command()
def gc(
    config: Annotated[Path, typer.Option("-c", "--config", help="YAML config.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Delete and list nothing.")] = False,
) -> None:
    """Collect garbage: list it, and delete what an earlier list named if no build can want it."""
    from flows.answers import open_dataset
    from flows.config import load_config
    from tasks.tidy import collect

    try:
        place, _ = open_dataset(config, None, None)
        removed, found = collect(place, load_config(config).tidy, dry_run=dry_run)
        if removed is None:
            print("a build is at work, so what was forgotten is removed later")
        elif removed:
            print(f"removed {removed} objects that could hold what was forgotten")
        print(f"{found.garbage} objects ({found.bytes} bytes) of garbage, {found.deleted} deleted")
        if found.waits:
            print(f"the rest waits: {found.waits}")
    except PairmillError as error:
        _fail(error)


@app.command()
def attack(
    config: Config,
    changes: Changes = None,
    pairs: Annotated[int, typer.Option(min=2, help="Pairs on which each attack is tried.")] = 8,
) -> None:
    """Try a fixed set of attacks on labeller and judge; the next version's report tells of it."""
    from flows import attack as attacking
    from flows.answers import load_pairs

    try:
        attacking.show(attacking.measure(load_pairs(config, changes or []), pairs), _wide())
    except PairmillError as error:
        _fail(error)


@gold_app.command("serve")
def gold_serve(
    config: Config,
    changes: Changes = None,
    count: Annotated[int, typer.Option(min=1, help="Pairs to judge, drawn over spaces.")] = 60,
    who: Annotated[str, typer.Option(help="Your name in the gold set.")] = "",
    port: Annotated[int, typer.Option(help="Port on loopback; 0: any free one.")] = 0,
) -> None:
    """Open a page on this machine to judge labelled pairs of the latest version by keyboard."""
    import getpass

    from flows import gold
    from flows.answers import load_pairs
    from flows.gold_page import served

    try:
        desk = gold.open_desk(load_pairs(config, changes or []), count, who or getpass.getuser())
        page = served(desk, port)
    except PairmillError as error:
        _fail(error)
    print(f"open {page.address}")
    print(f"verdicts go to {desk.path}; end with Ctrl-C", flush=True)
    with suppress(KeyboardInterrupt):
        page.run()
    said = desk.told()["items"]
    print(f"{sum(item['verdict'] is not None for item in said)} of {len(said)} judged")


@gold_app.command("agree")
def gold_agree(config: Config, changes: Changes = None) -> None:
    """Ask the judge about the gold set and say how well it agrees with people."""
    from flows import gold
    from flows.answers import load_pairs

    try:
        parsed = load_pairs(config, changes or [])
        gold.show(gold.agree(parsed), parsed, _wide())
    except PairmillError as error:
        _fail(error)


def main() -> None:
    """Entry point of the `pairmill` command."""
    app(prog_name="pairmill")


if __name__ == "__main__":
    main()
