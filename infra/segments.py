"""Segments: small files of paid answers as they came, a line each, that vouch for themselves."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from infra.canonical import canonical
from infra.captions import encodable
from infra.errors import PairmillError

FORMAT = 1


class Stored(NamedTuple):
    """An answer as it is kept. `key` is the digest of its request, of which `attempt` is a part.

    Tokens and cost (10^-9 of the currency) are None where they are not known. `images` and
    `captions` are ids of what it is about: forgetting goes by them. `created` is in seconds.
    """

    key: str
    attempt: int
    status: str
    text: str
    finish_reason: str | None
    model: str
    input_tokens: int | None
    output_tokens: int | None
    cached_tokens: int | None
    cost: int | None
    images: tuple[str, ...]
    captions: tuple[str, ...]
    stage: str
    created: int


class Segment(NamedTuple):
    """A small file of answers, in the order in which they came."""

    key: str
    answers: Sequence[Stored]


class DamagedSegment(PairmillError):
    """A segment holds answers that can't be vouched for."""


def encode(answers: Sequence[Stored]) -> bytes:
    """A segment: a line that says how many follow, then a line an answer, each with a digest."""
    head = canonical({"format": FORMAT, "answers": len(answers)})
    return b"".join(line + b"\n" for line in (head, *map(_line, answers)))


def decode(key: str, data: bytes) -> list[Stored]:
    """The answers of a segment. Raises DamagedSegment where one of them can't be vouched for."""
    answers, lost = readable(key, data)
    if lost:
        raise DamagedSegment(
            f"{lost} of {len(answers) + lost} paid answers in {key} can't be read; restore that "
            "file from a backup, or let `pairmill verify-store --repair` give them up"
        )
    return answers


def readable(key: str, data: bytes) -> tuple[list[Stored], int]:
    """The answers of a segment that can be vouched for, and how many can't: at least one of two.

    Raises PairmillError for a segment that a newer Pairmill wrote.
    """
    head, *lines = data.splitlines() or [b""]
    about = _parsed(head)
    if about.get("format", FORMAT) != FORMAT:
        raise PairmillError(
            f"{key} has format {about['format']}, this Pairmill reads {FORMAT}; use the Pairmill "
            "that wrote the store"
        )
    answers = [stored for stored in map(_answer, lines) if stored]
    expected = about.get("answers")
    count = expected if isinstance(expected, int) else len(lines) + 1
    return answers, max(count, len(lines)) - len(answers)


def storable(stored: Stored) -> Stored:
    """With text that UTF-8 can hold, which an answer's JSON need not be."""
    return stored._replace(
        text=encodable(stored.text),
        model=encodable(stored.model),
        finish_reason=None if stored.finish_reason is None else encodable(stored.finish_reason),
    )


def _line(stored: Stored) -> bytes:
    fields = stored._asdict()
    return canonical({**fields, "sum": _sum(fields)})


def _answer(line: bytes) -> Stored | None:
    """The answer of a line; None where it is not what was written."""
    fields = _parsed(line)
    said = fields.pop("sum", None)
    try:
        is_whole = fields.keys() == set(Stored._fields) and said == _sum(fields)
    except (TypeError, ValueError):
        return None
    return from_row(fields) if is_whole else None


def _sum(fields: dict[str, Any]) -> str:
    return hashlib.sha256(canonical(fields)).hexdigest()[:16]


def from_row(fields: dict[str, Any]) -> Stored:
    """An answer from the values of its line or row."""
    lists = {name: tuple(fields[name]) for name in ("images", "captions")}
    return Stored(**(fields | lists))


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
