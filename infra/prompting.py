"""Prompts: templates in a folder, and untrusted texts enclosed so that no writer gets out."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from infra.canonical import digest
from infra.instructions import clean


class Prompts:
    """The templates of a folder, by their names without the ending."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._environment = Environment(loader=FileSystemLoader(folder), undefined=StrictUndefined)

    def render(self, name: str, **values: Any) -> str:
        return self._environment.get_template(f"{name}.jinja").render(**values).strip()

    def digest(self, names: Iterable[str]) -> str:
        """SHA-256 of the files, in this order."""
        return digest([(self._folder / f"{name}.jinja").read_text("utf-8") for name in names])


def enclosed(texts: Sequence[tuple[str, str]], limit: int) -> dict[str, Any]:
    """Untrusted (name, text) for a template: one line each, at most `limit` characters, and the
    nonce of the markers around them.

    The nonce is a digest of the texts themselves: no writer of one can know it, and equal requests
    stay equal.
    """
    lines = [(name, clean(text[: 2 * limit])[:limit]) for name, text in texts]
    nonce = hashlib.sha256(repr(lines).encode("utf-8", "replace")).hexdigest()[:16]
    return {"texts": lines, "nonce": nonce}
