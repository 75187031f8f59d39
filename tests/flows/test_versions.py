"""Which versions there are, and whether one is whole."""

import json

import pytest


def manifest_of(history, number):
    return json.loads((history.dataset / f"v{number:06d}/manifest.json").read_bytes())


def test_versions_are_listed_with_what_changed(made, pairmill):
    out, status = pairmill("versions", "-c", made.config)
    lines = out.splitlines()
    assert status == 0
    assert " ".join(lines[0].split()) == "version date digest records images size what changed"
    assert lines[1].split()[0] == "1"
    assert lines[1].endswith("first".ljust(len(lines[1]) - lines[1].index("first")))
    assert manifest_of(made, 2)["digest"][:12] in lines[2]
    assert "+2 images, \N{MINUS SIGN}2 images" in lines[2]
    assert "pairs.targets" in lines[3]
    assert lines[4] == "latest is version 3"


def test_versions_as_json(made, pairmill):
    rows = json.loads(pairmill("versions", "-c", made.config, "--json").out)
    assert [row["number"] for row in rows] == [1, 2, 3]
    assert [row["state"] for row in rows] == ["", "", "latest"]
    assert rows[2]["digest"] == manifest_of(made, 3)["digest"]
    assert rows[2]["bytes"] == sum(f["bytes"] for f in manifest_of(made, 3)["files"])


def test_a_withdrawn_version_is_listed_with_its_reason(history, pairmill):
    folder = history.dataset / "v000002"
    digest = manifest_of(history, 2)["digest"]
    for path in folder.rglob("*.*"):
        path.unlink()
    said = {"number": 2, "digest": digest, "reason": "purge of 3 images"}
    (folder / "withdrawn.json").write_text(json.dumps(said))
    assert "withdrawn: purge of 3 images" in pairmill("versions", "-c", history.config).out
    for words in (("why", history.keys[0], "--version", "2"), ("diff", "2", "3"), ("verify", "2")):
        out, status = pairmill(*words, "-c", history.config)
        assert status == 1
        assert "version 2 of 'few' was withdrawn: purge of 3 images" in out


def test_a_damaged_manifest_is_listed_as_such(history, pairmill):
    (history.dataset / "v000002/manifest.json").write_text("{")
    assert "damaged manifest" in pairmill("versions", "-c", history.config).out
    out, status = pairmill("verify", "2", "-c", history.config)
    assert status == 1
    assert "the manifest of version 2 of 'few'" in out


def test_before_the_first_version_there_is_nothing_to_list(tmp_path, pairmill):
    out, status = pairmill("versions", "--store", tmp_path, "--dataset", "none")
    assert status == 1
    assert "has no published version of 'none'; run a build first" in out


def test_a_whole_version_verifies(made, pairmill):
    for version in ("1", "latest", manifest_of(made, 2)["digest"][:10]):
        out, status = pairmill("verify", version, "-c", made.config)
        assert (status, "is whole" in out) == (0, True), out


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (lambda f: flip(f / "report.html"), "report.html: SHA-256 is"),
        (lambda f: flip(f / "records/train.parquet"), "records/train.parquet: SHA-256 is"),
        (lambda f: (f / "README.md").unlink(), "README.md: gone"),
        (lambda f: (f / "README.md").write_bytes(b""), "README.md: 0 bytes, the manifest has"),
        (lambda f: (f / "more.txt").write_text(""), "more.txt: not named by the manifest"),
    ],
)
def test_harm_to_a_file_is_found(history, pairmill, harm, problem):
    harm(history.dataset / "v000003")
    out, status = pairmill("verify", "-c", history.config)
    assert status == 1
    assert problem in out
    assert "version 3 of few is not whole" in out


def test_a_digest_that_is_not_that_of_the_rows_is_found(history, pairmill):
    path = history.dataset / "v000003/manifest.json"
    manifest = json.loads(path.read_bytes())
    path.write_text(json.dumps({**manifest, "digest": "0" * 64}))
    out, status = pairmill("verify", "3", "-c", history.config)
    assert status == 1
    assert "records and fates have the digest" in out
    assert "latest.json: digest is" in out


def test_a_table_of_the_build_that_is_gone_is_found(history, pairmill):
    shard = manifest_of(history, 3)["tables"]["mine_pairs"]["pairs"]["shards"][0][0]
    (history.folder / f"store/data/{shard[:2]}/{shard}.parquet").unlink()
    out, status = pairmill("verify", "-c", history.config)
    assert status == 1
    assert f"shard {shard[:12]} of table pairs: gone" in out
