"""A bad night: nothing is published, and it can be found out why."""

import hashlib
import io
import json
from pathlib import Path

import polars as pl
import pytest

from infra.errors import Refused
from infra.versions import find_version
from tasks.publish import GateParams
from tests.tasks.test_publish import RECORDS, contents, publish_trees


def pq_bytes(columns):
    """A Parquet file that is whole and not what it should be."""
    buffer = io.BytesIO()
    pl.DataFrame(columns).write_parquet(buffer)
    return buffer.getvalue()


TOO_MANY = GateParams(min_records=4, max_drop_records=0.5, max_failures=0.1)


def refused_files(build):
    return {path.name: path for path in Path(build.store.uri, "datasets/trees/refused").glob("*")}


def test_a_refused_build_leaves_its_report_and_its_reasons(build):
    publish_trees(build)
    seen = []

    def report(manifest):
        seen.append(manifest)
        return b"<!doctype html>"

    with pytest.raises(Refused) as refused:
        publish_trees(build, contents(build, RECORDS[:1]), report=report, gates=TOO_MANY)
    assert refused.value.exit_code == 3
    assert refused.value.reasons == (
        "publish.gates.min_records is 4, this build has 1",
        "publish.gates.max_drop_records is 0.5, this build has 0.667: 1 after 3 in version 1",
        "publish.gates.max_failures is 0.1, this build has 0.200: 1 unreadable of 5 pictures",
    )
    assert "nothing was published, latest still names version 1" in str(refused.value)
    files = refused_files(build)
    assert refused.value.report == str(files["report.html"])
    assert str(refused.value).endswith(refused.value.report)
    why = json.loads(files["reason.json"].read_bytes())
    assert why["latest"] == 1
    assert why["reasons"][0] == {"gate": "min_records", "bound": 4, "found": 1, "said": "1"}
    assert (seen[0]["version"], seen[0]["refused"]) == (None, list(refused.value.reasons))


def test_the_last_refusal_takes_the_place_of_the_one_before(build):
    for records, said in ((RECORDS[:2], "2"), (RECORDS[:1], "1")):
        with pytest.raises(Refused, match="there is no version yet"):
            publish_trees(build, contents(build, records), gates=TOO_MANY)
        why = json.loads(refused_files(build)["reason.json"].read_bytes())
        assert why["reasons"][0]["said"] == said


def test_a_night_that_passes_clears_the_refusal(build):
    with pytest.raises(Refused):
        publish_trees(build, gates=TOO_MANY)
    assert publish_trees(build).number == 1
    assert refused_files(build) == {}


def test_a_night_with_nothing_new_clears_it_too(build):
    first = publish_trees(build)
    with pytest.raises(Refused):
        publish_trees(build, contents(build, RECORDS[:1]), gates=TOO_MANY)
    again = publish_trees(build)
    assert (again.number, again.fresh) == (first.number, False)
    assert refused_files(build) == {}


def test_gates_judge_what_would_be_published_not_what_is(build):
    publish_trees(build)
    again = publish_trees(build, gates=TOO_MANY)
    assert (again.number, again.fresh) == (1, False)


def test_a_refused_build_takes_no_number(build):
    publish_trees(build)
    with pytest.raises(Refused):
        publish_trees(build, contents(build, RECORDS[:1]), gates=TOO_MANY)
    assert publish_trees(build, contents(build, RECORDS[:1])).number == 2


def test_what_is_costly_is_measured_only_where_there_is_something_to_publish(build):
    from tasks.publish import PublishParams, publish
    from tests.tasks.test_publish import described

    asked = []

    def measure():
        asked.append(1)
        return {"occupied": {"look": 1}, "members": {"look": 4}}

    gates = GateParams(min_band_occupancy=0.5)
    arguments = ("trees", contents(build), described(), lambda _: b"")
    with pytest.raises(Refused, match=r"0\.250 in look: 1 of 4 images have a neighbour"):
        publish(build, *arguments, PublishParams(gates=gates), measure)
    publish(build, *arguments, PublishParams(), measure)
    publish(build, *arguments, PublishParams(), measure)
    assert len(asked) == 2
    assert find_version(build.store, "trees", "latest")["occupied"] == {"look": 1}


@pytest.mark.parametrize("body", [b"PAR1", pq_bytes({"level": ["image"]})])
def test_a_last_version_that_can_t_be_read_does_not_stop_the_next(build, body):
    publish_trees(build, contents(build, RECORDS[:1]))
    folder = Path(build.store.uri, "datasets/trees/v000001")
    (folder / "fates.parquet").write_bytes(body)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for file in manifest["files"]:
        if file["name"] == "fates.parquet":
            file["sha256"] = hashlib.sha256(body).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert publish_trees(build).number == 2
    since = find_version(build.store, "trees", "2")["since"]
    assert since["version"] == 1
    assert since["unreadable"]
