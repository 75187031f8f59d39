"""Tables: shards named by their bytes, digests that don't see order or sharding."""

from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from infra import tables
from infra.errors import PairmillError
from infra.schema import SCHEMAS
from infra.store import Location, open_store
from infra.tables import Table

ROWS = [{"key": f"{n}.jpg", "caption": f"picture {n}", "licence": None} for n in range(5)]


@pytest.fixture
def store(tmp_path):
    return open_store(Location(uri=str(tmp_path / "store")))


def test_rows_come_back_as_they_were(store):
    table = tables.write(store, "file_captions", ROWS)
    assert (table.rows, len(table.shards)) == (5, 1)
    assert tables.read(store, table).to_pylist() == ROWS
    assert tables.read(store, table, ["key"]).column_names == ["key"]


def test_a_table_is_split_and_travels_as_json(store):
    table = tables.write(store, "file_captions", ROWS, shard_rows=2)
    assert [shard.rows for shard in table.shards] == [2, 2, 1]
    assert Table.from_json(table.to_json()) == table
    assert [part.num_rows for part in tables.shards(store, table)] == [2, 2, 1]
    assert tables.read(store, table).to_pylist() == ROWS


def test_equal_rows_are_one_file(store):
    first = tables.write(store, "file_captions", ROWS)
    assert tables.write(store, "file_captions", ROWS) == first
    assert len(list(store.list("data/"))) == 1
    shard = first.shards[0]
    assert store.head(tables.shard_key(shard.sha256)).size == shard.bytes


@pytest.mark.parametrize("name", [name for name in SCHEMAS if name not in ("vectors", "texts")])
def test_an_empty_table_has_the_columns_of_its_schema(name, store):
    for table in (tables.write(store, name, []), Table(f"{name}-0123abc")):
        assert tables.read(store, table).schema.names == SCHEMAS[name].names
        assert tables.read(store, table, SCHEMAS[name].names[:1]).num_columns == 1


def test_a_frame_takes_its_schema(store):
    frame = pl.DataFrame({"caption_id": ["a"], "image_id": ["b"], "more": [1]})
    table = tables.write_frame(store, "image_captions", frame)
    assert tables.read(store, table).schema == SCHEMAS["image_captions"]


def test_a_missing_shard_says_what_to_do(store):
    table = tables.write(store, "file_captions", ROWS)
    store.delete(tables.shard_key(table.shards[0].sha256))
    with pytest.raises(PairmillError, match=r"is gone from .*; `pairmill verify-store --repair`"):
        tables.read(store, table)


def test_a_damaged_shard_says_what_to_do(store):
    table = tables.write(store, "file_captions", ROWS)
    path = Path(store.uri, tables.shard_key(table.shards[0].sha256))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(PairmillError, match=r"is damaged .*; `pairmill verify-store --repair`"):
        tables.read(store, table)


@hypothesis_settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(ROWS), size=st.integers(1, 6))
def test_the_digest_sees_neither_order_nor_shards(order, size, store):
    table = tables.write(store, "file_captions", list(order), shard_rows=size)
    plain = tables.write(store, "file_captions", ROWS)
    columns = ["key", "caption"]
    assert tables.digest(store, table, columns) == tables.digest(store, plain, columns)


def test_the_digest_sees_the_named_columns_alone(store):
    plain = tables.write(store, "file_captions", ROWS)
    other = tables.write(store, "file_captions", [row | {"licence": "cc0"} for row in ROWS])
    assert tables.digest(store, plain, ["key"]) == tables.digest(store, other, ["key"])
    assert tables.digest(store, plain, ["licence"]) != tables.digest(store, other, ["licence"])
    assert tables.digest(store, Table("vectors-abc"), []) == "vectors-abc"


def test_a_digest_is_that_of_values_not_of_their_layout():
    ids = ["b", "a", "c"]
    rows = pa.table({"id": ids, "n": pa.array([1, None, 3], pa.int32()), "l": [["x"], None, []]})
    other = pa.concat_tables([rows.slice(2), rows.slice(0, 2)]).cast(
        pa.schema({"id": pa.large_string(), "n": pa.int64(), "l": pa.large_list(pa.large_string())})
    )
    assert tables.digest_columns(rows) == tables.digest_columns(other)
    assert tables.digest_columns(rows, ordered=True) != tables.digest_columns(other, ordered=True)


@pytest.mark.parametrize(
    "other",
    [
        {"id": ["a", "bc"], "l": [["x"], []]},
        {"id": ["ab", "c"], "l": [[], ["x"]]},
        {"id": ["ab", "c"], "l": [["x"], None]},
        {"id": ["ab", "c"], "m": [["x"], []]},
        {"id": ["ab", "c", "c"], "l": [["x"], [], []]},
    ],
)
def test_other_values_have_another_digest(other):
    rows = {"id": ["ab", "c"], "l": [["x"], []]}
    assert tables.digest_columns(pa.table(rows)) != tables.digest_columns(pa.table(other))


def test_structs_are_hashed_by_field_and_floats_refused():
    one, other = ([{"low": low, "high": 3}] for low in (1, 2))
    assert tables.digest_columns(pa.table({"s": one})) != tables.digest_columns(
        pa.table({"s": other})
    )
    with pytest.raises(TypeError, match="float"):
        tables.digest_columns(pa.table({"s": [0.5]}))


def test_vectors_are_gathered_by_id_in_order_of_id(store):
    ids = [f"{n:064x}" for n in (3, 1, 2)]
    vectors = np.array([[3, 30], [1, 10], [2, 20]], np.float16)
    shards = [tables.write_shard(store, tables.vector_rows("image_id", ids, vectors))]
    repeated = tables.vector_rows("image_id", ids[:1], vectors[:1])
    shards.append(tables.write_shard(store, repeated))
    table = Table("vectors-abc", tuple(shards))
    found, matrix = tables.gather(store, table, [ids[0], ids[1], ids[0]])
    assert (found, matrix.tolist()) == ([ids[1], ids[0]], [[1, 10], [3, 30]])
    assert matrix.dtype == np.float16


def test_an_id_without_a_vector_is_an_error(store):
    rows = tables.vector_rows("image_id", ["a" * 64], np.zeros((1, 2), np.float16))
    for table in (tables.write(store, "vectors-abc", rows), Table("vectors-abc")):
        with pytest.raises(PairmillError, match=r"1 of \d ids have no vector in table vectors-abc"):
            tables.gather(store, table, ["b" * 64, *(["a" * 64] if table.rows else [])])


def test_no_ids_are_an_empty_matrix(store):
    found, matrix = tables.gather(store, Table("vectors-abc"), [])
    assert (found, matrix.shape) == ([], (0, 0))


def test_a_matrix_is_read_from_chunks_and_slices():
    rows = tables.vector_rows("image_id", "abcd", np.arange(8, dtype=np.float16).reshape(4, 2))
    assert tables.matrix(rows.slice(1, 2)["vector"]).tolist() == [[2, 3], [4, 5]]
    twice = pa.concat_tables([rows, rows.slice(3)])
    assert tables.matrix(twice["vector"]).tolist()[-2:] == [[6, 7], [6, 7]]


def test_vectors_of_a_store_that_has_them_as_lists_are_read_beside_new_ones(store):
    vectors = np.arange(8, dtype=np.float16).reshape(4, 2)
    ids = [letter * 64 for letter in "abcd"]
    lists = pa.FixedSizeListArray.from_arrays(pa.array(vectors[:2].ravel()), 2)
    old = pa.table({"image_id": pa.array(ids[:2]), "vector": lists})
    new = tables.vector_rows("image_id", ids[2:], vectors[2:])
    table = Table("vectors", tuple(tables.write_shard(store, part) for part in (old, new)))
    names, found = tables.gather(store, table, ids)
    assert names == ids
    np.testing.assert_array_equal(found, vectors)
    np.testing.assert_array_equal(tables.matrix(tables.read(store, table)["vector"]), vectors)
