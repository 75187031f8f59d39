"""Drift of what is calibrated on the corpus: where bands and cuts lay in the versions before."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

KEPT = 100  # versions whose values a manifest carries on

Manifest = Mapping[str, Any]


class Value(NamedTuple):
    """A calibrated value in 10^-6, the setting it follows from, and the config that pins it."""

    value: int
    setting: str
    pin: str


class Course(NamedTuple):
    """A calibrated value over the versions that had the setting it has now, oldest first."""

    name: str
    setting: str
    pin: str
    points: tuple[tuple[int, int], ...]  # (version, value in 10^-6)


def calibrated(manifest: Manifest) -> dict[str, Value]:
    """The values of a version that follow from its corpus, by name; pinned ones are left out."""
    return {**_bands(manifest), **_cut(manifest)}


def _bands(manifest: Manifest) -> dict[str, Value]:
    found = {}
    for row in manifest.get("bands", ()):
        space = manifest["config"]["spaces"].get(row["space"], {})
        band = space.get("band", {})
        if band.get("unit") != "quantile" or row["low"] > row["high"]:
            continue
        low, high = row["low"] / 1e6, row["high"] / 1e6
        pin = (
            f"spaces: {{{row['space']}: {{model: {space['model']}, of: {space['of']}, "
            f"band: {{unit: cosine, low: {low:.6f}, high: {high:.6f}}}}}}}"
        )
        for end in ("low", "high"):
            setting = f"{space['model']} {space['of']}, quantile {band[end]}"
            found[f"{row['space']} band {end}"] = Value(row[end], setting, pin)
    return found


def _cut(manifest: Manifest) -> dict[str, Value]:
    params, cut = manifest["config"].get("clip_score", {}), manifest.get("clip_score_cut")
    keep = params.get("keep")
    if keep not in ("neg_clip_loss", "top_fraction") or params.get("cut") is not None:
        return {}
    if cut is None:
        return {}
    setting = f"{params['model']} {keep}, fraction {params['fraction']}"
    return {"caption cut": Value(cut, setting, f"clip_score: {{cut: {cut / 1e6:.6f}}}")}


def history(last: Manifest | None) -> list[dict[str, Any]]:
    """What a new manifest keeps of the versions before it, oldest first."""
    if last is None:
        return []
    entry = {
        "version": last["version"],
        "created": last.get("created"),
        "images": last["counts"]["eligible"],
        "records": last["counts"]["records"],
        "calibrated": {n: list(v[:2]) for n, v in calibrated(last).items()},
        "work": last.get("work", {}),
        "seconds": last.get("seconds", {}),
    }
    return [*last.get("history", ()), entry][-KEPT:]


def courses(manifest: Manifest) -> list[Course]:
    """How each calibrated value came to where it is, back to where its setting was another."""
    past: Sequence[Mapping[str, Any]] = manifest.get("history", ())
    found = []
    for name, (value, setting, pin) in calibrated(manifest).items():
        points = [(int(manifest["version"] or 0), value)]
        for entry in reversed(past):
            before = entry["calibrated"].get(name)
            if before is None or before[1] != setting:
                break
            points.append((entry["version"], before[0]))
        found.append(Course(name, setting, pin, tuple(reversed(points))))
    return found
