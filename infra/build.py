"""What a stage is given: the two stores, the ledger, a pool, and where it reports progress."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from infra.budget import Bill
from infra.cluster import Pool
from infra.ledger import Ledger
from infra.pins import Pin
from infra.store import Store


class Progress(Protocol):
    """Told how far a stage is, and perhaps something in words."""

    def __call__(self, stage: str, done: int, total: int | None, said: str = "") -> None: ...


class WouldRun(Exception):
    """Raised in a planning build by the first stage that has work to do."""

    def __init__(self, stage: str, inputs: Mapping[str, Any]):
        super().__init__(stage)
        self.stage = stage
        self.inputs = inputs


def silent(stage: str, done: int, total: int | None, said: str = "") -> None:
    """Progress that nobody watches."""


@dataclass
class Footprint:
    """What a build used: paths of ledger records, families of growing tables by name, and the
    digest of the tombstones it applied.
    """

    records: set[str] = field(default_factory=set)
    families: dict[str, str] = field(default_factory=dict)
    tombstones: str = ""


@dataclass(frozen=True)
class Build:
    """One run of a flow.

    `progress(stage, done, total)` may be called from the driver only. `work` counts what was
    really done: objects_listed, images_decoded, images_embedded, similarities_computed,
    labels_requested. `seconds` holds wall time by stage. `bill` is what models were paid. `secrets`
    gives the API key of a Prefect block. `pin` keeps garbage collection away.
    """

    corpus: Store
    store: Store
    pool: Pool
    progress: Progress = silent
    planning: bool = False
    work: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)
    footprint: Footprint = field(default_factory=Footprint)
    pin: Pin | None = None
    bill: Bill = field(default_factory=Bill)
    secrets: Callable[[str], str] | None = None

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.store, self.footprint.records)

    def begin(self, stage: str, inputs: Mapping[str, Any]) -> None:
        """Called before a stage works. Raises WouldRun in a build that only plans."""
        if self.pin:
            self.pin.check()
        if self.planning:
            raise WouldRun(stage, inputs)
