"""A refused night in Prefect: the state says why, and the artifacts hold the reasons."""

import asyncio
import json

import yaml

from infra.errors import Refused


def artifacts(key):
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

    async def read():
        async with get_client() as client:
            wanted = ArtifactFilter(key=ArtifactFilterKey(any_=[key]))
            return await client.read_artifacts(artifact_filter=wanted)

    return asyncio.run(read())


def test_state_artifacts_report_and_reasons(history, prefect_server):
    from flows.build import build
    from flows.config import parse_config

    data = yaml.safe_load(history.config.read_text("utf-8"))
    gates = {"min_records": 10_000, "min_band_occupancy": 1.0}
    changed = data | {"pairs": {"targets": 1}, "publish": {"gates": gates}}
    state = build(parse_config(changed), return_state=True)
    assert state.is_failed()
    assert "publish.gates.min_records is 10000, this build has" in state.message
    assert "latest still names version 3" in state.message
    refused = state.result(raise_on_failure=False)
    assert isinstance(refused, Refused)
    (reasons,) = artifacts("refused-reasons")
    assert reasons.data.count("\n- ") == len(refused.reasons) >= 2
    (link,) = artifacts("refused-link")
    assert str(history.dataset / "refused/report.html") in link.data
    report = (history.dataset / "refused/report.html").read_text("utf-8")
    assert "Nothing was published" in report
    assert "Since version 3" in report
    why = json.loads((history.dataset / "refused/reason.json").read_bytes())
    assert {row["gate"] for row in why["reasons"]} == {"min_records", "min_band_occupancy"}
    assert json.loads((history.dataset / "latest.json").read_bytes())["version"] == 3


def test_the_command_ends_with_status_3(history, prefect_server, pairmill):
    words = ("--set", "pairs.targets=1", "--set", "publish.gates.max_drop_records=0")
    out, status = pairmill("run", history.config, *words, "--json")
    assert status == 3, out
    last = json.loads(out.splitlines()[-1])
    assert last["stage"] == "publish"
    assert "publish.gates.max_drop_records is 0" in last["error"]
    assert last["report"] == str(history.dataset / "refused/report.html")
    assert last["refused"][0].startswith("publish.gates.max_drop_records is 0, this build has")
    assert not (history.dataset / "v000004").exists()
    assert "was refused by publish.gates.max_drop_records" in (
        pairmill("versions", "-c", history.config).out
    )
    report = pairmill("report", "refused", "-c", history.config).out.strip()
    assert report == last["report"]
    plan = pairmill("plan", history.config, *words[:2]).out
    assert "the last build was refused by publish.gates.max_drop_records" in plan
    assert "records to publish as a new version" in plan


def test_without_a_refused_build_there_is_no_report_of_one(made, pairmill):
    out, status = pairmill("report", "refused", "-c", made.config)
    assert (status, "no build of 'few' was refused since its last version" in out) == (1, True)
