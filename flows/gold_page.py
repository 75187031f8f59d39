"""The page of the gold set: people judge pairs in a browser on this machine.

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

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from infra import corpus, gold, pictures
from infra.canonical import digest
from infra.corpus import Source
from infra.errors import PairmillError
from infra.gold import Reason, Scale, Verdict
from infra.images import Unreadable
from infra.store import NotFound, Store
from infra.text import plain

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
