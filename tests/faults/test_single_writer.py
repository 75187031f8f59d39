"""A real server that overwrites and answers 200 whatever the condition: rclone serve s3."""

from typing import Any

from infra.store import Location, open_store
from tests.faults.buckets import config, content, published
from tests.faults.night import Night
from tests.infra.conftest import aws_environment, rclone_endpoint  # noqa: F401


def test_a_build_is_refused_unless_nobody_else_writes(corpus, expected, tmp_path, rclone_endpoint):  # noqa: F811
    where: dict[str, Any] = {
        **{"uri": "s3://corpus/store", "endpoint": rclone_endpoint, "region": "us-east-1"}
    }
    store = open_store(Location(**where))
    refused = Night(config(corpus, where), tmp_path / "told").end()
    assert refused.status == 2
    assert "does not keep conditional writes" in refused.said["error"]
    assert "set store.single_writer: true" in refused.said["error"]
    assert published(store) is None

    alone = config(corpus, where | {"single_writer": True})
    first = Night(alone, tmp_path / "told").end()
    assert (first.status, first.said["version"]) == (0, 1)
    assert content(published(store)) == expected
    again = Night(alone, tmp_path / "told").end()
    assert (again.status, again.said["version"], again.said["fresh"]) == (0, 1, False)
