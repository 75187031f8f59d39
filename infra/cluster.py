"""Pools: one `map` over shards, on Dask (this machine, its GPUs, any scheduler) or on threads.

Nothing is started, and `distributed` is not imported, before the first shard is there to run.
"""

import builtins
import ipaddress
import logging
import os
import pickle
import queue
import tempfile
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache
from itertools import chain, islice
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, Self, TypeVar
from urllib.parse import urlsplit
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field, model_validator

from infra.errors import ConfigError, PairmillError

if TYPE_CHECKING:
    from distributed import Client, Future

log = logging.getLogger(__name__)

Item = TypeVar("Item")

PACKAGES = ("flows", "tasks", "infra")
CONNECT_SECONDS = 60
CHECK_SECONDS = 30
TICK_SECONDS = 5
START_ATTEMPTS = 3
WORKER_BYTES = 2 << 30


class ClusterParams(BaseModel):
    """Where shards run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["local", "threads", "cuda", "address"] = Field(
        "local",
        description="`local`: Dask processes on this machine. `threads`: threads of this process; "
        "an image that kills its decoder then kills the build. `cuda`: one Dask process per GPU "
        "(dask-cuda). `address`: a running Dask scheduler.",
    )
    address: str | None = Field(
        None, description="Scheduler of kind `address`: `tls://host:port` or `tcp://host:port`."
    )
    allow_plain_tcp: bool = Field(
        False,
        description="Allow `tcp://` beyond loopback. Whoever reaches a plain scheduler runs code "
        "on it, so the network must be closed.",
    )
    workers: int | None = Field(
        None,
        ge=1,
        description="Worker processes (or threads) on this machine; by default one per core that "
        "this process may use, with at least 2 GiB of memory each.",
    )
    threads_per_worker: int = Field(
        1,
        ge=1,
        le=64,
        description="Shards a worker runs at once. With more than one, a crash costs its "
        "neighbours a retry.",
    )
    memory_limit: str | None = Field(
        None,
        description="Memory of one local worker, such as `4GiB`; one that passes it is restarted. "
        "By default an equal part of 80 % of the machine's.",
    )
    in_flight: int = Field(
        2, ge=1, le=64, description="Shards sent out per worker thread: one runs, the rest wait."
    )
    dashboard: bool = Field(
        False, description="Serve Dask's dashboard of a local cluster on a free loopback port."
    )

    @model_validator(mode="after")
    def _address_fits(self) -> Self:
        _check_address(self)
        return self


class Crash(NamedTuple):
    """What became of a shard that killed every worker which ran it."""

    reason: str


class Pool(Protocol):
    """Runs a function over shards. Several threads may map at once."""

    def map(
        self,
        fn: Callable[[Any], Any],
        shards: Iterable[Any],
        *,
        split: Callable[[Any], list[Any]] | None = None,
        resources: dict[str, float] | None = None,
    ) -> Iterator[tuple[Any, Any]]:
        """Yield (shard, fn(shard)) as they complete, reading `shards` only as far as needed.

        `fn` is a module-level function, or a `functools.partial` of one. A shard that kills
        its worker twice is replaced by the parts that `split` gives; one that `split` gives
        fewer than two parts of is run alone, and yields (shard, Crash) if it kills again.
        An exception in `fn` is raised here at once, and what is still in flight is dropped.
        """
        ...


def halves(shard: tuple[Item, ...]) -> list[tuple[Item, ...]]:
    """For `split`: the halves of a shard, or itself where it holds one thing."""
    half = (len(shard) + 1) // 2
    return [shard[:half], shard[half:]] if shard[half:] else [shard]


@contextmanager
def open_pool(params: ClusterParams) -> Iterator[Pool]:
    """A pool that starts on first use and is gone at the end of the `with` block.

    Raises PairmillError where a cluster can't be reached, or runs other code than this build.
    """
    with ExitStack() as stack:
        yield ThreadPool(params, stack) if params.kind == "threads" else DaskPool(params, stack)


class ThreadPool:
    """Threads of this process. There is no isolation: a crash in `fn` ends the process."""

    def __init__(self, params: ClusterParams, stack: ExitStack) -> None:
        self._params = params
        self._stack = stack
        self._executor: ThreadPoolExecutor | None = None
        self._starting = Lock()

    def map(
        self,
        fn: Callable[[Any], Any],
        shards: Iterable[Any],
        *,
        split: Callable[[Any], list[Any]] | None = None,
        resources: dict[str, float] | None = None,
    ) -> Iterator[tuple[Any, Any]]:
        """As `Pool.map`; nothing crashes apart from the process, so `split` is not called."""
        waiting = iter(shards)
        workers = self._params.workers or _default_workers()
        running: dict[Any, Any] = {}
        try:
            while True:
                for shard in islice(waiting, workers * self._params.in_flight - len(running)):
                    running[self._start(workers).submit(fn, shard)] = shard
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    shard = running.pop(future)
                    with _named(shard):
                        result = future.result()
                    yield shard, result
        finally:
            for future in running:
                future.cancel()

    def _start(self, workers: int) -> ThreadPoolExecutor:
        with self._starting:
            if self._executor is None:
                self._executor = self._stack.enter_context(ThreadPoolExecutor(workers, "shard"))
        return self._executor


class DaskPool:
    """A Dask cluster: started here, or reached by its address."""

    def __init__(self, params: ClusterParams, stack: ExitStack) -> None:
        self._params = params
        self._stack = stack
        self._client: Client | None = None
        self._digest = ""
        self._starting = Lock()

    def map(
        self,
        fn: Callable[[Any], Any],
        shards: Iterable[Any],
        *,
        split: Callable[[Any], list[Any]] | None = None,
        resources: dict[str, float] | None = None,
    ) -> Iterator[tuple[Any, Any]]:
        """As `Pool.map`. `resources` bind on GPU clusters and foreign schedulers only."""
        waiting = iter(shards)
        for first in waiting:
            client = self._connect()
            needs = None if self._params.kind == "local" else resources
            _check_resources(client, needs or {})
            flight = _Flight(client, fn, self._digest, needs, self._params.in_flight)
            try:
                yield from _drain(flight, chain([first], waiting), split or _whole)
            finally:
                flight.cancel()

    def _connect(self) -> "Client":
        with self._starting:
            if self._client is None:
                cluster = self._stack.enter_context(_CLUSTERS[self._params.kind](self._params))
                self._client = self._stack.enter_context(_connected(cluster))
                self._digest = _check_code(self._client)
        return self._client


def _drain(
    flight: "_Flight", shards: Iterator[Any], split: Callable[[Any], list[Any]]
) -> Iterator[tuple[Any, Any]]:
    """Run shards, what is left of those that kill their workers, and suspects alone, in the end.

    Dask blames every shard that a dead worker held, the ones that only waited there too. Being
    split does an innocent shard no harm; but none is given up before it has killed while alone.
    """
    suspects: deque[Any] = deque()
    alone = False
    while True:
        if not suspects:
            flight.fill(shards)
        elif not flight.running:
            alone = True
            flight.send(suspects.popleft())
        if not flight.running:
            return
        shard, result = flight.take()
        if not isinstance(result, Crash):
            yield shard, result
        elif len(parts := split(shard)) > 1:
            log.warning("%s; trying its %d parts", result.reason, len(parts))
            shards = chain(parts, shards)
        elif alone:
            log.warning("%s, also when alone; given up", result.reason)
            yield shard, result
        else:
            suspects.append(shard)
        alone = False


class _Flight:
    """The shards of one `map` that are with the cluster: as many as keep it busy, no more."""

    def __init__(
        self,
        client: "Client",
        fn: Callable[[Any], Any],
        digest: str,
        resources: dict[str, float] | None,
        per_thread: int,
    ) -> None:
        self.running: dict[str, tuple[Future[Any], Any]] = {}
        self._client = client
        self._fn = fn
        self._digest = digest
        self._name = getattr(getattr(fn, "func", fn), "__name__", "shard")
        self._resources = resources
        self._per_thread = per_thread
        self._width = per_thread * _threads(client)
        self._done: queue.SimpleQueue[str] = queue.SimpleQueue()

    def fill(self, shards: Iterator[Any]) -> None:
        for shard in islice(shards, max(0, self._width - len(self.running))):
            self.send(shard)

    def send(self, shard: Any) -> None:
        import cloudpickle

        # Bytes, so that neither the scheduler nor a foreign worker fails (or hangs) unpickling.
        key = f"{self._name}-{uuid4().hex}"
        future = self._client.submit(
            _portable(_guarded),
            cloudpickle.dumps((self._fn, shard)),
            self._digest,
            key=key,
            resources=self._resources,
            pure=False,
        )
        self.running[key] = (future, shard)
        future.add_done_callback(lambda _: self._done.put(key))

    def take(self) -> tuple[Any, Any]:
        """The next finished shard and its result, or Crash; raises what `fn` raised."""
        while True:
            try:
                future, shard = self.running.pop(self._done.get(timeout=TICK_SECONDS))
            except queue.Empty:
                self._width = self._per_thread * _threads(self._client)
            else:
                with _named(shard):
                    return shard, self._result(future)

    def cancel(self) -> None:
        if self.running and self._client.status == "running":
            self._client.cancel([future for future, _ in self.running.values()], force=True)

    def _result(self, future: "Future[Any]") -> Any:
        from distributed import CancelledError, KilledWorker

        try:
            verdict, result = future.result()
        except KilledWorker as error:
            return Crash(f"{self._name} killed {error.allowed_failures + 1} workers")
        except CancelledError as error:
            raise PairmillError(_LOST) from error
        if verdict == "foreign":
            raise PairmillError(result)
        return result


@contextmanager
def _named(shard: Any) -> Iterator[None]:
    """An exception in a shard leaves with that shard's name as its attribute `shard`."""
    try:
        yield
    except Exception as error:
        error.shard = str(shard)[:120]  # type: ignore[attr-defined]
        raise


_LOST = "Lost the Dask scheduler in mid-run; see its log, and run again: what was done is kept."


def _whole(shard: Any) -> list[Any]:
    return [shard]


def _threads(client: "Client") -> int:
    """Worker threads in the cluster, at least one; waits for a first worker, but not for ever."""
    if client.status != "running":
        raise PairmillError(_LOST)
    if threads := sum(client.nthreads().values()):
        return threads
    try:
        client.wait_for_workers(1, timeout=CONNECT_SECONDS)
    except TimeoutError as error:
        raise PairmillError(
            f"The Dask scheduler has had no worker for {CONNECT_SECONDS} s; start workers, "
            "and see their logs if they end."
        ) from error
    return sum(client.nthreads().values()) or 1


# Clusters ------------------------------------------------------------------------------------


def _default_workers() -> int:
    """One worker per core that this process may use, with 2 GiB of memory each."""
    from dask.system import CPU_COUNT
    from distributed.system import MEMORY_LIMIT

    return max(1, min(CPU_COUNT, MEMORY_LIMIT // WORKER_BYTES))


@contextmanager
def _local_cluster(params: ClusterParams) -> Iterator[Any]:
    """Worker processes on this machine, each with its part of the cores and the memory.

    They speak TLS with a key of this run, so that no other user of the machine can join in.
    """
    from distributed import LocalCluster
    from distributed.system import MEMORY_LIMIT

    workers = params.workers or _default_workers()
    memory = params.memory_limit or int(0.8 * MEMORY_LIMIT) // workers
    options = {"n_workers": workers, "memory_limit": memory, "security": True}
    with _started(LocalCluster, params, workers, **options) as cluster:
        yield cluster


@contextmanager
def _cuda_cluster(params: ClusterParams) -> Iterator[Any]:
    """One worker process per visible GPU, offering the resource GPU: 1."""
    try:
        from dask_cuda import LocalCUDACluster
        from dask_cuda.utils import get_n_gpus
    except ImportError as error:
        raise ConfigError(
            "cluster.kind is `cuda`, but dask-cuda is not installed: pip install 'pairmill[cuda]'"
        ) from error

    workers = params.workers or get_n_gpus()
    options = {"n_workers": workers, "resources": {"GPU": 1}}
    if params.memory_limit:
        options["memory_limit"] = params.memory_limit
    with _started(LocalCUDACluster, params, workers, **options) as cluster:
        yield cluster


@contextmanager
def _started(
    kind: Callable[..., Any], params: ClusterParams, workers: int, **options: Any
) -> Iterator[Any]:
    """A quiet cluster of `kind` on loopback; its files go when it ends."""
    import dask
    from dask.system import CPU_COUNT

    threads = str(max(1, CPU_COUNT // workers // params.threads_per_worker))
    with ExitStack() as stack:
        stack.enter_context(_silent("distributed"))
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="pairmill-"))
        stack.enter_context(dask.config.set(_worker_config(threads)))
        with _kept_environment():
            cluster = _up(
                kind,
                threads_per_worker=params.threads_per_worker,
                host="127.0.0.1",
                dashboard_address="127.0.0.1:0",
                scheduler_kwargs={"dashboard": params.dashboard},
                local_directory=folder,
                silence_logs=logging.CRITICAL,
                **options,
            )
        yield stack.enter_context(cluster)


@contextmanager
def _silent(name: str) -> Iterator[None]:
    """No words of a library, whoever's handlers they would reach: `silence_logs` knows its own."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _up(kind: Callable[..., Any], **options: Any) -> Any:
    """A cluster that has started; Dask gives one up whose worker dies while it starts."""
    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            return kind(**options)
        except RuntimeError as error:
            cause = error
            log.warning("a Dask worker ended while it started (attempt %d)", attempt)
    raise PairmillError(
        f"Dask workers end while they start ({START_ATTEMPTS} attempts): see the log of the "
        "machine, or give them more memory (cluster.memory_limit, fewer cluster.workers)"
    ) from cause


@contextmanager
def _address(params: ClusterParams) -> Iterator[Any]:
    yield params.address


_CLUSTERS: dict[str, Callable[[ClusterParams], AbstractContextManager[Any]]] = {
    "local": _local_cluster,
    "cuda": _cuda_cluster,
    "address": _address,
}


def _worker_config(threads: str) -> dict[str, Any]:
    return {
        "distributed.scheduler.allowed-failures": 1,
        # After 15 s Dask would give up a worker that restarts slowly on a busy machine.
        "distributed.deploy.lost-worker-timeout": "1 hour",
        "distributed.worker.multiprocessing-method": "spawn",
        # NumPy is imported before `environ` is read, so its BLAS is limited before the start.
        "distributed.nanny.pre-spawn-environ": {
            "MALLOC_TRIM_THRESHOLD_": 65536,
            "OPENBLAS_NUM_THREADS": threads,
        },
        "distributed.nanny.environ": {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
    }


# As it was before any cluster: a nanny that starts a worker anew changes it long afterwards.
_ENVIRONMENT = {
    name: os.environ.get(name)
    for name in ("MALLOC_TRIM_THRESHOLD_", "OPENBLAS_NUM_THREADS", "PYTHONHASHSEED")
}


@contextmanager
def _kept_environment() -> Iterator[None]:
    """Undo what a nanny leaves in this process when it starts a worker.

    Otherwise FAISS or PyTorch, imported here later, would run on a worker's share of the cores, and
    the next cluster's workers on that of this one.
    """
    _restore_environment()
    try:
        yield
    finally:
        _restore_environment()


def _restore_environment() -> None:
    for name, value in _ENVIRONMENT.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _check_address(params: ClusterParams) -> None:
    """Raise ConfigError where `kind` and `address` don't belong together, or it isn't safe."""
    if (params.kind == "address") != (params.address is not None):
        raise ConfigError("cluster.address: give it with `kind: address`, and only then")
    if params.address is None:
        return
    url = urlsplit(params.address)
    if url.scheme not in ("tcp", "tls") or not url.hostname or not url.port:
        raise ConfigError("cluster.address: write tls://host:port or tcp://host:port")
    if url.scheme == "tcp" and not _is_loopback(url.hostname) and not params.allow_plain_tcp:
        raise ConfigError(
            f"cluster.address: tcp://{url.hostname} is not encrypted and lets anybody who reaches "
            "it run code; use tls://, or set `allow_plain_tcp: true` in a closed network"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_resources(client: "Client", resources: dict[str, float]) -> None:
    """Raise ConfigError where no worker has the resources, since Dask would wait for ever."""
    if not resources:
        return
    workers = client.scheduler_info()["workers"].values()
    offered = [worker.get("resources", {}) for worker in workers]
    if not any(all(has.get(k, 0) >= n for k, n in resources.items()) for has in offered):
        wanted = " ".join(f"{name}={amount:g}" for name, amount in resources.items())
        raise ConfigError(
            f"cluster: no worker offers {wanted}; start one with `dask worker --resources "
            f"{wanted}` or configure the models for the CPU"
        )


@contextmanager
def _connected(cluster: Any) -> Iterator["Client"]:
    """A client of a cluster that has at least one worker."""
    from distributed import Client

    try:
        client = Client(cluster, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, TimeoutError) as error:
        raise PairmillError(
            f"No Dask scheduler answers at {cluster} within {CONNECT_SECONDS} s; "
            "start one, or correct cluster.address"
        ) from error
    with client:
        _threads(client)
        yield client


# One build everywhere ------------------------------------------------------------------------


def package_code(packages: tuple[str, ...]) -> dict[str, tuple[str, str]]:
    """Folder and digest of the Python source of each package that is there, importing none."""
    import hashlib
    import importlib.util
    from pathlib import Path

    found = {}
    for name in packages:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            continue
        folder = Path(next(iter(spec.submodule_search_locations)))
        digest = hashlib.sha256()
        for path in sorted(folder.rglob("*.py"), key=lambda path: path.as_posix()):
            source = path.read_bytes()
            digest.update(f"{path.relative_to(folder).as_posix()} {len(source)}\n".encode())
            digest.update(source)
        found[name] = (str(folder), digest.hexdigest())
    return found


@cache
def code_digest() -> str:
    """The digests of the source of flows, tasks and infra as this process first found them."""
    return _joined(package_code(PACKAGES))


def _joined(code: dict[str, tuple[str, str]]) -> str:
    return " ".join(f"{name}:{code[name][1]}" for name in PACKAGES if name in code)


def run_shard(payload: bytes) -> Any:
    """Run a pickled (function, shard) on a worker that is known to have this code."""
    fn, shard = pickle.loads(payload)
    return fn(shard)


def _guarded(payload: bytes, expected: str) -> tuple[str, Any]:
    """What a worker runs: the shard, or why not. A worker may have joined after the check."""
    try:
        from infra.cluster import code_digest, run_shard

        same = code_digest() == expected
    except ImportError:
        same = False
    if not same:
        import socket

        return "foreign", (
            f"A Dask worker on {socket.gethostname()} runs other code than this build, or its "
            "files were changed meanwhile; install the same Pairmill there and run again"
        )
    return "done", run_shard(payload)


def _portable(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A copy that is pickled by value, so that a host with another `infra` can still run it."""
    copy = types.FunctionType(fn.__code__, {"__builtins__": builtins}, fn.__name__)
    copy.__module__ = "__main__"
    return copy


def _check_code(client: "Client") -> str:
    """The digest of this build's code, which scheduler and workers were found to run as well.

    Raises PairmillError naming the host whose flows, tasks or infra are not this build's.
    """
    here = package_code(PACKAGES)
    for host, there in _ask_code(client).items():
        for name in PACKAGES:
            if not isinstance(there, dict) or there.get(name, ("", ""))[1] != here[name][1]:
                found = there.get(name, ("missing", ""))[0] if isinstance(there, dict) else there
                raise PairmillError(
                    f"Dask {host} has another package `{name}` ({found}) than this build "
                    f"({here[name][0]}); install the same Pairmill there and restart it"
                )
    return _joined(here)


def _ask_code(client: "Client") -> dict[str, Any]:
    """What the scheduler and each worker find under the names of our packages."""
    probe = _portable(package_code)

    async def ask() -> dict[str, Any]:
        scheduler = await client.run_on_scheduler(probe, PACKAGES)
        workers = await client.run(probe, PACKAGES, on_error="return")
        return {"scheduler": scheduler} | {f"worker {k}": v for k, v in workers.items()}

    try:
        return client.sync(ask, callback_timeout=CHECK_SECONDS)
    except TimeoutError as error:
        raise PairmillError(
            f"The Dask cluster did not say within {CHECK_SECONDS} s which code it runs; "
            "restart its scheduler and workers"
        ) from error
