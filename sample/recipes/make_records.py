"""Writes the small corpora of the sample's recipes: the same files on every run.

`<recipe>_records.py` beside this file has `files()`, which yields (key, bytes): pictures, copied
from the sample bucket or drawn, and the records that name them. They go to `buckets/<recipe>/`.
"""

import argparse
import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
MAKERS = "_records.py"


def recipes() -> list[str]:
    """Recipes that have records of their own, in order."""
    found = (path.name.removesuffix(MAKERS) for path in HERE.glob(f"*{MAKERS}"))
    return sorted(name for name in found if name != "make")


def files(recipe: str) -> Iterator[tuple[str, bytes]]:
    """The files of a recipe's corpus as (key, bytes)."""
    yield from _module(recipe).files()


def _module(recipe: str) -> ModuleType:
    path = HERE / f"{recipe}{MAKERS}"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path} can't be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(recipe: str, folder: Path) -> Path:
    """Write the corpus of a recipe into a folder; a file that is as it should be is left alone."""
    made = dict(files(recipe))
    for key, data in made.items():
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_bytes() != data:
            path.write_bytes(data)
    for path in folder.rglob("*"):
        if path.is_file() and path.relative_to(folder).as_posix() not in made:
            path.unlink()
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*", default=recipes(), help="all of them by default")
    parser.add_argument("--afresh", action="store_true", help="delete what is there first")
    given = parser.parse_args()
    for recipe in given.recipes:
        folder = HERE / "buckets" / recipe
        if given.afresh:
            shutil.rmtree(folder, ignore_errors=True)
        write(recipe, folder)
        made = [path for path in folder.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in made)
        print(f"{recipe}: {len(made)} files, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
