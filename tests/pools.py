"""Pools on which something goes wrong."""

from collections.abc import Callable
from typing import Any

from infra.cluster import Crash


class Crashing:
    """A pool on which certain items end their worker; shards are cut until these are alone."""

    def __init__(self, pool: Any, is_deadly: Callable[[Any], bool]):
        self._pool, self._is_deadly = pool, is_deadly

    def map(self, fn: Any, shards: Any, *, split: Any, resources: Any = None) -> Any:
        for shard in shards:
            if not any(map(self._is_deadly, shard)):
                yield from self._pool.map(fn, [shard])
            elif len(shard) > 1:
                yield from self.map(fn, split(shard), split=split)
            else:
                yield shard, Crash("killed by signal 9")
