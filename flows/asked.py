"""What models were asked about a pair, and what they answered, from the paid answers of a store."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import polars as pl
import pyarrow as pa

from infra import responses
from infra.errors import PairmillError
from infra.responses import View
from infra.schema import SCHEMAS
from infra.segments import Stored
from infra.store import Store
from infra.text import plain

SHORT = 12  # characters of a key
SHOWN = 400  # characters of an answer
_NONE = pa.schema([])


def told(
    store: Store, frames: Sequence[pl.DataFrame], pair: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """Lines on each answer about a pair (pair_id, query, target); nothing where none was asked for.

    Answers are found by the `requests` of a pair's rows; where there are none, as for a pair
    without a label, by its images.
    """
    keys = requests(frames, pair["pair_id"])
    yield from _answers(store, keys, None if keys else pair)


def answers(store: Store, keys: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Lines on the answers to some requests."""
    return _answers(store, keys, None)


def _answers(
    store: Store, keys: Sequence[str], pair: Mapping[str, Any] | None
) -> Iterator[tuple[str, str]]:
    try:
        view = responses.look(store)
        about = _about(view, pair) if pair else []
        found = [(key, view.get(key)) for key in keys] + [(one.key, one) for one in about]
    except PairmillError as error:
        yield "answers", str(error)
        return
    for key, stored in found:
        request = f"request {key[:SHORT]}"
        if stored is None:
            yield "asked", f"{request}: its answer is gone from the store"
            continue
        yield "asked", f"{plain(stored.stage, 40)}, {request}: {_in_short(stored)}"
        yield "", plain(stored.text, SHOWN) or "(no text)"


def tables_of(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Stages of a version with tables that say what was asked about pairs."""
    named = [(stage, name) for stage, own in manifest.get("tables", {}).items() for name in own]
    return [(s, name) for s, name in named if "requests" in SCHEMAS.get(name, _NONE).names]


def requests(frames: Sequence[pl.DataFrame], pair_id: str) -> list[str]:
    """Keys of the requests behind a pair's rows; older tables have none."""
    found: dict[str, None] = {}
    for rows in frames:
        if {"pair_id", "requests"} <= set(rows.columns):
            for keys in rows.filter(pl.col("pair_id") == pair_id)["requests"].to_list():
                found |= dict.fromkeys(keys or ())
    return list(found)


def _about(view: View, pair: Mapping[str, Any]) -> list[Stored]:
    """Answers about the two images, in the order of the pair."""
    both = [pair["query"], pair["target"]]
    return [stored for stored in view.about(both) if list(stored.images[:2]) == both]


def _in_short(stored: Stored) -> str:
    """Status, model, tokens and cost, as far as they are known."""
    if stored.input_tokens is None or stored.output_tokens is None:
        tokens = "tokens not reported"
    else:
        cached = f" ({stored.cached_tokens:,} cached)" if stored.cached_tokens else ""
        tokens = f"{stored.input_tokens:,} tokens in{cached}, {stored.output_tokens:,} out"
    cost = "cost unknown" if stored.cost is None else f"cost {stored.cost / 1e9:.6f}"
    return f"{plain(stored.status, 20)}, {plain(stored.model, 80)}, {tokens}, {cost}"
