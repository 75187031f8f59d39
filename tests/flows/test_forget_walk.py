"""Random weeks of a bucket with forgetting, collections and deaths: nothing comes back, and what is
published is what a full build would publish.
"""

import os
import random
import shutil
import threading

import pytest

from flows.config import load_config
from infra import pins, tombstones
from infra.folder import FolderStore
from tasks.tidy import collect
from tests.flows.place import Place, fill

WALKS = int(os.environ.get("PAIRMILL_SOAK_WALKS", "12"))
SEED = int(os.environ.get("PAIRMILL_SOAK_SEED", "0"))


class Died(BaseException):
    """What `kill -9` would be, as far as one process can try it on itself."""


class Week:
    """A place, what was taken out of its corpus, and what was forgotten."""

    def __init__(self, folder, dice):
        fill(folder / "corpus")
        self.place = Place(folder, tidy={"keep_builds": 2}, publish={"keep_versions": 2})
        self.dice, self.away = dice, folder / "away"
        self.away.mkdir()
        self.forgotten: set[str] = set()

    def files(self):
        corpus = self.place.corpus
        return sorted(p for p in corpus.rglob("*") if p.suffix in (".png", ".jpg", ".tar"))

    def remove(self):
        path = self.dice.choice(self.files())
        path.rename(self.away / f"{self.dice.random()}{path.suffix}")

    def rename(self):
        path = self.dice.choice(self.files())
        path.rename(path.with_name(f"{self.dice.randrange(10**6)}{path.suffix}"))

    def bring_back(self):
        for path in sorted(self.away.iterdir())[:2]:
            shutil.copy(path, self.place.corpus / f"again {path.name}")

    def rewrite(self):
        path, other = self.dice.sample([p for p in self.files() if p.suffix != ".tar"], 2)
        path.write_bytes(other.read_bytes())

    def forget(self):
        rows = [r for r in self.place.fates_of_latest() if r["level"] == "object"]
        row = self.dice.choice([r for r in rows if r["image_id"] and r["fate"] != "forgotten"])
        said = self.place.forget(row["id"], purge=True, exact=self.dice.random() < 0.5)
        self.forgotten |= {line.split()[1].rstrip(":") for line in said if line[:6] == "image "}

    def collect(self):
        collect(self.place.store, load_config(self.place.config_file).tidy, dry_run=False)

    def die(self):
        put, delete, at = FolderStore.put, FolderStore.delete, self.dice.randrange(120)
        count = [0]

        def dying(write):
            def call(store, name, *given, **named):
                if threading.current_thread().name not in ("pin", "alone"):
                    count[0] += 1
                    if count[0] > at:
                        raise Died
                return write(store, name, *given, **named)

            return call

        FolderStore.put, FolderStore.delete = dying(put), dying(delete)
        try:
            self.place.build()
        except Died:
            pass
        finally:
            FolderStore.put, FolderStore.delete = put, delete
        for stat in list(self.place.store.list(pins.PREFIX)):
            self.place.store.delete(stat.key)

    def night(self):
        digest = self.place.build()["digest"]
        self.place.build()
        assert self.place.verify() == []
        assert self.forgotten.isdisjoint(text for _, text in self.place.texts())
        return digest

    def full(self, folder):
        """A build of the same corpus in a new store with the same tombstones."""
        (folder / "store").mkdir(parents=True)
        store = self.place.folder / "store"
        if (store / "tombstones").exists():
            shutil.copytree(store / "tombstones", folder / "store/tombstones")
        fresh = Place(folder, corpus={"uri": str(self.place.corpus)})
        digest = fresh.build()["digest"]
        assert tombstones.load(fresh.store).images == tombstones.load(self.place.store).images
        return digest


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("walk", range(WALKS))
def test_weeks_with_forgetting_end_as_a_full_build(walk, tmp_path, monkeypatch):
    monkeypatch.setattr(pins, "ALONE_SECONDS", 0.5)
    dice = random.Random(SEED * 1000 + walk)
    week = Week(tmp_path / "week", dice)
    week.night()
    changes = (week.remove, week.rename, week.bring_back, week.rewrite)
    steps = (*changes, week.forget, week.collect, week.die)
    for _ in range(4):
        for step in dice.choices(steps, k=4):
            step()
        digest = week.night()
    assert digest == week.full(tmp_path / "full")
