"""The batch API of the fault server: files and batches in memory, which go wrong on order."""

import itertools
import json
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from tests.mllm_answers import Reply, error

Line = dict[str, Any]


class Plan(NamedTuple):
    """What becomes of a batch: the lines (by number) in its output and in its errors, and how."""

    output: Callable[[range], Iterable[int]] = lambda lines: lines
    errors: Callable[[range], Iterable[int]] = lambda lines: ()
    status: str = "completed"
    why: str = "overloaded"
    strange: tuple[str, ...] = ()


PLANS = {
    "good": Plan(),
    "out of order": Plan(reversed),
    "partly failed": Plan(lambda lines: (n for n in lines if n % 3), lambda lines: lines[::3]),
    "all failed": Plan(lambda lines: (), lambda lines: lines),
    "twice": Plan(lambda lines: (*lines, *lines[::2])),
    "lines missing": Plan(lambda lines: lines[1:]),
    "strange lines": Plan(strange=("<html>", '{"custom_id": ', "[]", "", '{"custom_id": "alien"}')),
    "expired": Plan(lambda lines: lines[::2], lambda lines: lines[1::2], "expired", "expired"),
    "failed": Plan(lambda lines: (), status="failed"),
    "never": Plan(status="in_progress"),
}


class Batches:
    """Files, and batches that are done after `polls` looks at them, by the plans in `script`.

    `answer` gives the reply to the body of a line. `faults` are taken one by one: route -> what
    happens instead of an answer: a status, "cut" before the work or "lost" after it. `plans` holds
    what becomes of each batch.
    """

    def __init__(self, answer: Callable[[Any], Reply], polls: int = 1):
        self.answer, self.polls = answer, polls
        self.script: list[str] = []
        self.faults: dict[str, list[str]] = {}
        self.retry_after: str | None = None
        self.files: dict[str, tuple[str, bytes]] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.asked: list[str] = []  # the id of each line that was answered
        self.looks: dict[str, int] = {}
        self.plans: dict[str, str] = {}
        self._numbers = itertools.count(1)

    def handle(self, method: str, path: str, query: dict[str, str], body: bytes) -> Reply:
        """The reply to a request to /files or /batches; `path` is what follows /v1."""
        kind, *rest = path.strip("/").split("/")
        route = " ".join([method, kind, *("id" for _ in rest[:1]), *rest[1:]])
        fault = self.faults.get(route, [])
        wrong = fault.pop(0) if fault else None
        if wrong == "cut":
            return Reply(share=0.0, ends="cut")
        if wrong not in (None, "lost"):
            reply = error(int(str(wrong)), "not now")
            reply.headers |= {"Retry-After": self.retry_after} if self.retry_after else {}
            return reply
        routes = {
            "POST files": lambda: self._upload(body),
            "GET files": lambda: _page([self._file(name) for name in self.files], query),
            "GET files id": lambda: self._file(rest[0]),
            "GET files id content": lambda: self.files[rest[0]][1].decode(),
            "DELETE files id": lambda: self._delete(rest[0]),
            "POST batches": lambda: self._create(json.loads(body)),
            "GET batches": lambda: _page([*self.batches.values()][::-1], query),
            "GET batches id": lambda: self._look(rest[0]),
            "POST batches id cancel": lambda: self._cancel(rest[0]),
        }
        if route not in routes or (rest and rest[0] not in {**self.files, **self.batches}):
            return error(404, f"no such thing: {path}")
        found = routes[route]()
        return Reply(share=0.0, ends="cut") if wrong == "lost" else Reply(body=found)

    def _upload(self, body: bytes) -> Line:
        boundary = body[: body.index(b"\r\n")]
        for part in body.split(boundary)[1:-1]:
            head, _, data = part.partition(b"\r\n\r\n")
            if b'name="file"' in head:
                name = head.partition(b'filename="')[2].partition(b'"')[0].decode()
                return self._file(self._new_file(name, data.removesuffix(b"\r\n")))
        raise ValueError("no file in the form")

    def _new_file(self, name: str, data: bytes) -> str:
        file_id = f"file-{next(self._numbers)}"
        self.files[file_id] = (name, data)
        return file_id

    def _file(self, file_id: str) -> Line:
        name, data = self.files[file_id]
        return {
            **{"id": file_id, "object": "file", "filename": name, "bytes": len(data)},
            **{"purpose": "batch", "created_at": 1, "status": "processed"},
        }

    def _delete(self, file_id: str) -> Line:
        del self.files[file_id]
        return {"id": file_id, "object": "file", "deleted": True}

    def _create(self, asked: dict[str, Any]) -> Line:
        batch_id = f"batch_{next(self._numbers)}"
        self.plans[batch_id] = self.script.pop(0) if self.script else "good"
        self.looks[batch_id] = 0
        self.batches[batch_id] = {
            **{"id": batch_id, "object": "batch", "status": "validating"},
            **{"created_at": int(time.time())},
            **{"completion_window": "24h", "metadata": {}, **asked},
            **{"output_file_id": None, "error_file_id": None, "errors": None},
        }
        return self.batches[batch_id]

    def _look(self, batch_id: str) -> Line:
        self.looks[batch_id] += 1
        batch = self.batches[batch_id]
        if batch["status"] in ("validating", "in_progress"):
            batch["status"] = "in_progress"
            if self.looks[batch_id] > self.polls and self.plans[batch_id] != "never":
                self._finish(batch)
        return batch

    def _cancel(self, batch_id: str) -> Line:
        self.batches[batch_id]["status"] = "cancelled"
        return self.batches[batch_id]

    def _finish(self, batch: dict[str, Any]) -> None:
        plan = PLANS[self.plans[batch["id"]]]
        asked = [json.loads(line) for line in self.files[batch["input_file_id"]][1].splitlines()]
        lines = range(len(asked))
        wanted = [*plan.output(lines)]
        made = {n: self._produced(asked[n]) for n in sorted({*wanted})}
        failed = {n for n, line in made.items() if line["response"]["status_code"] != 200}
        output = [json.dumps(made[n]) for n in wanted if n not in failed]
        errors = [made[n] for n in sorted(failed)]
        errors += [_unanswered(asked[n]["custom_id"], plan.why) for n in plan.errors(lines)]
        texts = {"output": [*output, *plan.strange], "error": [json.dumps(e) for e in errors]}
        for kind, found in texts.items():
            if found:
                data = "\n".join(found).encode() + b"\n"
                batch[f"{kind}_file_id"] = self._new_file(f"{batch['id']}_{kind}.jsonl", data)
        done = {"total": len(asked), "completed": len(output), "failed": len(errors)}
        batch |= {"status": plan.status, "request_counts": done}
        if plan.status == "failed":
            batch["errors"] = {"data": [{"code": "invalid", "message": "line 1 is not valid"}]}

    def _produced(self, asked: Line) -> Line:
        self.asked.append(asked["custom_id"])
        reply = self.answer(asked["body"])
        return {
            **{"id": f"batch_req_{next(self._numbers)}", "custom_id": asked["custom_id"]},
            **{"response": {"status_code": reply.status, "body": reply.body}, "error": None},
        }


def _unanswered(custom_id: str, why: str) -> Line:
    line: Line = {"id": f"batch_req_{custom_id[:8]}", "custom_id": custom_id}
    if why == "expired":
        error = {"code": "batch_expired", "message": "the completion window was over"}
        return {**line, "response": None, "error": error}
    body = {"error": {"message": why, "type": "server_error", "code": None}}
    return {**line, "response": {"status_code": 503, "body": body}, "error": None}


def _page(rows: Iterable[Line], query: dict[str, str]) -> Line:
    rows, size = list(rows), int(query.get("limit", 20))
    ids = [row["id"] for row in rows]
    start = ids.index(query["after"]) + 1 if query.get("after") in ids else 0
    page = rows[start : start + size]
    return {
        **{"object": "list", "data": page, "has_more": start + size < len(rows)},
        **{"first_id": page[0]["id"] if page else None},
        **{"last_id": page[-1]["id"] if page else None},
    }
