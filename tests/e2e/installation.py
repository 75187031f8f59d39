"""A real Prefect server and worker, and what deployments.yaml declares for them."""

import csv
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

ROOT = Path(__file__).parents[2]
SERVER_SECONDS = 120
LEASES = "prefect.server.concurrency.lease_storage.filesystem"


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
            # As docs/prefect.md tells: a server that restarts must not forget who is at work.
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": LEASES,
        }

    def start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        with (self.home / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "prefect", *arguments],
                cwd=ROOT,
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def start_worker(self) -> subprocess.Popen[bytes]:
        return self.start("worker", "worker", "start", "--pool", "pairmill")

    def start_server(self) -> subprocess.Popen[bytes]:
        server = self.start("server", "server", "start", "--port", str(self.port), "--no-ui")
        deadline = time.monotonic() + SERVER_SECONDS
        while time.monotonic() < deadline and server.poll() is None:
            try:
                httpx.get(f"{self.environment['PREFECT_API_URL']}/health").raise_for_status()
                return server
            except httpx.HTTPError:
                time.sleep(0.2)
        pytest.fail((self.home / "server.log").read_text())

    @contextmanager
    def client(self) -> Iterator[SyncPrefectClient]:
        """A client of this server, whatever the settings of the process are."""
        with (
            temporary_settings({PREFECT_API_URL: self.environment["PREFECT_API_URL"]}),
            get_client(sync_client=True) as client,
        ):
            yield client

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

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """Kill -9 of a process and of all that it started."""
        with suppress(psutil.NoSuchProcess):
            parent = psutil.Process(process.pid)
            for one in [parent, *parent.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
        process.wait()
        self.processes.remove(process)

    def stop(self) -> None:
        # The worker first: it would wait for a server that is gone.
        for process in reversed([*self.processes]):
            self.kill(process)


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
    """Those of the sample's deployment, at other places and on threads."""
    places = {"corpus": {"uri": str(corpus)}, "store": {"uri": str(store)}}
    threads = {"kind": "threads", "workers": 2}
    return declared("sample", {**places, "dataset": "deployed", "cluster": threads})


def declared(deployment: str, changes: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a deployment, with other sections in its config."""
    found = yaml.safe_load((ROOT / "deployments.yaml").read_text())["deployments"]
    [config] = (d["parameters"]["config"] for d in found if d["name"] == deployment)
    return {"config": config | changes}
