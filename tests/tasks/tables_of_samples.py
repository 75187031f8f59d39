"""Tables of samples from tuples, for tests."""

import polars as pl

from infra import samples


def samples_of(build, given, columns, **types):
    """samples_of(build, [("s", "i", 5)], "sample_id image_id length"); texts unless told else."""
    names = columns.split()
    kinds = {name: types.get(name) for name in names}
    first = dict(zip(names, given[0], strict=True)) if given else {}
    schema = {n: kinds[n] or (pl.Int64 if isinstance(first.get(n), int) else pl.String)
              for n in names}  # fmt: skip
    return samples.write(build.store, pl.DataFrame(given, schema, orient="row"))
