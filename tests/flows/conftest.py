import os

import pytest

from flows.step import prefect_environment

# Before any test module imports Prefect, which reads its settings then.
os.environ.update(prefect_environment() | os.environ)


@pytest.fixture(scope="session")
def prefect_server():
    """A Prefect server with a fresh database, for every flow that a test runs."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield
