"""flows -> tasks -> infra, never back; stages meet in a flow only; importing them is cheap."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.recipe import Recipe, discover

ROOT = Path(__file__).parent.parent
LAYERS = ("flows", "tasks", "infra")
BELOW = {"flows": {"flows", "tasks", "infra"}, "tasks": {"infra"}, "infra": {"infra"}}
FILES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))
HEAVY = ("torch", "faiss", "distributed", "prefect", "open_clip", "timm")


def imported(source: str) -> Iterator[str]:
    """Every module that a source imports, at the top or in a function."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: import by the full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_way_of_importing_is_seen():
    source = "import a.b as c, d\nfrom e import f\ndef g():\n    from h.i import j\n"
    assert set(imported(source)) == {"a.b", "d", "e.f", "h.i.j"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_lies_below_it(path: Path):
    layer = path.relative_to(ROOT).parts[0]
    names = set(imported(path.read_text("utf-8")))
    ours = {name for name in names if name.partition(".")[0] in (*LAYERS, "tests", "sample")}
    assert {name for name in ours if name.partition(".")[0] not in BELOW[layer]} == set()
    packages = {name.partition(".")[0] for name in names}
    if layer != "flows":
        assert "prefect" not in packages, "only flows may import Prefect"
    if path != ROOT / "infra/cluster.py":
        assert packages.isdisjoint({"distributed", "dask", "dask_cuda"})


def test_no_module_of_the_ground_or_of_the_stages_loads_a_heavy_library():
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in FILES
        if path.relative_to(ROOT).parts[0] != "flows" and path.stem != "__init__"
    ]
    program = (
        "import importlib, sys\n"
        "for name in sys.argv[1].split(','):\n"
        "    importlib.import_module(name)\n"
        "    found = [heavy for heavy in sys.argv[2].split(',') if heavy in sys.modules]\n"
        "    if found:\n"
        "        sys.exit(f'{name} imports {found}')\n"
    )
    command = [sys.executable, "-c", program, ",".join(modules), ",".join(HEAVY)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("recipe", [r for r in discover() if r.stages], ids=lambda r: r.name)
def test_a_recipe_is_as_long_as_a_figure(recipe: Recipe):
    """About 120 lines; a longer one has stages, or parameters of stages, that belong in tasks/."""
    path = ROOT / "flows" / f"{recipe.name}.py"
    assert len(path.read_text("utf-8").splitlines()) <= 130
