"""A real Prefect server and worker run what deployments.yaml declares."""

import csv
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from infra.store import Location, open_store
from infra.versions import find_version

ROOT = Path(__file__).parents[2]
SERVER_SECONDS = 120


class Prefect:
    """A Prefect installation of its own: its home, its server, its commands."""

    def __init__(self, home: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.home = home
        self.processes: list[subprocess.Popen[bytes]] = []
        self.environment = os.environ | {
            "PREFECT_HOME": str(home),
            "PREFECT_API_URL": f"http://127.0.0.1:{self.port}/api",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
        }

    def start(self, name: str, *arguments: str, **environment: str) -> None:
        with (self.home / f"{name}.log").open("wb") as log:
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "prefect", *arguments],
                    cwd=ROOT,
                    env=self.environment | environment,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )

    def start_server(self) -> None:
        self.start("server", "server", "start", "--port", str(self.port), "--no-ui")
        deadline = time.monotonic() + SERVER_SECONDS
        while time.monotonic() < deadline and self.processes[-1].poll() is None:
            try:
                httpx.get(f"{self.environment['PREFECT_API_URL']}/health").raise_for_status()
                return
            except httpx.HTTPError:
                time.sleep(0.2)
        pytest.fail((self.home / "server.log").read_text())

    def run(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "prefect", *arguments],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        logs = "\n".join(path.read_text() for path in self.home.glob("worker*.log"))
        assert done.returncode == 0, done.stdout + logs
        return done.stdout

    def stop(self) -> None:
        # The worker first: it would wait for a server that is gone.
        for process in reversed(self.processes):
            process.kill()
            process.wait()


@pytest.fixture
def prefect(tmp_path: Path) -> Iterator[Prefect]:
    (tmp_path / "prefect").mkdir()
    installation = Prefect(tmp_path / "prefect")
    try:
        installation.start_server()
        yield installation
    finally:
        installation.stop()


def small_corpus(folder: Path, pictures: int) -> Path:
    """The first pictures of the sample bucket, with their captions."""
    bucket = ROOT / "sample" / "bucket"
    with (bucket / "captions.csv").open(newline="") as source:
        rows = [row for row, _ in zip(csv.DictReader(source), range(pictures), strict=False)]
    for row in rows:
        target = folder / row["file_name"]
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(bucket / row["file_name"], target)
    with (folder / "captions.csv").open("w", newline="") as target:
        writer = csv.DictWriter(target, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder


def sample_parameters(corpus: Path, store: Path) -> dict[str, Any]:
    declared = yaml.safe_load((ROOT / "deployments.yaml").read_text())
    config = next(d for d in declared["deployments"] if d["name"] == "sample")["parameters"][
        "config"
    ]
    changes = {
        "dataset": "deployed",
        "corpus": {"uri": str(corpus)},
        "store": {"uri": str(store)},
        "cluster": {"kind": "threads", "workers": 2},
    }
    return {"config": config | changes}


@pytest.mark.timeout(420)
def test_the_sample_deployment_publishes_a_version(prefect: Prefect, tmp_path: Path) -> None:
    prefect.run("work-pool", "create", "pairmill", "--type", "process")
    prefect.run("--no-prompt", "deploy", "--all", "--prefect-file", "deployments.yaml")
    prefect.start("worker", "worker", "start", "--pool", "pairmill")

    corpus, store = small_corpus(tmp_path / "corpus", pictures=80), tmp_path / "store"
    parameters = json.dumps(sample_parameters(corpus, store))
    told = prefect.run("deployment", "run", "build/sample", "--watch", "--params", parameters)

    assert "Completed" in told
    manifest = find_version(open_store(Location(uri=str(store))), "deployed", "latest")
    assert manifest["version"] == 1
    assert manifest["counts"]["records"] > 0
