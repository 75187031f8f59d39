"""Canonical JSON and its digests: the one way in which anything here is named by content."""

import hashlib
import json
from typing import Any


def canonical(value: Any) -> bytes:
    """UTF-8 JSON with sorted keys, no blanks and no floats, so that equal values have equal bytes.

    Raises TypeError for a float: scores and thresholds are integers by the time they are hashed.
    """
    _refuse_floats(value)
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return text.encode("utf-8", "surrogateescape")


def digest(value: Any) -> str:
    """SHA-256 of `canonical(value)`, in hex."""
    return hashlib.sha256(canonical(value)).hexdigest()


def settings(value: Any) -> Any:
    """Parameters as canonical data: floats become their shortest decimal text."""
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, dict):
        return {str(k): settings(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [settings(v) for v in value]
    return value


def _refuse_floats(value: Any) -> None:
    if isinstance(value, float):
        raise TypeError(f"a float ({value!r}) has no canonical form; use an integer or text")
    if isinstance(value, dict):
        for item in value.values():
            _refuse_floats(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _refuse_floats(item)
