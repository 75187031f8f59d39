"""Tombstones: what must never come back, kept as keyed hashes only.

    tombstones/secret                   32 random bytes in hex, written once
    tombstones/<number>-<digest>.json   hashes of images, objects, names, captions and pairs

A hash is HMAC-SHA256 under the secret of the store, so that the list names nobody. A file that is
damaged, or sealed with another secret, stops every build: fail closed.
"""

import functools
import hmac
import json
import re
import secrets
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from infra.canonical import canonical, digest
from infra.captions import caption_id
from infra.errors import PairmillError
from infra.store import Conflict, NotFound, Store

PREFIX = "tombstones/"
SECRET = f"{PREFIX}secret"
FORMAT = 1
LISTS = ("images", "names", "captions", "pairs", "withdraw")
IMAGE_ID = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Tombstones:
    """Everything forgotten in one store. `objects` maps hashes of (key, member, stamp) to images'.

    Names and captions are of forgotten images; they may come into use again, for other bytes.
    Older versions that hold what `withdraw` names are to go.
    """

    secret: bytes = b""
    images: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()
    captions: frozenset[str] = frozenset()
    pairs: frozenset[str] = frozenset()
    withdraw: frozenset[str] = frozenset()
    objects: Mapping[str, str | None] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.images or self.objects)

    def keyed(self, text: str) -> str:
        """HMAC-SHA256 of a text under the store's secret, in hex; nothing without a secret."""
        if not self.secret:
            return ""
        return hmac.digest(self.secret, text.encode("utf-8", "surrogatepass"), "sha256").hex()

    def place(self, key: str, member: str | None, stamp: str) -> str:
        """The keyed hash of an object as it stands: its name and the stamp of its bytes."""
        return self.keyed("\0".join((key, "" if member is None else f"::{member}", stamp)))

    def has_image(self, image_id: str | None) -> bool:
        return image_id is not None and bool(self.images) and self.keyed(image_id) in self.images

    def has_caption(self, caption_id: str) -> bool:
        return bool(self.captions) and self.keyed(caption_id) in self.captions

    @functools.cached_property
    def digest(self) -> str:
        """Changes with what is forgotten, not with where it was met again. Empty for nothing."""
        if not self:
            return ""
        alone = sorted(place for place, image in self.objects.items() if image is None)
        return digest([sorted(self.images), sorted(self.pairs), alone])

    @functools.cached_property
    def state(self) -> str:
        """Changes with every hash that is added or released. Empty for nothing."""
        names = [sorted(getattr(self, name)) for name in LISTS if name != "withdraw"]
        return digest([names, sorted(self.objects)]) if self else ""

    @functools.cached_property
    def all(self) -> frozenset[str]:
        """Hashes of every text that must not be found: ids of images and pairs, names, captions."""
        return self.images | self.names | self.captions | self.pairs

    def found(self, text: str) -> str | None:
        """What kind of forgotten thing a text is: image, name, caption or pair; else None."""
        kinds = {"images": "image", "names": "name", "captions": "caption", "pairs": "pair"}
        hashed = self.keyed(text)
        for name, kind in kinds.items():
            if hashed in getattr(self, name):
                return kind
        is_text = self.captions and not IMAGE_ID.fullmatch(text)
        return "caption" if is_text and self.keyed(caption_id(text)) in self.captions else None


def load(store: Store) -> Tombstones:
    """All tombstones of a store.

    Raises PairmillError for a file that is damaged or not ours: nothing is built without them.
    """
    try:
        keys = [stat.key for stat in store.list(PREFIX)]
    except NotFound:
        return Tombstones()
    files = [key for key in keys if key != SECRET]
    if SECRET not in keys:
        if files:
            raise PairmillError(
                f"{SECRET} is missing in {store.uri}, so {len(files)} tombstone files can't be "
                "read; restore it from a backup, or forget everything anew after deleting them"
            )
        return Tombstones()
    secret = _secret(store)
    bodies = {_number(store, key): [] for key in files}  # type: dict[int, list[dict[str, Any]]]
    for key in files:
        bodies[_number(store, key)].append(_body(store, key, secret))
    return _merged(secret, bodies)


def _merged(secret: bytes, bodies: Mapping[int, list[dict[str, Any]]]) -> Tombstones:
    sets: dict[str, set[str]] = {name: set() for name in LISTS}
    objects: dict[str, str | None] = {}
    for number in sorted(bodies):
        # What a file releases was forgotten by files before it.
        for body in bodies[number]:
            for name in ("names", "captions"):
                sets[name] -= set(body["released"])
        for body in bodies[number]:
            for name in LISTS:
                sets[name] |= set(body[name])
            objects |= dict(body["objects"])
    return Tombstones(secret, **{k: frozenset(v) for k, v in sets.items()}, objects=objects)


def open_for_writing(store: Store) -> Tombstones:
    """As `load`, with a secret, which is made where the store has none."""
    found = load(store)
    if not found.secret:
        with suppress(Conflict):
            store.put(SECRET, secrets.token_hex(32).encode(), if_absent=True)
        found = load(store)
    return found


def add(
    store: Store,
    known: Tombstones,
    *,
    objects: Mapping[str, str | None] | None = None,
    released: Iterable[str] = (),
    **hashes: Iterable[str],
) -> bool:
    """Add keyed hashes (images, names, captions, pairs, objects); False where nothing is new."""
    body: dict[str, Any] = {
        name: sorted(set(hashes.get(name, ())) - getattr(known, name)) for name in LISTS
    }
    body["objects"] = sorted([k, v] for k, v in (objects or {}).items() if k not in known.objects)
    body["released"] = sorted(set(released) & (known.names | known.captions))
    if not any(body.values()):
        return False
    taken = [_number(store, s.key) for s in store.list(PREFIX) if s.key != SECRET]
    key = f"{PREFIX}{max(taken, default=0) + 1:06d}-{digest(body)[:16]}.json"
    sealed = {"format": FORMAT, **body, "seal": _seal(known.secret, body)}
    store.put(key, canonical(sealed))
    return True


def _secret(store: Store) -> bytes:
    text = store.get(SECRET)
    if not re.fullmatch(rb"[0-9a-f]{64}", text):
        raise PairmillError(
            f"{SECRET} in {store.uri} is damaged; restore it from a backup: nothing is built "
            "while it is unknown what was forgotten"
        )
    return text


def _number(store: Store, key: str) -> int:
    found = re.fullmatch(rf"{PREFIX}(\d{{6,}})-[0-9a-f]{{16}}\.json", key)
    if not found:
        raise PairmillError(f"{key} in {store.uri} is no tombstone file; remove it from there")
    return int(found[1])


def _body(store: Store, key: str, secret: bytes) -> dict[str, Any]:
    try:
        body = json.loads(store.get(key))
        version, seal = body.pop("format"), body.pop("seal")
    except (ValueError, KeyError, AttributeError, TypeError):
        body, version, seal = None, None, ""
    if version not in (None, FORMAT):
        raise PairmillError(
            f"the tombstones {key} have format {version}, this Pairmill reads {FORMAT}; use the "
            "Pairmill that wrote them"
        )
    if body is None or not hmac.compare_digest(str(seal), _seal(secret, body)):
        raise PairmillError(
            f"the tombstones {key} in {store.uri} are damaged, or of another secret; restore the "
            "file from a backup, or forget its images anew and then delete it"
        )
    return dict(body)


def _seal(secret: bytes, body: Mapping[str, Any]) -> str:
    return hmac.digest(secret, b"tombstones " + canonical(dict(body)), "sha256").hex()
