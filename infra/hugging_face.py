"""What the Hugging Face Hub reads of a dataset card: the metadata block at its head."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from infra.text import plain

# Licence identifiers of the Hub, of those that corpora of pictures commonly state.
LICENCES = frozenset(
    (
        "apache-2.0", "mit", "unknown", "odc-by", "odbl", "pddl", "cc", "cc0-1.0",
        *(f"cc-by{rest}-{v}" for rest in ("", "-sa", "-nc", "-nd") for v in ("3.0", "4.0")),
        "cc-by-2.0", "cc-by-2.5", "cc-by-sa-2.0", "cc-by-sa-2.5", "cc-by-nc-2.0",
        "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-3.0",
        "cc-by-nc-nd-4.0",
    )
)  # fmt: skip
SIZES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
    (100_000_000, "10M<n<100M"),
    (1_000_000_000, "100M<n<1B"),
    (10_000_000_000, "1B<n<10B"),
)
FILES = (("train", "records/train.parquet"), ("validation", "records/validation.parquet"))


def card_metadata(manifest: Mapping[str, Any], title: str) -> str:
    """The block as YAML, without the lines of dashes around it."""
    counts = manifest["counts"]
    splits = [{"split": s, "path": path} for s, path in FILES if counts["splits"].get(s)]
    configs = [{"config_name": "default", "data_files": splits}] if splits else []
    configs += [
        {"config_name": name, "data_files": f"{name}.parquet"} for name in ("images", "fates")
    ]
    data = {
        "pretty_name": plain(title, 200),
        **licence(counts["licences"]),
        **_kind(manifest.get("recipe")),
        "size_categories": [_size(counts["records"])],
        "configs": configs,
    }
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=1_000)


def _kind(recipe: str | None) -> dict[str, list[str]]:
    """Tasks and tags: those of pairs, or of what a recipe over samples makes."""
    if recipe:
        return {"task_categories": ["image-text-to-text"], "tags": ["pairmill", recipe]}
    return {
        "task_categories": ["image-feature-extraction", "image-to-image"],
        "tags": ["pairmill", "megapairs", "composed-image-retrieval", "multimodal-embedding"],
    }


def licence(names: Iterable[str]) -> dict[str, str]:
    """`license` where all records have one that the Hub knows, else `other` and its name."""
    known = list(names)
    if len(known) != 1:
        several = {"license": "other", "license_name": "several-see-below"}
        return several if known else {"license": "unknown"}
    name = re.sub(r"[^a-z0-9.]+", "-", known[0].lower()).strip("-")
    if name in LICENCES:
        return {"license": name}
    return {"license": "other", "license_name": name[:80] or "unnamed"}


def _size(records: int) -> str:
    return next((name for limit, name in SIZES if records < limit), "10B<n<100B")
