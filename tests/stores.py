"""Stores for tests: a folder that notes what is read, and one whose bytes kill their reader."""

import os
import signal
from dataclasses import dataclass

from infra.folder import FolderStore

READS: list[str] = []


@dataclass(frozen=True)
class NotingStore(FolderStore):
    """Notes in READS the key of every object that this process reads."""

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        READS.append(key)
        return super().get(key, start, length)


@dataclass(frozen=True)
class DeadlyStore(FolderStore):
    """Kills the process that reads `poison`, as a decoder does that runs wild."""

    poison: str = ""
    driver: int = 0

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        if key == self.poison and os.getpid() != self.driver:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().get(key, start, length)
