"""The gold set: a page on loopback where people judge labelled pairs, and the judge against them.

The page holds no data. Its address holds a token; whatever lacks it, or names another host, is
refused before anything is looked at. It takes ids, never paths, and shows words as text.
"""

import hashlib
import hmac
import secrets
import socket
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Console
from rich.table import Table as RichTable

from flows.checks import calibrated
from flows.config import BuildConfig, open_build
from infra import corpus, gold, pictures, versions
from infra.agreement import Share
from infra.build import Progress, silent
from infra.canonical import digest
from infra.corpus import Source
from infra.errors import ConfigError, PairmillError
from infra.gold import Reason, Scale, Verdict
from infra.images import Unreadable
from infra.store import Location, NotFound, Store, open_store
from infra.tables import Table
from infra.text import plain
from tasks.judge_labels import Agreement

TEMPLATES = Path(__file__).parent / "templates"
FILES = {
    "gold.html": "text/html",
    "gold.css": "text/css",
    "gold.js": "text/javascript",
    "gold.svg": "image/svg+xml",
}
MOST_PIXELS = 800 * 800
MOST_BODY = 4_096  # bytes
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


class Item(NamedTuple):
    """One instruction of a labelled pair; query and target are image_ids."""

    pair_id: str
    query: str
    target: str
    instruction: str

    @property
    def name(self) -> str:
        return digest([self.pair_id, self.instruction])


class Said(BaseModel):
    """What the page sends: a verdict on an item, or None to take it back."""

    model_config = ConfigDict(extra="forbid")

    item: str = Field(pattern=gold.ID)
    verdict: Scale | None
    reason: Reason = "none"


def sample(labels: pl.DataFrame, pairs: pl.DataFrame, count: int) -> list[Item]:
    """A fair draw of labelled pairs, spaces in turn, with one instruction of each.

    A pair counts for one of the spaces in whose band it lies. All draws are by hash, so a longer
    sample goes on where a shorter one ended.
    """
    rows = labels.join(pairs, on="pair_id").select(
        "pair_id", "query", "target", "instructions", "ties"
    )
    turns: dict[str, list[tuple[str, Item]]] = {}
    for pair_id, query, target, texts, ties in rows.iter_rows():
        spaces = sorted(tie["space"] for tie in ties if tie["in_band"]) or [""]
        rank = hashlib.sha256(f"gold {pair_id}".encode()).hexdigest()
        space = spaces[int(rank[:8], 16) % len(spaces)]
        text = texts[int(rank[8:16], 16) % len(texts)]
        turns.setdefault(space, []).append((rank, Item(pair_id, query, target, text)))
    placed = [
        (turn, space, item)
        for space, items in sorted(turns.items())
        for turn, (_, item) in enumerate(sorted(items))
    ]
    return [item for _, _, item in sorted(placed)[:count]]


def gold_path(config: BuildConfig) -> Path:
    """The gold file of a config. Raises ConfigError where it names none."""
    if not config.checks.gold.path:
        raise ConfigError("name the file of the gold set: checks.gold.path, such as gold.jsonl")
    return Path(config.checks.gold.path)


def labelled(store: Store, dataset: str) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Labels, pairs and objects of the latest version, before any check had a say.

    Raises PairmillError where they are gone.
    """
    manifest = versions.find_version(store, dataset, "latest")
    wanted = (("label_pairs", "labels"), ("mine_pairs", "pairs"), ("describe", "objects"))
    found = [versions.table(store, manifest, stage, name) for stage, name in wanted]
    labels, pairs, objects = found
    if labels is None or pairs is None or objects is None:
        raise PairmillError(
            f"the tables of version {manifest['version']} are gone from {store.uri}; run a build"
        )
    if not labels.height:
        raise PairmillError(f"version {manifest['version']} has no labelled pair; label some first")
    return labels, pairs, objects


class Desk:
    """What is to be judged and by whom; keeps the gold file."""

    def __init__(
        self,
        items: Sequence[Item],
        path: Path,
        who: str,
        bucket: Store,
        sources: Mapping[str, Source],
    ):
        self.items = {item.name: item for item in items}
        self.path, self.who = path, who
        shown = {image for item in items for image in (item.query, item.target)}
        self._bucket = bucket
        self._sources = {image: sources[image] for image in shown if image in sources}
        self.picture = lru_cache(maxsize=64)(self._picture)

    def told(self) -> dict[str, Any]:
        """Items with this person's verdicts."""
        mine = {row.item: row for row in gold.read(self.path) if row.who == self.who}
        rows = []
        for name, item in self.items.items():
            known = mine.get((item.pair_id, item.instruction))
            rows.append(
                {
                    "item": name, "query": item.query, "target": item.target,
                    "instruction": plain(item.instruction, 1_000),
                    "verdict": known.verdict if known else None,
                    "reason": known.reason if known else "none",
                }
            )  # fmt: skip
        return {"who": self.who, "items": rows}

    def judge(self, said: Said) -> None:
        """Write a verdict in place of an older one of this person. Raises KeyError."""
        item = self.items[said.item]
        about = item.pair_id, item.instruction
        rows = [row for row in gold.read(self.path) if (row.item, row.who) != (about, self.who)]
        if said.verdict is not None:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            reason = "none" if said.verdict == "fits" else said.reason
            rows.append(
                Verdict(
                    **item._asdict(), verdict=said.verdict, reason=reason, who=self.who, when=now
                )
            )
        gold.write(self.path, rows)

    def _picture(self, image_id: str) -> bytes:
        """The JPEG of a picture of the sample. Raises KeyError, NotFound, Unreadable."""
        data = corpus.fetch(self._bucket, self._sources[image_id])
        if hashlib.sha256(data).hexdigest() != image_id:
            raise NotFound(f"the file of {image_id} has other bytes now")
        return pictures.shrink(data, MOST_PIXELS)


def open_desk(config: BuildConfig, count: int, who: str) -> Desk:
    """What of the latest version is to be judged. Raises PairmillError where there is nothing."""
    path = gold_path(config)
    gold.read(path)
    store = open_store(Location(**config.store.model_dump(exclude={"single_writer"})))
    bucket = open_store(Location(**{f: getattr(config.corpus, f) for f in Location.model_fields}))
    labels, pairs, objects = labelled(store, config.dataset)
    return Desk(sample(labels, pairs, count), path, who, bucket, corpus.sources(objects))


def agree(config: BuildConfig, progress: Progress = silent) -> Agreement:
    """Ask the judge about the gold set, where it was not asked before, and compare.

    Raises PairmillError where there is no gold set or no version of the dataset.
    """
    settled = gold.settled(gold.read(gold_path(config)))
    if not settled.verdicts:
        raise PairmillError("the gold set is empty; label some pairs with pairmill gold serve")
    loose = config.checks.judge.model_copy(update={"least_agreement": None})
    config = config.model_copy(update={"checks": config.checks.model_copy(update={"judge": loose})})
    with open_build(config, progress) as build:
        manifest = versions.find_version(build.store, config.dataset, "latest")
        described = manifest["tables"]["describe"]["objects"]
        return calibrated(build, config, Table.from_json(described), lambda stage: stage)[1]


def show(found: Agreement, config: BuildConfig, console: Console) -> None:
    """The agreement of judge and people, for people."""
    chosen = config.checks.judge
    for what in ("scale", "decision"):
        share = found.on(what)
        gate = ""
        if chosen.least_agreement and chosen.agree_on == what:
            passes = "passes" if share.low >= chosen.least_agreement else "does not pass"
            gate = f"; {passes} the gate at {chosen.least_agreement:g}"
        console.print(f"agreement on the {what}: {_told(share)}{gate}", highlight=False)
    kappa = "not defined" if found.kappa is None else f"{found.kappa:.3f}"
    console.print(f"Cohen's kappa on the scale: {kappa}", highlight=False)
    verdicts = (*gold.SCALE, "no verdict")
    table = RichTable("people \\ judge", *verdicts, box=None, pad_edge=False)
    for people in gold.SCALE:
        table.add_row(people, *(str(found.confusion[people, judge]) for judge in verdicts))
    console.print(table)
    for reason, share in found.reasons.items():
        name = "without a reason" if reason == "none" else reason.replace("_", " ")
        console.print(f"  {name}: {_told(share)}", highlight=False)
    for count, words in (
        (found.waiting, "wait for an answer of the judge"),
        (found.gone, "are left out: their pictures are not in the latest version"),
    ):
        if count:
            console.print(f"{count} items {words}", highlight=False)


def _told(share: Share) -> str:
    return f"{share.part} of {share.of}, {share.value:.3f} ({share.low:.3f} to {share.high:.3f})"


class Guard:
    """Lets through what names this host and holds the token, and bounds what it sends."""

    def __init__(self, app: Any, token: str, hosts: Sequence[str]):
        self.app, self.token, self.hosts = app, token.encode(), set(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        from starlette.responses import PlainTextResponse

        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        status, words = self._refusal(scope)
        if status:
            await PlainTextResponse(words, status, HEADERS)(scope, receive, send)
            return
        _, _, rest = scope["path"][1:].partition("/")
        within = {**scope, "path": f"/{rest}", "raw_path": f"/{rest}".encode()}
        await self.app(within, receive, _with_headers(send))

    def _refusal(self, scope: Scope) -> tuple[int, str]:
        if scope["type"] != "http":
            return 400, "no such protocol\n"
        headers: dict[str, list[str]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.decode("latin-1"), []).append(value.decode("latin-1"))
        hosts = headers.get("host", [])
        if len(hosts) != 1 or hosts[0].lower() not in self.hosts:
            return 400, "this page answers on its own address only\n"
        given, slash, _ = scope["path"][1:].partition("/")
        if not (slash and hmac.compare_digest(given.encode("utf-8", "replace"), self.token)):
            return 403, "the address lacks its token; open the one that the command printed\n"
        origins = headers.get("origin", [])
        if any(origin.lower() != f"http://{hosts[0].lower()}" for origin in origins):
            return 403, "not from another page\n"
        if any(site not in ("same-origin", "none") for site in headers.get("sec-fetch-site", [])):
            return 403, "not from another page\n"
        return 0, ""


def _with_headers(send: Send) -> Send:
    own = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]

    async def sending(message: Any) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *own]}
        await send(message)

    return sending


def application(desk: Desk, token: str, hosts: Sequence[str]) -> Any:
    """The page as an ASGI application that answers under `/<token>/` on the given hosts."""
    from fastapi import FastAPI
    from fastapi import Path as InPath
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    def file(name: str) -> Callable[[], Response]:
        data = (TEMPLATES / name).read_bytes()
        return lambda: Response(data, media_type=FILES[name])

    for name in FILES:
        app.get("/" if name == "gold.html" else f"/{name}")(file(name))

    @app.get("/items")
    def items() -> Response:
        return JSONResponse(desk.told())

    @app.get("/picture/{image_id}")
    def picture(image_id: str = InPath(pattern=gold.ID)) -> Response:
        try:
            return Response(desk.picture(image_id), media_type="image/jpeg")
        except (KeyError, NotFound, Unreadable):
            return Response(status_code=404)

    @app.post("/verdict")
    async def verdict(request: Request) -> Response:
        if request.headers.get("content-type", "").partition(";")[0] != "application/json":
            return Response(status_code=415)
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > MOST_BODY:
                return Response(status_code=413)
        try:
            desk.judge(Said.model_validate_json(body))
        except ValidationError:
            return Response(status_code=422)
        except KeyError:
            return Response(status_code=404)
        return Response(status_code=204)

    return Guard(app, token, hosts)


class Served(NamedTuple):
    """A server that is ready to run, and the address to open."""

    server: Any
    listening: socket.socket
    address: str

    def run(self) -> None:
        """Serve until interrupted."""
        self.server.run(sockets=[self.listening])


def served(desk: Desk, port: int = 0) -> Served:
    """The page on a port of loopback, any free one for 0. Raises PairmillError for a taken one."""
    import uvicorn

    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(("127.0.0.1", port))
        listening.listen()
    except OSError as error:
        raise PairmillError(
            f"port {port} is taken ({error.strerror}); leave --port out for a free one"
        ) from None
    token, port = secrets.token_urlsafe(24), listening.getsockname()[1]
    hosts = [f"{name}:{port}" for name in ("127.0.0.1", "localhost")]
    # An access log would hold the token.
    config = uvicorn.Config(
        application(desk, token, hosts), log_level="warning", access_log=False, server_header=False
    )
    return Served(uvicorn.Server(config), listening, f"http://127.0.0.1:{port}/{token}/")
