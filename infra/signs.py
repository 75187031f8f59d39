"""Signs of life: which process gave one, whether that process has ended, and who renews it."""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from infra.store import StoreError


def now() -> float:
    """Seconds of a clock that nobody sets and that goes on while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


@contextmanager
def renewed(name: str, every: float, renew: Callable[[], None]) -> Iterator[None]:
    """Renew a sign, by a thread, for the length of a `with` block; a failure is tried again."""
    ended = threading.Event()

    def keep() -> None:
        while not ended.wait(every):
            with suppress(StoreError):
                renew()

    keeper = threading.Thread(target=keep, name=name, daemon=True)
    keeper.start()
    try:
        yield
    finally:
        ended.set()
        keeper.join()


def this_process() -> dict[str, Any]:
    """What tells this process from every other one on this machine; nothing where nothing does."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return {
            "machine": f"{boot}:{Path('/proc/self/ns/pid').stat().st_ino}",
            "process": os.getpid(),
            "started": _started(os.getpid()),
        }
    except OSError:
        return {}


def has_ended(sign: Mapping[str, Any]) -> bool:
    """Whether the process that gave a sign ran on this machine and has ended."""
    here = this_process()
    if not here or sign.get("machine") != here["machine"]:
        return False
    try:
        return _started(int(sign["process"])) != sign["started"]
    except (FileNotFoundError, ProcessLookupError):
        return True
    except (OSError, ValueError, KeyError, TypeError):
        return False


def parsed(data: bytes) -> dict[str, Any]:
    """A sign as it was written; nothing where it is damaged."""
    try:
        sign = json.loads(data)
    except ValueError:
        return {}
    return sign if isinstance(sign, dict) else {}


def _started(process: int) -> str:
    text = Path(f"/proc/{process}/stat").read_text()
    return text.rpartition(")")[2].split()[19]
