"""Runs every recipe here on its sample corpus, offline: `make recipes`.

A scripted server of answers is started on a free port and stopped at the end; its words mean
nothing, so what this shows is the way of the samples, not what a model can do.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import make_records
import yaml

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# The server lies in the tests; recipes run in the checkout.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


@contextmanager
def server() -> Iterator[str]:
    """The URL of a scripted server, a process of its own."""
    command = [sys.executable, "-m", "tests.mllm_server", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        try:
            if process.stdout is None or not (url := process.stdout.readline().strip()):
                raise SystemExit("the scripted server did not start")
            yield url
        finally:
            process.terminate()


def endpoints(section: Mapping[str, Any], place: str = "") -> Iterator[str]:
    """The places in a config where an endpoint stands."""
    for key, value in section.items():
        if key == "endpoint":
            yield f"{place}{key}"
        elif isinstance(value, Mapping):
            yield from endpoints(value, f"{place}{key}.")


def run(config: Path, url: str) -> bool:
    """Run a recipe and say in one line what came of it; whether it succeeded."""
    places = endpoints(yaml.safe_load(config.read_text("utf-8")))
    changes = [part for place in places for part in ("--set", f"{place}.url={url}")]
    pairmill = Path(sys.executable).with_name("pairmill")
    command = [str(pairmill), "run", str(config), "--json", *changes]
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    lines = done.stdout.strip().splitlines()
    try:
        result = json.loads(lines[-1])
    except (IndexError, ValueError):
        result = {"error": done.stderr.strip()[-2_000:]}
    print(f"{config.stem:<14}{told(result)}; {time.monotonic() - start:.0f} s", flush=True)
    return done.returncode == 0


def told(result: Mapping[str, Any]) -> str:
    """A result in one line."""
    if "error" in result:
        return f"failed: {result['error']}"
    found = "fresh" if result["fresh"] else "unchanged"
    work = result.get("work", {}).get("labels_requested", 0)
    place = os.path.relpath(result["manifest"], ROOT)
    return f"{result['records']:>6,} records, {work:,} labels asked for, {found}: {place}"


def main() -> None:
    for recipe in make_records.recipes():
        make_records.write(recipe, HERE / "buckets" / recipe)
    with server() as url:
        done = [run(config, url) for config in sorted(HERE.glob("*.yaml"))]
    sys.exit(0 if all(done) else 1)


if __name__ == "__main__":
    main()
