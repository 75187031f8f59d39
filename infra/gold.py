"""The gold set: what people say of pairs and their instructions, a line of JSON each.

It is kept by a team under version control, so it holds ids and words of instructions, and neither
captions nor names of files. Lines are in order of their item, so that changes are small.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from infra.errors import ConfigError

Scale = Literal["fits", "partly", "wrong"]
Reason = Literal[
    "none",
    "no_instruction",
    "untrue",
    "describes_source",
    "wrong_target",
    "gives_away",
    "vague",
]
SCALE: tuple[str, ...] = get_args(Scale)
REASONS: tuple[str, ...] = get_args(Reason)
ID = "^[0-9a-f]{64}$"
LONGEST_FILE = 64 << 20  # bytes


class Verdict(BaseModel):
    """What one person said of one instruction of a pair; `query` and `target` are image_ids."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pair_id: str = Field(pattern=ID)
    query: str = Field(pattern=ID)
    target: str = Field(pattern=ID)
    instruction: str = Field(min_length=1, max_length=1_000)
    verdict: Scale
    reason: Reason = "none"
    who: str = Field(min_length=1, max_length=100)
    when: str = Field(max_length=40)

    @property
    def item(self) -> tuple[str, str]:
        """What it is said of."""
        return self.pair_id, self.instruction


class Settled(NamedTuple):
    """Items on which people agree: one verdict each. And how many they left open."""

    verdicts: list[Verdict]
    open: int


def read(path: Path) -> list[Verdict]:
    """All verdicts of a file; none where there is no file yet.

    Raises ConfigError that names the first line which is no verdict.
    """
    try:
        if path.stat().st_size > LONGEST_FILE:
            raise ConfigError(f"gold set {path} is too long to be one; name a JSONL file")
        lines = path.read_text("utf-8").split("\n")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"gold set {path} can't be read ({error}); name a JSONL file") from None
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found += [Verdict.model_validate_json(line)] if line.strip() else []
        except ValidationError as error:
            flaw = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, flaw["loc"]))
            raise ConfigError(
                f"gold set {path}, line {number}: {where or 'line'}: {flaw['msg']}; mend or delete"
                " that line"
            ) from None
    return _last(found)


def write(path: Path, verdicts: Iterable[Verdict]) -> None:
    """Write a file whole or not at all."""
    rows = sorted(_last(verdicts), key=lambda row: (*row.item, row.who))
    lines = [json.dumps(row.model_dump(), ensure_ascii=False) + "\n" for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _last(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """The last verdict of each person on each item."""
    return list({(*row.item, row.who): row for row in verdicts}.values())


def settled(verdicts: Sequence[Verdict]) -> Settled:
    """One verdict an item: that of most who judged it; where none has most, it is left open."""
    by_item: dict[tuple[str, str], list[Verdict]] = {}
    for row in _last(verdicts):
        by_item.setdefault(row.item, []).append(row)
    found, left = [], 0
    for _, rows in sorted(by_item.items()):
        ranked = Counter(row.verdict for row in rows).most_common()
        if len(ranked) > 1 and ranked[0][1] == ranked[1][1]:
            left += 1
            continue
        of_most = (row for row in rows if row.verdict == ranked[0][0])
        found.append(min(of_most, key=lambda row: (row.who, row.when)))
    return Settled(found, left)
