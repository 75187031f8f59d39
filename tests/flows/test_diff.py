"""What came, went and changed between two real versions."""

import json

import polars as pl
import pytest

from flows.diff import _example


def test_a_night_is_told_by_reason(made, pairmill):
    out, status = pairmill("diff", "1", "2", "-c", made.config)
    assert status == 0
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0].startswith("few: version 1 of 20")
    assert any(line.startswith("band of dino: 0.") for line in lines)
    totals = (line.split() for line in lines if line[-1:].isdigit())
    counts = {words[0]: words[3:] for words in totals if len(words) == 6}
    # Two arrived; one left, and one had its bytes replaced by those of another picture.
    assert counts["objects"][:2] == ["2", "1"]
    assert counts["images"][:2] == ["2", "2"]
    assert f"new bytes under its name 1 {made.keys[6]}" in lines
    assert f"objects removed left the corpus 1 {made.keys[5]}" in lines


def test_changed_settings_are_named(made, pairmill):
    found = json.loads(pairmill("diff", "2", "3", "-c", made.config, "--json").out)
    assert found["config"] == [["pairs.targets", 3, 2]]
    assert (found["old"]["version"], found["new"]["version"]) == (2, 3)
    rows = {(row["level"], row["change"], row["reason"]): row for row in found["changes"]}
    removed = rows["pair", "removed", "settings of pairs changed"]
    assert 0 < len(removed["examples"]) <= removed["count"]
    assert not any(level in ("object", "image") and c != "changed" for level, c, _ in rows)


def test_every_row_is_written(made, pairmill, tmp_path):
    found = json.loads(pairmill("diff", "1", "2", "-c", made.config, "--json").out)
    for name, read in (("d.parquet", pl.read_parquet), ("d.csv", pl.read_csv)):
        assert pairmill("diff", "1", "2", "-c", made.config, "-o", tmp_path / name).status == 0
        assert len(read(tmp_path / name)) == sum(row["count"] for row in found["changes"])
    out, status = pairmill("diff", "1", "2", "-c", made.config, "-o", tmp_path / "d.xls")
    assert (status, "name a file that ends in .parquet, .csv, .jsonl" in out) == (2, True)


def test_the_second_version_is_latest_unless_named(made, pairmill):
    one = pairmill("diff", "2", "-c", made.config).out
    assert one == pairmill("diff", "2", "3", "-c", made.config).out


def test_a_version_does_not_differ_from_itself(made, pairmill):
    out, status = pairmill("diff", "2", "2", "-c", made.config)
    assert (status, out.splitlines()[-1]) == (
        0, "no object, image, pair or record differs",
    )  # fmt: skip


def test_versions_that_are_not_there(made, history, pairmill):
    out, status = pairmill("diff", "1", "9", "-c", made.config)
    assert (status, "'few' has no version '9'; versions: 1, 2, 3" in out) == (1, True)
    (history.dataset / "v000001/fates.parquet").write_bytes(b"PAR1")
    out, status = pairmill("diff", "1", "2", "-c", history.config)
    assert (status, "fates.parquet of version 1 is damaged" in out) == (1, True)


def test_without_the_build_s_tables_pairs_of_records_are_compared(history, pairmill):
    whole = json.loads(pairmill("diff", "1", "2", "-c", history.config, "--json").out)
    for path in (history.folder / "store/data").rglob("*.parquet"):
        path.unlink()
    found = json.loads(pairmill("diff", "1", "2", "-c", history.config, "--json").out)
    for level in ("object", "image", "record"):
        counts = [
            sum(row["count"] for row in one["changes"] if row["level"] == level)
            for one in (whole, found)
        ]
        assert counts[0] == counts[1]


def test_the_manifest_tells_the_same_counts(made, pairmill):
    found = json.loads(pairmill("diff", "1", "2", "-c", made.config, "--json").out)
    manifest = json.loads((made.dataset / "v000002/manifest.json").read_bytes())
    counted = [[r["level"], r["change"], r["reason"], r["count"]] for r in found["changes"]]
    assert manifest["since"]["changes"] == counted
    first = json.loads((made.dataset / "v000001/manifest.json").read_bytes())
    assert first["since"] is None


@pytest.mark.parametrize(
    ("level", "name", "shown"),
    [
        ("sample", "records/train.jsonl#12.2", "records/train.jsonl#12.2"),
        ("sample", "5" * 64, "555555555555"),
        ("image", "a" * 64, "a.jpg"),
        ("object", "5" * 64, "5" * 64),
    ],
)
def test_an_example_is_named_as_a_reader_knows_it(level, name, shown):
    row = {"level": level, "id": name, "other": None}
    assert _example(row, {"a" * 64: "a.jpg"}) == shown
