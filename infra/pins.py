"""Pins: a build says that it is at work, so that garbage collection leaves alone what it reads.

    pins/<build>.json    written before anything is read, renewed while the build runs

A pin that was not renewed for its life is dead, by the store's own clock. One whose process has
ended is dead at once, where this can be seen: on the same machine.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import NamedTuple
from uuid import uuid4

from infra import signs
from infra.canonical import canonical
from infra.errors import PairmillError
from infra.store import NotFound, Stat, Store, StoreError, listed

PREFIX = "pins/"
CLOCK, MARKS, ALONE = "gc/clock", "gc/marks.json", "gc/alone.json"
SWEEPING = "gc/sweeping/"
WAIT_SECONDS = 30.0  # longer than a sweep is at one batch of keys
LIFE = 1_800.0  # seconds
ALONE_SECONDS = 60.0  # without a sign of whoever wants to be alone, others go on
TICK = 0.2


@dataclass
class Pin:
    """The pin of one running build. `check` says whether it still holds."""

    store: Store
    key: str
    life: float
    saw: int
    renewed: float = field(default_factory=signs.now)
    lapsed: bool = False

    def renew(self) -> None:
        """Write the pin once more; the store's time of this write is what counts."""
        start = signs.now()
        body = {"format": 1, "saw": self.saw, "life_ms": int(self.life * 1000)}
        self.store.put(self.key, canonical(body | signs.this_process()))
        self.lapsed = self.lapsed or signs.now() - self.renewed > 0.8 * self.life
        self.renewed = start

    def check(self) -> None:
        """Raises PairmillError where the pin may have lapsed, so that its build must not go on."""
        if self.lapsed or signs.now() - self.renewed > 0.8 * self.life:
            raise PairmillError(
                f"this build's pin could not be renewed for {0.8 * self.life:.0f} s, so what it "
                "reads may have been collected; run it again"
            )


class Held(NamedTuple):
    """A pin that is alive: whose, and the list of garbage that its build knew when it began."""

    key: str
    saw: int
    life: float


@contextmanager
def hold(store: Store, life: float = LIFE) -> Iterator[Pin]:
    """Pin a store for the length of a `with` block, which may then read whatever it finds there.

    Waits while another process removes what was forgotten.
    """
    pin = Pin(store, f"{PREFIX}{uuid4().hex}.json", life, _generation(store))
    pin.renew()
    try:
        with signs.renewed("pin", life / 5, pin.renew):
            _wait_for_others(store)
            yield pin
    finally:
        with suppress(StoreError):
            store.delete(pin.key)


def held(store: Store, apart_from: str | None = None) -> list[Held]:
    """The pins that are alive, save one's own; dead ones are removed."""
    now = clock(store)
    found = []
    for stat in listed(store, PREFIX):
        if stat.key == apart_from:
            continue
        pin = _read(store, stat, now)
        if pin:
            found.append(pin)
        else:
            store.delete(stat.key)
    return found


def clock(store: Store) -> float:
    """The store's own time, in seconds since 1970: that of an object written just now."""
    store.put(CLOCK, uuid4().hex.encode())
    return store.head(CLOCK).mtime


@contextmanager
def alone(store: Store, own: str | None = None) -> Iterator[Callable[[], bool]]:
    """Gives a function that tells whether no other build is at work; while it does, none begins.

    A build that begins writes its pin, then looks for this sign; this writes the sign, then looks
    for pins: so at least one of the two sees the other. The sign is renewed; where that failed,
    the function says no.
    """
    renewed = [signs.now()]

    def renew() -> None:
        start = signs.now()
        store.put(ALONE, canonical({"sign": uuid4().hex, **signs.this_process()}))
        renewed[0] = start

    renew()
    try:
        with signs.renewed("alone", ALONE_SECONDS / 6, renew):
            is_alone = not held(store, own)
            yield lambda: is_alone and signs.now() - renewed[0] < 0.8 * ALONE_SECONDS
    finally:
        store.delete(ALONE)


def put(store: Store, key: str, data: bytes) -> None:
    """Write a content-addressed object, so that a sweep which is just at it does no harm.

    A sweep shows a sign, looks at an object, deletes it, takes the sign away. So once no sign is
    seen, whatever could take the object of this write has done so, and a look tells.
    """
    store.put(key, data)
    until = time.monotonic() + WAIT_SECONDS
    while True:
        sweeps = _swept(store, key)
        if not sweeps and _is_there(store, key):
            return
        if sweeps and time.monotonic() <= until:
            time.sleep(TICK)
            continue
        for sign in sweeps:
            # Whoever left them is dead: a sweep is at one batch for less than that.
            store.delete(sign)
        store.put(key, data)


def _is_there(store: Store, key: str) -> bool:
    try:
        store.head(key)
    except NotFound:
        return False
    return True


def _swept(store: Store, key: str) -> list[str]:
    """The signs of sweeps that are just at a key, or were a moment ago."""
    found = []
    for stat in listed(store, SWEEPING):
        try:
            if key in json.loads(store.get(stat.key))["keys"]:
                found.append(stat.key)
        except NotFound:
            found.append(stat.key)  # its sweep ended since, and may have taken the object
    return found


def _wait_for_others(store: Store) -> None:
    """Until nobody wants to be alone, or whoever did has ended, or gives no sign of life."""
    seen, since = b"", time.monotonic()
    while True:
        try:
            sign = store.get(ALONE)
        except NotFound:
            return
        if sign != seen:
            seen, since = sign, time.monotonic()
        if time.monotonic() - since > ALONE_SECONDS or signs.has_ended(signs.parsed(sign)):
            return
        time.sleep(TICK)


def _read(store: Store, stat: Stat, now: float) -> Held | None:
    try:
        body = signs.parsed(store.get(stat.key))
        saw, life = int(body["saw"]), int(body["life_ms"]) / 1000
    except NotFound:
        return None
    except (ValueError, KeyError, TypeError):
        body, saw, life = {}, -1, LIFE
    if now - stat.mtime > life or signs.has_ended(body):
        return None
    return Held(stat.key, saw, life)


def _generation(store: Store) -> int:
    """Number of the newest list of garbage, 0 where there is none."""
    try:
        return int(json.loads(store.get(MARKS))["generation"])
    except (NotFound, ValueError, KeyError, TypeError):
        return 0
