"""Rates of the checks and of attacks, with their intervals, from what a manifest counts."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from infra import agreement
from infra.agreement import Share

THIRDS = ("low", "middle", "high")

Counts = Mapping[str, int]


class Rate(NamedTuple):
    """A share with its name and what it is of. `good` says whether more of it is better."""

    name: str
    share: Share
    of: str
    good: bool = True


def of_checks(checks: Mapping[str, Counts]) -> list[Rate]:
    """The rates of judge, line-up and round trip, those that ran."""
    judged, lined = checks.get("judge_labels", {}), checks.get("line_up", {})
    back = checks.get("round_trip", {})
    given = sum(judged.get(f"verdict {name}", 0) for name in ("fits", "partly", "wrong"))
    rows = [
        ("judged to fit", judged.get("verdict fits", 0), given, "instructions judged", True),
        ("judged to fit partly", judged.get("verdict partly", 0), given, "instructions judged",
         False),
        ("judged wrong", judged.get("verdict wrong", 0), given, "instructions judged", False),
        ("target preferred by the judge", lined.get("preferred", 0), lined.get("pairs", 0),
         "pairs lined up", True),
        ("false negatives", lined.get("fits all", 0), lined.get("checked all", 0),
         "hard negatives checked", False),
        ("target preferred in embedding space", back.get("preferred", 0),
         back.get("instructions", 0), "instructions with hard negatives", True),
    ]  # fmt: skip
    return [
        Rate(name, agreement.share(part, whole), of, good)
        for name, part, whole, of, good in rows
        if whole
    ]


def of_reasons(checks: Mapping[str, Counts]) -> list[tuple[str, int]]:
    """Why instructions were judged partly or wrong, the most frequent reason first."""
    counts = checks.get("judge_labels", {})
    found = [(n.removeprefix("reason "), c) for n, c in counts.items() if n.startswith("reason ")]
    return sorted((row for row in found if row[0] != "none"), key=lambda row: (-row[1], row[0]))


def of_spaces(checks: Mapping[str, Counts]) -> list[tuple[str, str, Share]]:
    """(space, third of its band, share of false negatives), by the pairs that lie there."""
    counts = checks.get("line_up", {})
    spaces = sorted({name.split()[1] for name in counts if name.startswith("checked ")} - {"all"})
    return [
        (space, third, agreement.share(counts.get(f"fits {space} {third}", 0), of))
        for space in spaces
        for third in THIRDS
        if (of := counts.get(f"checked {space} {third}", 0))
    ]


def of_places(checks: Mapping[str, Counts]) -> list[tuple[str, int, int]]:
    """(letter, how often the target stood there, how often the best was said to)."""
    counts = checks.get("line_up", {})
    letters = sorted(name.split()[1] for name in counts if name.startswith("target ")
                     and len(name.split()) == 2)  # fmt: skip
    return [(n, counts.get(f"target {n}", 0), counts.get(f"best {n}", 0)) for n in letters]


def of_attacks(outcome: Mapping[str, Any]) -> Iterator[tuple[str, str, bool, Share]]:
    """(on what, where, whether it is a control, share of tries that changed the outcome)."""
    kinds: dict[tuple[str, str, bool], list[int]] = {}
    for row in outcome["outcomes"]:
        kind = kinds.setdefault((row["on"], row["where"], row["name"] == "control"), [0, 0])
        kind[0] += row["obeyed"] + row["broken"]
        kind[1] += row["trials"]
    for (on, where, control), (changed, trials) in kinds.items():
        yield on, where, control, agreement.share(changed, trials)
