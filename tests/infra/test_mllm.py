"""The client against a real server that misbehaves on order."""

import asyncio
import base64
import json
import logging
from dataclasses import replace

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError

from infra import mllm
from tests.mllm_answers import good
from tests.mllm_server import BEHAVIOURS, MllmServer, Reply, digests

PICTURES = {"a" * 64: b"first picture", "b" * 64: b"second picture"}


class Note(BaseModel):
    model_config = ConfigDict(extra="forbid")
    instructions: list[str]


REQUEST = mllm.Request(
    instructions='Answer as JSON: {"instructions": ["..."]}',
    pictures=(mllm.Picture("Source image", "a" * 64), mllm.Picture("Target image", "b" * 64)),
    text="Compare.",
    answer=Note,
    resize="at most 1000 px, JPEG",
    model="tiny",
    max_tokens=100,
    temperature=0.7,
    seed=3,
)


def endpoint(server: MllmServer, **changed):
    settings = {"url": server.url, "model": "tiny"}
    return mllm.Endpoint(**settings | changed)


def talk(server: MllmServer, work, secret="", images=PICTURES.__getitem__, **changed):
    """What `work(ask)` gives, where `ask` makes one call a request and keeps nothing."""

    class Ask:
        attempt = 0

        def __init__(self, client: mllm.Client):
            self.client = client

        async def __call__(self, request: mllm.Request) -> mllm.Response:
            return await mllm.send(self.client, request)

    async def body():
        settings = endpoint(server, **changed)
        async with mllm.connect(settings, settings, images, secret) as client:
            return await work(Ask(client))

    return asyncio.run(body())


def ask_for(server: MllmServer, times: int = 1, request=REQUEST, **changed):
    """The answers to the same question, asked one time after the other."""

    async def work(ask):
        return [await mllm.ask_for(ask, request, Note) for _ in range(times)]

    return talk(server, work, **changed)


def send(server: MllmServer, requests):
    """What came of requests, one made after the other."""

    async def work(ask):
        found = []
        for request in requests:
            found += await asyncio.gather(ask(request), return_exceptions=True)
        return found

    return talk(server, work)


def test_pictures_go_as_data_urls_after_what_all_requests_share():
    with MllmServer() as server:
        (note,) = ask_for(server)
    assert len(note.instructions) == 3
    (request,) = server.requests
    system, user = request["messages"]
    assert system == {"role": "system", "content": REQUEST.instructions}
    texts = [part.get("text", part["type"]) for part in user["content"]]
    assert texts == ["Source image:", "image_url", "Target image:", "image_url", "Compare."]
    first = user["content"][1]["image_url"]["url"]
    assert first == "data:image/jpeg;base64," + base64.b64encode(b"first picture").decode()
    assert request["response_format"]["json_schema"]["strict"] is True
    assert request["response_format"]["json_schema"]["schema"]["additionalProperties"] is False
    assert (request["model"], request["max_tokens"], request["seed"]) == ("tiny", 100, 3)


@pytest.mark.parametrize("form", ["json_schema", "json_object", "prompt"])
def test_without_instructions_there_is_no_system_message(form):
    with MllmServer(formats=[form]) as server:
        send(server, [replace(REQUEST, instructions="", text='Compare "instructions".')])
    [user] = server.requests[-1]["messages"]
    assert user["role"] == "user"
    has_schema = "additionalProperties" in user["content"][-1]["text"]
    assert has_schema == (form != "json_schema")


@pytest.mark.parametrize(
    ("script", "rule"),
    [
        (["refusal"], "refused"),
        (["content filter"], "refused"),
        (["truncated"], "truncated"),
        (["empty"], "empty"),
        (["over-long"], "too_long"),
        (["wrong schema", "wrong schema"], "wrong_schema"),
        (["not json", "not json"], "wrong_schema"),
        (["not json", "refusal"], "refused"),
    ],
)
def test_a_bad_answer_is_a_flaw_and_final(script, rule):
    with MllmServer(script) as server:
        (flaw,) = ask_for(server)
    assert isinstance(flaw, mllm.Flawed) and flaw.rule == rule
    assert server.counts.total() == len(script)


@pytest.mark.parametrize("first", ["not json", "wrong schema"])
def test_a_wrong_shape_is_repaired_once_by_showing_what_is_wrong(first):
    with MllmServer([first]) as server:
        (note,) = ask_for(server)
    assert isinstance(note, Note)
    *_, answer, complaint = server.requests[1]["messages"]
    assert (answer["role"], complaint["role"]) == ("assistant", "user")
    assert "can't be used" in complaint["content"]


def test_json_is_found_behind_thoughts_and_in_a_code_fence():
    with MllmServer(["chatty"]) as server:
        (note,) = ask_for(server)
    assert isinstance(note, Note)


@pytest.mark.parametrize(
    ("behaviour", "transient", "maybe_billed", "told"),
    [
        ("429", True, False, "429: .*slow down"),
        ("429 come back tomorrow", False, False, "429: .*slow down"),
        ("429 no quota", False, False, "you owe us money.*quota"),
        ("500", True, False, "500: .*oh no"),
        ("400", False, False, "not to our liking"),
        ("404", False, False, "404: .*no such model.*check endpoint.url"),
        ("redirect", False, False, "redirects elsewhere, which is refused"),
        ("html", False, True, "no chat completion; check endpoint.url"),
        ("broken body", False, True, "no chat completion"),
        ("closed socket", True, True, "no connection to 127.0.0.1"),
    ],
)
def test_a_failed_call_says_whether_it_passes_and_whether_it_may_be_billed(
    behaviour, transient, maybe_billed, told
):
    with (
        MllmServer(rule=lambda request: behaviour) as server,
        pytest.raises(mllm.CallFailed, match=told) as caught,
    ):
        ask_for(server)
    assert "\n" not in str(caught.value)
    assert (caught.value.transient, caught.value.maybe_billed) == (transient, maybe_billed)


def test_a_slow_answer_is_given_up_and_may_be_billed():
    with MllmServer(["good", "slow"]) as server, pytest.raises(mllm.CallFailed) as caught:
        ask_for(server, times=2, timeout_s=0.5)
    assert caught.value.transient and caught.value.maybe_billed


def test_nobody_listening_bills_nothing():
    with MllmServer() as server:
        pass
    with pytest.raises(mllm.CallFailed, match="start the server or check") as caught:
        ask_for(server)
    assert caught.value.transient and not caught.value.maybe_billed


@pytest.mark.parametrize(
    ("formats", "rejected"), [(["json_object"], 1), ([], 2), (["json_schema"], 0)]
)
def test_the_answer_format_is_found_out_once(formats, rejected, caplog):
    with MllmServer(formats=formats) as server, caplog.at_level(logging.WARNING):
        notes = ask_for(server, times=3)
    assert all(isinstance(note, Note) for note in notes)
    assert server.counts == {"good": 3} | ({"wrong format": rejected} if rejected else {})
    assert len([r for r in caplog.records if r.name == "infra.mllm"]) == bool(rejected)
    says_schema = '"additionalProperties"' in server.requests[-1]["messages"][0]["content"]
    assert says_schema == (rejected > 0)


def test_many_at_once_find_the_format_out_once():
    async def work(ask):
        return await asyncio.gather(*(ask(REQUEST) for _ in range(20)))

    with MllmServer(formats=[]) as server:
        answers = talk(server, work)
    assert server.counts == {"wrong format": 2, "good": 20}
    assert len(answers) == 20
    assert answers[0].usage == {"input": 100, "output": 20, "cached": 0}


def test_the_key_is_sent_and_shown_nowhere(caplog):
    caplog.set_level(logging.DEBUG)
    with MllmServer(key="sk-very-secret") as server:
        (note,) = ask_for(server, secret="sk-very-secret")
    assert isinstance(note, Note)
    with (
        MllmServer(key="another") as server,
        pytest.raises(mllm.CallFailed, match=r"401: .*Bearer \*\*\*.*key was refused") as e,
    ):
        ask_for(server, secret="sk-very-secret")
    assert "very-secret" not in str(e.value) + caplog.text


def test_keys_in_the_environment_of_the_package_stay_there(monkeypatch):
    for name in ("API_KEY", "ADMIN_KEY", "ORG_ID", "PROJECT_ID", "ORGANIZATION"):
        monkeypatch.setenv(f"OPENAI_{name}", "for-another-host")
    for_another = "X-Key: for-another-host\nAuthorization: Bearer for-another-host"
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", for_another)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    with MllmServer() as server:
        ask_for(server)
    ((_, _, headers),) = server.ledger
    assert headers["authorization"] == "Bearer none"
    assert "for-another-host" not in json.dumps(headers)


@pytest.mark.parametrize(
    "url",
    ["localhost:8000", "file:///etc/passwd", "http://", "http://me:pw@host/v1", "http://h/v1?k=1"],
)
def test_only_bare_http_urls_are_endpoints(url):
    with pytest.raises(ValidationError, match="must be"):
        mllm.Endpoint(url=url, model="tiny")


def test_a_picture_that_can_not_be_read_is_no_answer():
    request = replace(REQUEST, pictures=(mllm.Picture("Source image", "c" * 64),))
    with MllmServer() as server, pytest.raises(KeyError):
        ask_for(server, request=request)


def test_a_picture_is_encoded_once_for_neighbouring_requests():
    loaded = []

    def images(image_id):
        loaded.append(image_id)
        return PICTURES[image_id]

    async def work(ask):
        await asyncio.gather(*(ask(REQUEST) for _ in range(8)))

    with MllmServer() as server:
        talk(server, work, images=images)
    assert sorted(loaded) == sorted(PICTURES)
    assert len({tuple(digests(request)) for request in server.requests}) == 1


def test_a_request_key_is_what_a_request_means():
    key = mllm.request_key(REQUEST)
    assert key == mllm.request_key(replace(REQUEST))
    changed = [
        replace(REQUEST, instructions="Answer."),
        replace(REQUEST, pictures=REQUEST.pictures[::-1]),
        replace(REQUEST, text="Compare!"),
        replace(REQUEST, resize="at most 2000 px, JPEG"),
        replace(REQUEST, model="large"),
        replace(REQUEST, max_tokens=101),
        replace(REQUEST, temperature=None),
        replace(REQUEST, seed=4),
        replace(REQUEST, turns=(("user", "Again."),)),
        replace(REQUEST, answer=type("Other", (Note,), {})),
        replace(REQUEST, attempt=1),
    ]
    assert len({key, *map(mllm.request_key, changed)}) == 12
    assert key == mllm.request_key(replace(REQUEST, about=("c" * 64,)))
    assert key == "a9719e98205a02d919e75fd8c8829bcbde4f92a3bc1e3d771d85c27bd1b2f1be"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"instructions": ["a"]}', ["a"]),
        ('so { this } then {"x": 1} then {"instructions": ["b"]}', ["b"]),
        ('{"instructions": "a"}', "instructions: Input should be a valid list"),
        ('{"instructions": [], "x\\u001b[31m": 1}', "x[31m: Extra inputs are not permitted"),
        ("[" * 100_000 + '{"a":' * 100_000, "there is no JSON object in it"),
        ("", "there is no JSON object in it"),
        ('<think>{"instructions": ["no"]}</think> {"instructions": ["c"]}', ["c"]),
        ('{"instructions": ["<think>d</think>"]}', ["<think>d</think>"]),
    ],
)
def test_parse(text, found):
    parsed = mllm.parse(text, Note)
    assert (parsed.instructions if isinstance(parsed, Note) else parsed) == found


def test_an_answer_to_another_question_is_none():
    other = replace(REQUEST, text="Compare two others.", pictures=REQUEST.pictures[::-1])
    with MllmServer(["good", "good", "duplicate", "good"]) as server:
        first, same, wrong, right = send(server, [REQUEST, REQUEST, other, other])
    assert first.text == same.text != right.text
    assert isinstance(wrong, mllm.CallFailed) and "another question" in str(wrong)
    assert wrong.transient and wrong.maybe_billed


def test_ids_that_are_no_names_tell_nothing(monkeypatch):
    def one_id(request):
        reply = good(request)
        reply.body["id"] = "cmpl-0"
        return reply

    monkeypatch.setitem(BEHAVIOURS, "one id", one_id)
    other = replace(REQUEST, pictures=REQUEST.pictures[::-1])
    with MllmServer(rule=lambda request: "one id") as server:
        assert len({reply.text for reply in send(server, [REQUEST, other] * 2)}) == 2


@pytest.mark.parametrize(
    "choices",
    [None, 1, "x", {}, [], [None], ["x"], [{}], [{"message": None}], [{"message": {"content": 7}}]],
)
def test_what_is_shaped_otherwise_is_no_answer(choices, monkeypatch):
    def odd(request):
        reply = good(request)
        reply.body["choices"] = choices
        return reply

    monkeypatch.setitem(BEHAVIOURS, "odd", odd)
    with MllmServer(["odd"]) as server:
        (found,) = send(server, [REQUEST])
    assert isinstance(found, mllm.CallFailed) and "no chat completion" in str(found)


@pytest.mark.parametrize(
    ("changed", "response"),
    [
        ({"usage": 1}, {"usage": None}),
        ({"usage": {"prompt_tokens": "5", "completion_tokens": 1}}, {"usage": None}),
        ({"usage": {"prompt_tokens": 5}}, {"usage": None}),
        (
            {"usage": {"prompt_tokens": 5, "completion_tokens": 1, "prompt_tokens_details": []}},
            {"usage": {"input": 5, "output": 1, "cached": 0}},
        ),
        ({"model": None, "id": 7}, {"model": ""}),
        (
            {"choices": [{"message": {"content": [{"text": "a"}, 1, {"text": "b"}]}}]},
            {"text": "ab", "finish_reason": None},
        ),
        (
            {"choices": [{"message": {"content": "\ud800", "refusal": ["no"]}}]},
            {"text": "?", "status": "answered"},
        ),
    ],
)
def test_what_else_a_server_says_may_be_anything(changed, response, monkeypatch):
    def odd(request):
        reply = good(request)
        reply.body |= changed
        return reply

    monkeypatch.setitem(BEHAVIOURS, "odd", odd)
    with MllmServer(["odd"]) as server:
        (found,) = send(server, [REQUEST])
    assert {name: getattr(found, name) for name in response} == response


def test_an_error_that_comes_as_an_answer_is_told(monkeypatch):
    body = {"error": {"message": "the model is overloaded", "code": 502}}
    monkeypatch.setitem(BEHAVIOURS, "odd", lambda request: Reply(body=body))
    with MllmServer(["odd"]) as server:
        (found,) = send(server, [REQUEST])
    assert "the model is overloaded" in str(found) and "\n" not in str(found)
