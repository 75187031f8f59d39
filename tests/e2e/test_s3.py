"""The same build with corpus and store on an S3 server."""

import json

import boto3

from flows.answers import why
from flows.build import stages
from flows.config import load_config, open_build
from infra.store import Location, open_store
from tests.infra.conftest import aws_environment, moto_endpoint  # noqa: F401


def test_a_bucket_gives_the_digest_of_the_folder_it_was_copied_from(
    few,
    build,
    config_file,
    moto_endpoint,  # noqa: F811
):
    bucket = boto3.client("s3", endpoint_url=moto_endpoint, region_name="us-east-1")
    for path in sorted(p for p in few.rglob("*") if p.is_file()):
        key = f"e2e/pictures/{path.relative_to(few).as_posix()}"
        bucket.put_object(Bucket="corpus", Key=key, Body=path.read_bytes())
    place = {"endpoint": moto_endpoint, "region": "us-east-1"}
    path = config_file(
        few,
        corpus={"uri": "s3://corpus/e2e/pictures", **place},
        store={"uri": "s3://corpus/e2e/store", **place},
    )
    config = load_config(path)
    with open_build(config) as opened:
        result = stages(opened, config)
    assert result["manifest"] == "s3://corpus/e2e/store/datasets/few/v000001/manifest.json"
    assert result["digest"] == build(few)["digest"]
    store = open_store(Location(uri="s3://corpus/e2e/store", **place))
    manifest = json.loads(store.get("datasets/few/v000001/manifest.json"))
    assert json.loads(store.get("datasets/few/latest.json"))["digest"] == manifest["digest"]
    config_file(
        few,
        corpus={"uri": "s3://corpus/e2e/pictures", **place},
        store={"uri": "s3://corpus/e2e/store", **place},
    )
    lines = list(why(["captions.csv"], "latest", path, None, None))
    assert lines[1].split() == ["fate", "metadata,", "decided", "by", "snapshot"]
