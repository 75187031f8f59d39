"""A model behind the OpenAI chat-completions protocol: one process, one request at a time.

`python -m tests.model_server FOLDER` prints its URL. Usage is counted, not made up. `json_schema`
is kept by force: the skeleton of the JSON is dictated token by token, booleans, numbers and
enumerations are drawn by a hash of the request, and only the words within strings are the model's.
"""

import argparse
import base64
import hashlib
import io
import json
import re
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException
from PIL import Image

from infra.local_mllm import Loaded, LocalModel, encode_talks, load

WORDS = 5  # tokens in a string
ITEMS = 4  # strings in a list

_one_at_a_time = threading.Lock()


def application(loaded: Loaded) -> FastAPI:
    app = FastAPI()

    @app.post("/v1/chat/completions")
    def complete(asked: dict[str, Any]) -> dict[str, Any]:
        form = asked.get("response_format", {"type": "text"})
        if form["type"] not in ("text", "json_schema"):
            raise HTTPException(400, f"response_format {form['type']} is not supported")
        with _one_at_a_time:
            return _completion(loaded, asked, form)

    return app


def _completion(loaded: Loaded, asked: dict[str, Any], form: dict[str, Any]) -> dict[str, Any]:
    import torch

    inputs = encode_talks(loaded, [[_message(message) for message in asked["messages"]]])
    start = inputs["input_ids"].shape[1]
    limit = asked.get("max_tokens", 64)
    torch.manual_seed(int(_hash(asked)[:8], 16))
    rules: list[Any] = []
    if form["type"] == "json_schema":
        rules = [_Dictated(loaded, start, _plan(loaded, form["json_schema"]["schema"], asked))]
    with torch.inference_mode():
        written = loaded.network.generate(
            **inputs,
            max_new_tokens=limit,
            do_sample=asked.get("temperature", 1.0) > 0,
            temperature=asked.get("temperature", 1.0) or None,
            logits_processor=rules,
            eos_token_id=loaded.tokenizer.eos_token_id if rules else None,
        )
    tokens = written[0, start:].tolist()
    ends = loaded.network.generation_config.eos_token_id
    stopped = tokens[-1] in (ends if isinstance(ends, list) else [ends])
    text = loaded.tokenizer.decode(tokens[:-1] if stopped else tokens)
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": asked["model"],
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text},
                "finish_reason": "stop" if stopped else "length",
            }
        ],
        "usage": {
            "prompt_tokens": start,
            "completion_tokens": len(tokens),
            "total_tokens": start + len(tokens),
        },
    }


def _hash(asked: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """A message of the protocol as chat templates take it, its pictures decoded."""
    content = message["content"]
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    return {"role": message["role"], "content": [_part(part) for part in content]}


def _part(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] == "text":
        return part
    data = base64.b64decode(part["image_url"]["url"].partition("base64,")[2], validate=True)
    return {"type": "image", "image": Image.open(io.BytesIO(data)).convert("RGB")}


# JSON by force -------------------------------------------------------------------------------


def _plan(loaded: Loaded, schema: dict[str, Any], asked: dict[str, Any]) -> list[int | None]:
    """The token of each step, or None where the model chooses one."""
    plan: list[int | None] = []
    for piece in _pieces(schema, schema.get("$defs", {}), _hash(asked)):
        if piece is None:
            plan += [None] * WORDS
        else:
            plan += loaded.tokenizer(piece, add_special_tokens=False).input_ids
    return [*plan, loaded.tokenizer.eos_token_id]


def _pieces(schema: dict[str, Any], known: dict[str, Any], seed: str) -> Iterator[str | None]:
    """Text that a JSON of the schema holds in any case, and None for words."""
    if "$ref" in schema:
        schema = known[schema["$ref"].rpartition("/")[2]]
    schema = schema["anyOf"][0] if "anyOf" in schema else schema
    kind, seed = schema.get("type"), hashlib.sha256(seed.encode()).hexdigest()
    if kind == "object":
        for at, (name, inner) in enumerate(schema["properties"].items()):
            yield ("{" if at == 0 else ", ") + json.dumps(name) + ": "
            yield from _pieces(inner, known, seed + name)
        yield "}"
    elif kind == "array":
        for at in range(max(ITEMS, schema.get("minItems", 0))):
            yield "[" if at == 0 else ", "
            yield from _pieces(schema["items"], known, f"{seed}{at}")
        yield "]"
    elif kind == "string" and "enum" not in schema:
        yield '"'
        yield None
        yield '"'
    else:
        low, high = schema.get("minimum", 0), schema.get("maximum", 9)
        drawn = [False, True] if kind == "boolean" else list(range(low, high + 1))
        options = schema.get("enum") or ([schema["const"]] if "const" in schema else drawn)
        yield json.dumps(options[int(seed[:8], 16) % len(options)])


class _Dictated:
    """Leaves one token to each step that is dictated, and words to the others."""

    def __init__(self, loaded: Loaded, start: int, plan: list[int | None]) -> None:
        import torch

        self._start, self._plan = start, plan
        vocabulary = range(len(loaded.tokenizer))
        words = [
            bool(re.fullmatch(r" ?[A-Za-z]+", loaded.tokenizer.decode([n]))) for n in vocabulary
        ]
        self._barred = ~torch.tensor(words)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        token = self._plan[input_ids.shape[1] - self._start]
        if token is None:
            return scores.masked_fill(self._barred, float("-inf"))
        forced = scores.new_full(scores.shape, float("-inf"))
        forced[:, token] = 0
        return forced


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--port", type=int, default=0)
    arguments = parser.parse_args()
    app = application(load(LocalModel(name=arguments.folder, device="cpu")))
    listening = socket.create_server(("127.0.0.1", arguments.port))
    print(f"http://127.0.0.1:{listening.getsockname()[1]}/v1", flush=True)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    server.run(sockets=[listening])


if __name__ == "__main__":
    sys.exit(main())
