"""Which numbers of a config are not those of a recipe's source, so that none passes for one.

Descriptions of parameters say it: "not given in the source", or that the default is our own.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel

OWN = re.compile(r"\bour\s+own\b|not\s+given\s+in\s+the\s+source", re.IGNORECASE)


class Own(NamedTuple):
    """A parameter for which the source gives no value, its value, and whether that is Pairmill's
    own default; otherwise the config set it.
    """

    key: str
    value: Any
    default: bool


def own(config: BaseModel, published: Mapping[str, Any], prefix: str = "") -> Iterator[Own]:
    """The parameters that are not the source's, with the values that a version tells of them."""
    for name, field in type(config).model_fields.items():
        if name not in published:
            continue
        value, shown = getattr(config, name), published[name]
        if OWN.search(field.description or ""):
            is_model = isinstance(shown, Mapping) and "model" in shown
            told = shown["model"] if is_model else shown
            yield Own(f"{prefix}{name}", told, value == field.get_default())
        if isinstance(value, BaseModel) and isinstance(shown, Mapping):
            yield from own(value, shown, f"{prefix}{name}.")
        elif isinstance(value, Mapping) and isinstance(shown, Mapping):
            parts = ((key, part) for key, part in value.items() if isinstance(part, BaseModel))
            for key, part in parts:
                yield from own(part, shown[key], f"{prefix}{name}.{key}.")
