"""What the fault server may say to one request: a table of answers, good and bad."""

import base64
import hashlib
import itertools
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any, Literal

COLOURS = ("red", "green", "blue", "yellow", "black", "white", "orange", "purple")
THINGS = ("arrow", "leaf", "card", "moon", "flag", "button", "house", "fish")

_numbers = itertools.count(1)


@dataclass
class Reply:
    """What goes over the wire after `delay_s`: `share` of it, then the rest or what `ends` says."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    share: float = 1.0
    ends: Literal["whole", "cut", "stalled"] = "whole"

    @property
    def paid(self) -> bool:
        """Whether a model has worked for it, no matter what of it arrives."""
        return self.status == 200 and isinstance(self.body, dict) and "choices" in self.body


def digests(request: dict[str, Any]) -> list[str]:
    """SHA-256 of the pictures of a request, in their order."""
    found = []
    for message in request["messages"]:
        parts = message["content"] if isinstance(message["content"], list) else []
        for part in parts:
            if part["type"] == "image_url":
                data = part["image_url"]["url"].partition("base64,")[2]
                found.append(hashlib.sha256(base64.b64decode(data, validate=True)).hexdigest())
    return found


def said(request: dict[str, Any]) -> str:
    """All text of a request."""
    texts = []
    for message in request["messages"]:
        content = message["content"]
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        texts += [part["text"] for part in parts if part["type"] == "text"]
    return "\n".join(texts)


def good_content(request: dict[str, Any]) -> str:
    """A valid answer: a function of the pictures, or of the text where there are none."""
    text = said(request)
    seeds = digests(request) or [hashlib.sha256(text.encode()).hexdigest()]
    query, target = (
        f"a {COLOURS[int(seed[:2], 16) % 8]} {THINGS[int(seed[2:4], 16) % 8]} ({seed[:6]})"
        for seed in (seeds * 2)[:2]
    )
    comparison = {
        "common": "flat drawings of one thing",
        "differences": {"query": query, "target": target},
    }
    written = {
        "instructions": [
            f"Like this one, but {target}",
            f"Show me {target} in the same style",
            f"The same kind of drawing, this time with {target}",
        ]
    }
    wants = [part for part in (comparison, written) if f'"{next(iter(part))}"' in text]
    if not wants and (schema := _schema(request)):
        return json.dumps(of_schema(schema, schema, "".join(seeds) + text))
    return json.dumps({key: value for part in wants for key, value in part.items()})


def _schema(request: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = request.get("response_format", {}).get("json_schema", {})
    return dict(found.get("schema", {}))


def of_schema(schema: dict[str, Any], root: dict[str, Any], seed: str) -> Any:
    """A valid value for a JSON schema, a function of the seed: words that mean nothing, mostly yes.

    Of a closed set the first member comes three times in four.
    """
    draw = int(hashlib.sha256(f"{seed} {schema.get('title')}".encode()).hexdigest()[:8], 16)
    if "$ref" in schema:
        return of_schema(root["$defs"][schema["$ref"].rpartition("/")[2]], root, seed)
    if "anyOf" in schema:
        return of_schema(schema["anyOf"][0], root, seed)
    if "enum" in schema:
        return schema["enum"][0 if draw % 4 else draw // 4 % len(schema["enum"])]
    if "const" in schema:
        return schema["const"]
    kind = schema.get("type")
    if kind == "object":
        fields = schema.get("properties", {}).items()
        return {name: of_schema(part, root, f"{seed} {name}") for name, part in fields}
    if kind == "array":
        count = max(schema.get("minItems", 0), min(3, schema.get("maxItems", 3)))
        return [of_schema(schema["items"], root, f"{seed} {at}") for at in range(count)]
    low, high = schema.get("minimum", 1), schema.get("maximum", 5)
    values: dict[Any, Any] = {"boolean": bool(draw % 8), "integer": low + draw % (high - low + 1)}
    values["number"] = float(values["integer"])
    if schema.get("description", "").startswith("Quoted") and draw % 8:
        return _quoted(seed, draw)
    said = f"the {COLOURS[draw % 8]} {THINGS[draw // 8 % 8]} on a plain ground ({draw:08x})"
    return values.get(kind, said)


def _quoted(text: str, draw: int) -> str:
    """Words out of the text that a request encloses as `ocr`, where it does."""
    found = re.search(r"<<<ocr \w+\n(.+)\n", text)
    words = found[1].split() if found else ["nothing"]
    start = draw % len(words)
    return " ".join(words[start : start + 1 + draw // 8 % 4])


def completion(request: dict[str, Any], content: str | None, **changed: Any) -> Reply:
    """A chat completion with an id of its own; `changed` holds refusal, finish_reason, usage."""
    usage = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
    message = {"role": "assistant", "content": content, "refusal": changed.get("refusal")}
    choice = {
        "index": 0,
        "message": message,
        "finish_reason": changed.get("finish_reason", "stop"),
    }
    body = {
        "id": f"chatcmpl-{next(_numbers)}",
        "object": "chat.completion",
        "created": 1,
        "model": request["model"],
        "choices": [choice],
        "usage": changed.get("usage", usage),
    }
    return Reply(body={name: value for name, value in body.items() if value is not None})


def error(status: int, message: str, code: str | None = None, **headers: str) -> Reply:
    """An error as such servers word it; `headers` with underscores for hyphens."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(status, {"error": {"message": message, "type": "error", "code": code}}, names)


def good(request: dict[str, Any], **changed: Any) -> Reply:
    """A good answer of which `changed` says how it travels."""
    reply = completion(request, good_content(request))
    for name, value in changed.items():
        setattr(reply, name, value)
    return reply


def _in_a_second() -> str:
    return formatdate(time.time() + 1, usegmt=True)


CACHED = {
    **{"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120},
    "prompt_tokens_details": {"cached_tokens": 64},
}

BEHAVIOURS: dict[str, Callable[[dict[str, Any]], Reply]] = {
    "good": good,
    "chatty": lambda request: completion(
        request, f"<think>{{hm}}</think>Sure:\n```json\n{good_content(request)}\n```"
    ),
    "cached": lambda request: completion(request, good_content(request), usage=CACHED),
    "no usage": lambda request: completion(request, good_content(request), usage=None),
    "429": lambda _: error(429, "slow down"),
    "429 retry-after": lambda _: error(429, "slow down", retry_after="0"),
    "429 one second": lambda _: error(429, "slow down", retry_after="1"),
    "429 retry-after date": lambda _: error(429, "slow down", retry_after=_in_a_second()),
    "429 come back tomorrow": lambda _: error(429, "slow down", retry_after="86400"),
    "429 no quota": lambda _: error(429, "you owe us money", "insufficient_quota"),
    "500": lambda _: error(500, "oh no"),
    "503": lambda _: error(503, "loading"),
    "400": lambda _: error(400, "this picture is not to our liking"),
    "404": lambda _: error(404, "no such model"),
    "redirect": lambda _: Reply(307, {}, {"Location": "http://127.0.0.1:9/v1/chat/completions"}),
    "html": lambda _: Reply(body="<html>welcome</html>", headers={"Content-Type": "text/html"}),
    "broken body": lambda _: Reply(body='{"choices": [', headers={}),
    "refusal": lambda request: completion(request, None, refusal="I'd rather not"),
    "content filter": lambda request: completion(request, "", finish_reason="content_filter"),
    "truncated": lambda request: completion(
        request, good_content(request)[:20], finish_reason="length"
    ),
    "not json": lambda request: completion(request, "They are both nice."),
    "wrong schema": lambda request: completion(request, '{"verdict": 7}'),
    "empty": lambda request: completion(request, ""),
    "over-long": lambda request: completion(request, "x" * 50_000),
    "slow": lambda request: good(request, delay_s=1.5),
    "stalled body": lambda request: good(request, share=0.5, ends="stalled"),
    "never": lambda request: good(request, share=0.0, ends="stalled"),
    "closed socket": lambda _: Reply(share=0.0, ends="cut"),
    "closed in the middle": lambda request: good(request, share=0.5, ends="cut"),
    # The server puts an answer that it gave before in its place.
    "duplicate": good,
}
