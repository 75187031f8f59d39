"""Verify absence: read all that a store holds and say what of it is forgotten, and the remedy."""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from infra import retention, tombstones, traces
from infra.errors import PairmillError
from infra.store import NotFound, Stat, Store, listed
from infra.tombstones import Tombstones

READERS = 4
OUT_OF_REACH = (
    "out of reach: the corpus itself; earlier object versions where a bucket keeps them, and its "
    "backups; logs of the server and of labellers; copies that readers made"
)


class Found(NamedTuple):
    """What one object holds: counts by kind, or why it could not be read, or be attributed."""

    key: str
    kinds: dict[str, int]
    problem: str | None = None


class Remains(PairmillError):
    """Something forgotten is still there."""


def verify_absent(store: Store) -> Iterator[str]:
    """Read every object of a store and name those that hold what was forgotten.

    Raises Remains at the end where there is any.
    """
    gone = tombstones.load(store)
    if not gone:
        yield "nothing is forgotten in this store"
        return
    stats = [stat for stat in listed(store) if not stat.key.startswith(tombstones.PREFIX)]
    named = _named_pictures(store, stats)
    with ThreadPoolExecutor(READERS) as threads:
        results = list(threads.map(lambda stat: _look(store, stat, gone, named), stats))
    bad = [found for found in results if found.kinds or found.problem]
    last = {name: retention.latest(store, name) for name in retention.datasets(store)}
    for found in bad:
        said = ", ".join(f"{count} {kind}s" for kind, count in sorted(found.kinds.items()))
        yield f"{found.key}: {found.problem or said}; {_remedy(found.key, last)}"
    size = sum(stat.size for stat in stats)
    yield f"read {len(stats)} objects, {size} bytes, for {len(gone.images)} forgotten images"
    yield OUT_OF_REACH
    if bad:
        raise Remains(
            f"{len(bad)} of {len(stats)} objects still hold what was forgotten, see above"
        )


def _look(store: Store, stat: Stat, gone: Tombstones, named: set[str]) -> Found:
    if stat.key.endswith(".jpegs") and stat.key not in named:
        return Found(stat.key, {}, "prepared pictures that no record names")
    try:
        held = traces.texts(stat.key, store.get(stat.key)) | traces.of_key(stat.key)
    except NotFound:
        return Found(stat.key, {})
    except Exception as error:
        # Whatever its reader says of damaged bytes: what can't be read can't be vouched for.
        return Found(stat.key, {}, f"can't be read ({type(error).__name__})")
    return Found(stat.key, dict(Counter(kind for text in held if (kind := gone.found(text)))))


def _named_pictures(store: Store, stats: list[Stat]) -> set[str]:
    named: set[str] = set()
    for stat in stats:
        if stat.key.startswith("ledger/pictures/"):
            named |= traces.texts(stat.key, store.get(stat.key))
    return named


def _remedy(key: str, last: dict[str, int]) -> str:
    parts = key.split("/")
    if parts[0] != "datasets":
        return "run a build, whose end removes it, or `pairmill gc`"
    if len(parts) > 2 and parts[2] == f"v{last.get(parts[1], 0):06d}":
        return "run a build: the next version is without it"
    return "`pairmill forget --purge` withdraws this version, or publish.keep_versions"
