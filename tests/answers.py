"""Paid answers for tests, and how a process leaves them in a store."""

import asyncio
import hashlib

from infra import lease, responses
from infra.responses import SEGMENTS
from infra.segments import Stored, encode
from infra.store import Store


def key(name: object) -> str:
    return hashlib.sha256(str(name).encode()).hexdigest()


def answer(
    name: object,
    text: str = "yes",
    images: tuple[str, ...] = ("i1", "i2"),
    captions: tuple[str, ...] = (),
) -> Stored:
    return Stored(
        key=key(name),
        attempt=0,
        status="answered",
        text=text,
        finish_reason="stop",
        model="m",
        input_tokens=900,
        output_tokens=20,
        cached_tokens=None,
        cost=1_500_000,
        images=images,
        captions=captions,
        stage="label_pairs",
        created=1_790_000_000,
    )


def kept(store: Store, *answers: Stored) -> list[Stored]:
    """Adds answers as one process does, one after the other."""

    async def add() -> list[Stored]:
        with lease.hold(store, responses.LEASE) as held:
            async with responses.open_responses(store, held) as opened:
                return list(await asyncio.gather(*map(opened.add, answers)))

    return asyncio.run(add())


def segment(store: Store, epoch: int, number: int, *answers: Stored) -> str:
    """A segment that a dead process left."""
    name = f"{SEGMENTS}{epoch:08d}-{number:08d}.jsonl"
    store.put(name, encode(answers))
    return name
