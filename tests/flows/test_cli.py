"""The command line before any work: what Prefect is told, and one line for a mistake."""

import os
import subprocess
import sys

TELLING = """
import atexit
import logging
from flows.cli import app

def tell():
    from prefect.settings import get_current_settings
    print(get_current_settings().server.analytics_enabled)
    print({handler.level for handler in logging.getLogger().handlers} == {logging.CRITICAL})

atexit.register(tell)
app()
"""
CONFIG = """
recipe: recap
dataset: one
corpus: {uri: corpus}
store: {uri: store}
least_characters: 0
"""


def test_a_recipe_is_found_only_after_prefect_is_told_to_be_silent(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    told = {name: value for name, value in os.environ.items() if "PREFECT" not in name}
    ran = subprocess.run(
        [sys.executable, "-c", TELLING, "run", str(tmp_path / "config.yaml")],
        capture_output=True, text=True, env=told,
    )  # fmt: skip
    assert (ran.returncode, ran.stdout.split()) == (2, ["False", "True"])
    assert ran.stderr.count("\n") == 1 and "least_characters" in ran.stderr
