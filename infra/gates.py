"""Quality gates: what of a build's counts speaks against publishing it."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

FAILURES = ("unreadable", "crashed_decoder", "vanished")
# Objects that were never meant to be pictures.
NO_PICTURES = ("metadata", "ignored", "forgotten")


class Failed(NamedTuple):
    """A gate that is shut: its name and bound, what was found, and that in words."""

    gate: str
    bound: float
    found: float
    said: str


Manifest = Mapping[str, Any]
Found = Iterator[tuple[float, str]]


def failed(manifest: Manifest, last: Manifest | None, gates: Mapping[str, float]) -> list[Failed]:
    """The gates that a build does not pass, compared with the last version where there is one.

    A bound is the first value that passes: `min_` gates fail below theirs, `max_` gates above.
    """
    shut = []
    for gate, bound in gates.items():
        for found, said in _FOUND[gate](manifest, last):
            if found > bound if gate.startswith("max_") else found < bound:
                shut.append(Failed(gate, bound, round(found, 6), said))
    return shut


def _least(name: str) -> Callable[[Manifest, Manifest | None], Found]:
    def found(manifest: Manifest, last: Manifest | None) -> Found:
        count = manifest["counts"][name]
        yield count, f"{count:,}"

    return found


def _drop(name: str) -> Callable[[Manifest, Manifest | None], Found]:
    def found(manifest: Manifest, last: Manifest | None) -> Found:
        before = last["counts"][name] if last else 0
        if last and before:
            now = manifest["counts"][name]
            share = 1 - now / before
            yield (
                share,
                f"{share:.3f}: {now:,} after {before:,} in version {last['version']}",
            )

    return found


def _failures(manifest: Manifest, last: Manifest | None) -> Found:
    counts = manifest["counts"]["fates"].get("object", {})
    of = sum(counts.values()) - sum(counts.get(fate, 0) for fate in NO_PICTURES)
    parts = {fate: counts[fate] for fate in FAILURES if counts.get(fate)}
    share = sum(parts.values()) / max(1, of)
    named = ", ".join(f"{count:,} {fate.replace('_', ' ')}" for fate, count in parts.items())
    yield share, f"{share:.3f}: {named or 'none'} of {of:,} pictures"


def _occupancy(manifest: Manifest, last: Manifest | None) -> Found:
    for space, occupied in manifest.get("occupied", {}).items():
        of = manifest["members"][space]
        share = occupied / max(1, of)
        yield (
            share,
            f"{share:.3f} in {space}: {occupied:,} of {of:,} images have a neighbour in its band",
        )


_FOUND: Mapping[str, Callable[[Manifest, Manifest | None], Found]] = {
    "min_images": _least("eligible"),
    "min_records": _least("records"),
    "max_drop_images": _drop("eligible"),
    "max_drop_records": _drop("records"),
    "max_failures": _failures,
    "min_band_occupancy": _occupancy,
}
