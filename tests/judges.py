"""Judges for the fault server: what they say follows from the words and pictures they are shown."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from infra import pictures as prepared
from infra.build import Build
from infra.judging import Judge, JudgeModel
from infra.tables import Table
from tests import pictures
from tests.mllm_server import Reply, completion, digests, said
from tests.tasks.examples import put

MARKED = re.compile(r"^<<<(\w+) ([0-9a-f]{16})\n(.*)\n>>>\1 \2$", re.M)
MAX_PIXELS = 4_096


def enclosed(request: dict[str, Any]) -> dict[str, str]:
    """Texts between markers, by name."""
    return {name: text for name, _, text in MARKED.findall(said(request))}


def wanted(request: dict[str, Any]) -> list[str]:
    """The fields that the answer must have."""
    return list(request["response_format"]["json_schema"]["schema"]["properties"])


def verdicts(decide: Callable[[str], str]) -> Callable[[dict[str, Any]], Reply]:
    """A judge that says of every sentence "verdict reason"."""

    def answer(request: dict[str, Any]) -> Reply:
        texts, found = enclosed(request), {}
        for name in wanted(request):
            verdict, _, reason = decide(texts[name]).partition(" ")
            found[name] = {"reason": reason or "none", "verdict": verdict}
        return completion(request, json.dumps(found))

    return answer


def line_ups(
    decide: Callable[[str], str], best: Callable[[list[str]], str | None]
) -> Callable[[dict[str, Any]], Reply]:
    """A judge that says what of every candidate, and picks the best of their digests."""

    def answer(request: dict[str, Any]) -> Reply:
        _, *candidates = digests(request)
        letters = wanted(request)[:-1]
        found = {n: decide(d) for n, d in zip(letters, candidates, strict=True)}
        chosen = best(candidates)
        found["best"] = letters[candidates.index(chosen)] if chosen else "none"
        return completion(request, json.dumps(found))

    return answer


class Corpus:
    """Small pictures in the corpus of a build, and what tables say of them."""

    def __init__(self, build: Build, count: int):
        self.build = build
        files = [pictures.jpeg(48 + at, 40, at) for at in range(count)]
        self.ids = [hashlib.sha256(data).hexdigest() for data in files]
        for at, data in enumerate(files):
            build.corpus.put(f"{at}.jpg", data)
        rows = [(f"{at}.jpg", "1", len(d), self.ids[at]) for at, d in enumerate(files)]
        self.objects: Table = put(build, "objects", "key stamp size image_id", rows)
        captions = [(image, f"c{at}") for at, image in enumerate(self.ids)]
        self.eligible: Table = put(build, "eligible", "image_id caption_id", captions)
        sent = [prepared.shrink(data, MAX_PIXELS) for data in files]
        self.sent = [hashlib.sha256(data).hexdigest() for data in sent]

    def place(self, digest: str) -> int:
        """Which picture was sent."""
        return self.sent.index(digest)

    def labels(self, rows: Sequence[tuple[str, Sequence[str]]]) -> Table:
        return put(self.build, "labels", "pair_id instructions", rows)


def judge(url: str, **changed: Any) -> Judge:
    endpoint = {"url": url, "model": "judge", "backoff_s": 0.001, "attempts": 2, "concurrency": 4}
    asking = {"endpoint": endpoint | changed.pop("endpoint", {}), **changed.pop("asking", {})}
    return Judge(
        model=JudgeModel(max_pixels=MAX_PIXELS, **changed),
        asking=asking,  # type: ignore[arg-type]
    )
