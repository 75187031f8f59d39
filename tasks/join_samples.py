"""Join samples that went different ways, each with the path that it took."""

from collections.abc import Mapping
from typing import NamedTuple

import polars as pl

from infra import samples, tables
from infra.build import Build
from infra.errors import PairmillError
from infra.ledger import stage
from infra.tables import Table


class Joined(NamedTuple):
    """All samples; columns that one way lacks are null there. `path` ends with the way's name."""

    samples: Table


@stage(version=1, reads={"given": tables.ALL})
def join_samples(build: Build, given: Mapping[str, Table], params: None = None) -> Joined:
    """Put tables together by the names of their ways; a name beginning with `_` is not in paths.

    Raises PairmillError where a sample came by two ways.
    """
    frames = []
    for way, table in given.items():
        rows = tables.frame(build.store, table)
        taken = [] if way.startswith("_") else [way]
        before = rows["path"].to_list() if "path" in rows.columns else [[]] * rows.height
        paths = pl.Series("path", [[*path, *taken] for path in before], pl.List(pl.String))
        frames.append(rows.with_columns(paths))
    joined = pl.concat(frames, how="diagonal")
    if twice := joined.filter(pl.col("sample_id").is_duplicated())["sample_id"].head(1).to_list():
        raise PairmillError(
            f"sample {twice[0]} came by two of the ways {', '.join(given)}; please report this"
        )
    return Joined(samples.write(build.store, joined))
