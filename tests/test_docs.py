"""The documentation holds: it is fresh, its links resolve, its commands and configs are real."""

import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer.main
import yaml

from flows.cli import app
from flows.config import parse_config
from flows.recipe import RecipeConfig, discover

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
IDS = [page.name for page in PAGES]
# YAML of others, known by a top-level key: Prefect's deployments, Compose and Kubernetes files.
NOT_OURS = {"deployments", "pull", "definitions", "work_pools", "services", "apiVersion"}
SHELL = ("sh", "bash", "shell", "console")


class Fence(NamedTuple):
    """A fenced block and its language."""

    language: str
    text: str


def fences(text: str) -> list[Fence]:
    found = re.findall(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", text, re.M | re.S)
    return [Fence(language, body) for _, language, body in found]


def prose(text: str) -> str:
    return re.sub(r"^( *)```.*?^\1```", "", text, flags=re.M | re.S)


def commands(text: str) -> Iterator[str]:
    """Command lines in shell blocks and inline code, without prompts, folders and comments."""
    lines = [line for f in fences(text) if f.language in SHELL for line in f.text.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", prose(text))
    for line in lines:
        for part in re.split(r"&&|;|\|", line.partition(" #")[0]):
            yield re.sub(r"^\s*(\$ )?(\.venv/bin/)?", "", part).strip()


def slugs(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(
        r"^#+ +(.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), re.M
    )
    return {re.sub(r"[^\w -]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.fixture(scope="module")
def generated() -> dict[str, str]:
    """The pages that are made from the parameter models."""
    pages: dict[str, str] = runpy.run_path(str(ROOT / "docs" / "generate.py"))["pages"]()
    return pages


def test_the_configuration_pages_are_fresh(generated: dict[str, str]) -> None:
    for name, text in generated.items():
        assert (ROOT / "docs" / name).read_text("utf-8") == text, "run `make docs`"


def test_every_key_of_a_recipe_stands_on_a_page_of_configuration(
    generated: dict[str, str],
) -> None:
    page = generated["recipe_configuration.md"]
    shared = page.partition("\n## `")[0]
    for recipe in discover():
        if not issubclass(recipe.config, RecipeConfig):
            continue
        part = page.partition(f"\n## `{recipe.name}`\n")[2].partition("\n## ")[0]
        top = part.partition("\n### ")[0]
        missing = [key for key in recipe.config.model_fields if f"| `{key}` |" not in shared + top]
        assert part and missing == []


def test_what_recipes_share_is_described_once(generated: dict[str, str]) -> None:
    headings = re.findall(r"^#+ (.*)$", "\n".join(generated.values()), re.M)
    assert len(headings) == len(set(headings))
    assert generated["recipe_configuration.md"].count("| `max_new_tokens` |") == 0
    assert generated["recipe_configuration.md"].count("| `files` |") == 1


def test_every_recipe_stands_on_the_page_of_recipes() -> None:
    table = (ROOT / "docs" / "recipes.md").read_text("utf-8").partition("\n## ")[0]
    assert [recipe.name for recipe in discover() if f"`{recipe.name}`" not in table] == []


def test_the_recipe_to_copy_is_shown_as_it_is() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text("utf-8")
    [shown] = [fence.text for fence in fences(page) if fence.language == "python"]
    code = (ROOT / "flows" / "recap.py").read_text("utf-8")
    lines = [line.strip() for line in shown.splitlines() if line.startswith(("    ", "CAPTION"))]
    assert len(lines) > 8
    assert [line for line in lines if "..." not in line and line not in code] == []


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_relative_links_and_their_anchors_resolve(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text("utf-8")))
    broken = []
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        known = slugs(file) if anchor and file.suffix == ".md" and file.exists() else {anchor}
        if not file.exists() or anchor not in known:
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_and_their_options_exist(page: Path) -> None:
    command_line: Any = typer.main.get_command(app)
    unknown = []
    for line in commands(page.read_text("utf-8")):
        program, *words = line.split() or [""]
        if program != "pairmill" or not words:
            continue
        command = command_line.commands.get(words[0])
        while hasattr(command, "commands") and len(words) > 1:
            command, words = command.commands.get(words[1]), words[1:]
        options = {o for p in command.params for o in p.opts} if command else set()
        given = [word.partition("=")[0] for word in words[1:] if word.startswith("-")]
        if command is None or not set(given) <= {*options, "--help"}:
            unknown.append(line)
    assert unknown == []


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_make_targets_exist(page: Path) -> None:
    known = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    lines = [line.split() for line in commands(page.read_text("utf-8"))]
    named = {words[1] for words in lines if len(words) > 1 and words[0] == "make"}
    assert named <= known


def examples() -> Iterator[Any]:
    for page in PAGES:
        blocks = [f.text for f in fences(page.read_text("utf-8")) if f.language in ("yaml", "yml")]
        for number, block in enumerate(blocks, 1):
            yield pytest.param(block, id=f"{page.name}-{number}")


@pytest.mark.parametrize("block", list(examples()))
def test_yaml_examples_are_configs(block: str) -> None:
    """A fragment is laid over the sample's config: a section key by key, a model or space whole."""
    for data in yaml.safe_load_all(block):
        if NOT_OURS & data.keys():
            continue
        whole = yaml.safe_load((ROOT / "sample" / "config.yaml").read_text("utf-8"))
        for key, value in data.items():
            both = isinstance(value, dict) and isinstance(whole.get(key), dict)
            whole[key] = {**whole[key], **value} if both else value
        parse_config(whole)
