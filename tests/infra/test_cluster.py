import os
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import dask
import pytest

from infra import cluster
from infra.cluster import ClusterParams, Crash, open_pool
from infra.errors import ConfigError, PairmillError

ROOT = Path(__file__).parents[2]


def double(shard: list[int]) -> list[int]:
    return [2 * number for number in shard]


def poisoned(shard: list[int], poison: int) -> list[int]:
    if poison in shard:
        os.kill(os.getpid(), signal.SIGKILL)
    return double(shard)


def killed_once(shard: list[int], marker: str) -> list[int]:
    if shard == [3] and not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return double(shard)


def fails(shard: list[int]) -> list[int]:
    if 5 in shard:
        raise KeyError("five")
    time.sleep(0.01)
    return shard


def environment(name: str) -> str | None:
    return os.environ.get(name)


def halves(shard: list[int]) -> list[list[int]]:
    middle = len(shard) // 2
    return [part for part in (shard[:middle], shard[middle:]) if part]


@pytest.fixture(scope="module")
def pool():
    with open_pool(ClusterParams(workers=2)) as pool:
        yield pool


@pytest.fixture(params=["threads", "local"])
def any_pool(request, pool):
    if request.param == "local":
        yield pool
    else:
        with open_pool(ClusterParams(kind="threads", workers=2)) as threads:
            yield threads


def test_every_shard_has_its_result(any_pool):
    shards = [[n, n + 1] for n in range(100)]
    results = list(any_pool.map(double, shards))
    assert sorted(results) == [(shard, double(shard)) for shard in shards]


def test_nothing_starts_without_a_shard():
    program = (
        "import sys; from infra.cluster import ClusterParams, open_pool\n"
        "with open_pool(ClusterParams()) as pool: assert list(pool.map(print, [])) == []\n"
        "assert 'distributed' not in sys.modules and 'dask' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_shards_are_read_only_as_far_as_needed(any_pool):
    read = 0

    def shards():
        nonlocal read
        for n in range(50):
            read += 1
            yield [n]

    for finished, _ in enumerate(any_pool.map(double, shards())):
        assert read - finished <= 2 * 2  # workers x in_flight
    assert read == 50


def test_an_exception_ends_the_map(any_pool):
    with pytest.raises(KeyError, match="five"):
        list(any_pool.map(fails, ([n] for n in range(1000))))
    assert list(any_pool.map(double, [[1]])) == [([1], [2])]


def test_a_killed_worker_costs_a_retry(pool, tmp_path):
    fn = partial(killed_once, marker=str(tmp_path / "killed"))
    assert sorted(pool.map(fn, [[n] for n in range(8)])) == [([n], [2 * n]) for n in range(8)]


def test_a_shard_that_kills_is_bisected_to_the_element_that_does_it(pool, caplog):
    shards = [list(range(n, n + 4)) for n in range(0, 24, 4)]
    results = list(pool.map(partial(poisoned, poison=13), shards, split=halves))
    crashes = [shard for shard, result in results if isinstance(result, Crash)]
    assert crashes == [[13]]
    done = [number for shard, result in results if result == double(shard) for number in shard]
    assert sorted(done) == [n for n in range(24) if n != 13]
    assert "poisoned killed 2 workers, also when alone; given up" in caplog.messages


def test_a_shard_that_cannot_be_split_is_a_crash(pool):
    results = dict(pool.map(partial(poisoned_text, poison="b"), ["a", "b", "c"]))
    assert results == {"a": "A", "b": Crash("poisoned_text killed 2 workers"), "c": "C"}


def poisoned_text(shard: str, poison: str) -> str:
    return poisoned([1], int(shard == poison)) and shard.upper()


def test_workers_share_the_cores_and_the_driver_keeps_its_own(pool):
    from dask.system import CPU_COUNT

    names = ["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"]
    share = str(max(1, CPU_COUNT // 2))
    with open_pool(ClusterParams(workers=2)) as fresh:
        assert dict(fresh.map(environment, names)) == dict.fromkeys(names, share)
        own = cluster._ENVIRONMENT["OPENBLAS_NUM_THREADS"]
        assert environment("OPENBLAS_NUM_THREADS") == own


def test_a_cluster_says_nothing_to_the_handlers_of_others(caplog):
    caplog.set_level("INFO")
    with open_pool(ClusterParams(workers=1)) as fresh:
        assert dict(fresh.map(double, [(1,)])) == {(1,): [2]}
    assert [record for record in caplog.records if record.name.startswith("distributed")] == []


def test_what_an_earlier_cluster_left_in_the_environment_binds_no_later_one(monkeypatch):
    from dask.system import CPU_COUNT

    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "7")
    with open_pool(ClusterParams(workers=1)) as fresh:
        [(_, threads)] = fresh.map(environment, ["OPENBLAS_NUM_THREADS"])
    assert threads == str(CPU_COUNT)


def test_threads_run_in_this_process():
    with open_pool(ClusterParams(kind="threads", workers=1)) as threads:
        [(_, name)] = threads.map(lambda _: threading.current_thread().name, [0])
    assert name.startswith("shard")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"kind": "address"}, "give it with `kind: address`"),
        ({"address": "tcp://127.0.0.1:8786"}, "give it with `kind: address`"),
        ({"kind": "address", "address": "10.0.0.7:8786"}, "write tls://host:port"),
        ({"kind": "address", "address": "tcp://10.0.0.7"}, "write tls://host:port"),
        ({"kind": "address", "address": "tcp://10.0.0.7:8786"}, "is not encrypted"),
        ({"kind": "address", "address": "tcp://gpu.example.com:8786"}, "allow_plain_tcp"),
    ],
)
def test_an_address_that_does_not_fit_is_refused(params, message):
    with pytest.raises(ConfigError, match=message):
        ClusterParams(**params)


@pytest.mark.parametrize(
    "params",
    [
        {"address": "tcp://localhost:8786"},
        {"address": "tcp://[::1]:8786"},
        {"address": "tls://10.0.0.7:8786"},
        {"address": "tcp://10.0.0.7:8786", "allow_plain_tcp": True},
    ],
)
def test_an_address_that_is_safe_or_allowed_is_taken(params):
    assert ClusterParams(kind="address", **params).address == params["address"]


def test_a_missing_scheduler_is_one_line(monkeypatch):
    monkeypatch.setattr("infra.cluster.CONNECT_SECONDS", 1)
    address = f"tcp://127.0.0.1:{free_port()}"
    with (
        pytest.raises(PairmillError, match="No Dask scheduler answers at tcp://127"),
        open_pool(ClusterParams(kind="address", address=address)) as pool,
    ):
        list(pool.map(double, [[1]]))


def test_cuda_without_dask_cuda_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "dask_cuda", None)
    with (
        pytest.raises(ConfigError, match="pip install"),
        open_pool(ClusterParams(kind="cuda")) as pool,
    ):
        list(pool.map(double, [[1]]))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Machine:
    """A scheduler and its workers in processes of their own, as on other hosts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen] = []
        self.address = f"tcp://127.0.0.1:{free_port()}"

    def scheduler(self, path: Path = ROOT) -> "Machine":
        return self._start(path, "scheduler", "--no-dashboard", "--port", self.port)

    def worker(self, path: Path = ROOT, *options: str) -> "Machine":
        folder = ("--local-directory", str(self.folder), "--no-dashboard", "--nthreads", "1")
        return self._start(path, "worker", self.address, "--no-nanny", *folder, *options)

    @property
    def port(self) -> str:
        return self.address.rpartition(":")[2]

    def _start(self, path: Path, *command: str) -> "Machine":
        self.processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "dask", *command],
                cwd=self.folder,
                env=os.environ | {"PYTHONPATH": str(path)},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )
        return self

    def params(self) -> ClusterParams:
        return ClusterParams(kind="address", address=self.address)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def machine(tmp_path):
    machine = Machine(tmp_path)
    yield machine
    machine.stop()


@pytest.fixture
def foreign(tmp_path) -> Path:
    """A path on which `tasks` is somebody else's."""
    for name in ("flows", "tasks", "infra"):
        (tmp_path / "foreign" / name).mkdir(parents=True)
        (tmp_path / "foreign" / name / "__init__.py").write_text("'Another package.'\n")
    return tmp_path / "foreign"


def test_a_scheduler_that_runs_this_build_is_used(machine):
    machine.scheduler().worker()
    with open_pool(machine.params()) as pool:
        assert dict(pool.map(abs, [-1, -2])) == {-1: 1, -2: 2}


def test_a_worker_with_other_code_is_refused(machine, foreign):
    machine.scheduler().worker(foreign)
    with (
        pytest.raises(PairmillError, match=r"^Dask worker tcp://127.* another package `flows` \("),
        open_pool(machine.params()) as pool,
    ):
        list(pool.map(abs, [-1]))


def test_a_scheduler_with_other_code_is_refused(machine, foreign):
    machine.scheduler(foreign).worker()
    with (
        pytest.raises(PairmillError, match=r"^Dask scheduler has another package"),
        open_pool(machine.params()) as pool,
    ):
        list(pool.map(abs, [-1]))


def test_a_worker_with_other_code_that_joins_later_is_refused(machine, foreign):
    machine.scheduler().worker()
    with (
        pytest.raises(PairmillError, match="runs other code than this build"),
        open_pool(machine.params()) as pool,
    ):
        assert list(pool.map(abs, [-1])) == [(-1, 1)]
        machine.worker(foreign)
        machine.processes[1].kill()
        list(pool.map(abs, [-1]))


def test_a_resource_that_no_worker_offers_is_refused(machine):
    machine.scheduler().worker(ROOT, "--resources", "GPU=1")
    with open_pool(machine.params()) as pool:
        assert list(pool.map(abs, [-1], resources={"GPU": 1})) == [(-1, 1)]
        with pytest.raises(ConfigError, match="no worker offers GPU=2"):
            list(pool.map(abs, [-1], resources={"GPU": 2}))


def test_workers_end_with_a_driver_that_is_killed(tmp_path):
    program = (
        "import os, signal; from infra.cluster import ClusterParams, open_pool\n"
        "def pid(shard): return os.getpid()\n"
        "if __name__ == '__main__':\n"
        "    with open_pool(ClusterParams(workers=1)) as pool:\n"
        "        [(_, worker)] = pool.map(pid, [0])\n"
        "        print(worker, flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    (tmp_path / "driver.py").write_text(program)
    driver = subprocess.run(
        [sys.executable, tmp_path / "driver.py"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    worker = Path("/proc", driver.stdout.strip(), "cmdline")
    while worker.exists() and worker.read_bytes():
        time.sleep(0.1)


def test_a_lost_scheduler_ends_the_map(machine, monkeypatch):
    monkeypatch.setattr("infra.cluster.TICK_SECONDS", 1)
    machine.scheduler().worker()
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "1s"}),
        pytest.raises(PairmillError, match="Lost the Dask scheduler"),
        open_pool(machine.params()) as pool,
    ):
        for _ in pool.map(time.sleep, [0.2] * 50):
            machine.processes[0].kill()
