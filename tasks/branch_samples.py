"""Branch samples: each goes on also under another name, with a fate of its own."""

from typing import NamedTuple

import polars as pl

from infra import samples, tables
from infra.build import Build
from infra.canonical import digest
from infra.ledger import stage
from infra.tables import Table


class Branch(NamedTuple):
    """What the way is called that the samples go on."""

    name: str


class Branched(NamedTuple):
    """The samples under their new names; `of` is the name that each had."""

    samples: Table


@stage(version=1, reads={"given": tables.ALL}, meaning=lambda params: params.name)
def branch_samples(build: Build, given: Table, params: Branch) -> Branched:
    """For what is made of a sample beside the record that it is itself: one may fail alone."""
    rows = tables.frame(build.store, given)
    names = [digest([name, params.name]) for name in rows["sample_id"]]
    renamed = rows.with_columns(
        pl.col("sample_id").alias("of"), pl.Series("sample_id", names, pl.String)
    )
    return Branched(samples.write(build.store, renamed))
