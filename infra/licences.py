"""Licences in order of strictness: what may be done with a pair is what both its images allow."""

import re

# From freest to strictest. Whatever is not in the table is stricter than all that is.
ORDER = (
    "cc0",
    "pd",
    "pdm",
    "unsplash",
    "mit",
    "apache",
    "cc-by",
    "cc-by-sa",
    "cc-by-nd",
    "cc-by-nc",
    "cc-by-nc-sa",
    "cc-by-nc-nd",
)
NAMES = {"public-domain": "pd", "publicdomain": "pd", "cc-zero": "cc0", "cc-0": "cc0"}


def strictness(licence: str) -> int:
    """Place in ORDER; len(ORDER) for an unknown licence. Versions and spelling don't matter."""
    name = re.sub(r"[^a-z0-9]+", "-", licence.lower()).strip("-")
    name = re.sub(r"-?\d+(-\d+)*$", "", name) if not name.startswith("cc0") else "cc0"
    name = NAMES.get(name, name)
    return ORDER.index(name) if name in ORDER else len(ORDER)


def stricter(a: str, b: str) -> str:
    """The stricter of two licences; of two equally strict ones the first by name."""
    return max(sorted((a, b)), key=strictness)
