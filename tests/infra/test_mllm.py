"""The client against a real server that misbehaves on order."""

import asyncio
import base64
import json
import logging
from dataclasses import replace

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError

from infra import mllm
from infra.errors import ConfigError, PairmillError
from tests.mllm_server import MllmServer, digests

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
    settings = {"url": server.url, "model": "tiny", "backoff_s": 0.001, "attempts": 3}
    return mllm.Endpoint(**settings | changed)


def ask_for(server: MllmServer, times: int = 1, request=REQUEST, **changed):
    """The answers to the same question, asked one time after the other."""

    async def talk():
        async with mllm.connect(endpoint(server, **changed), PICTURES.__getitem__) as client:
            return [await mllm.ask_for(client, request, Note) for _ in range(times)]

    return asyncio.run(talk())


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


@pytest.mark.parametrize("failure", ["429", "429 retry-after", "500", "503", "closed socket"])
def test_what_was_not_billed_is_tried_again(failure):
    with MllmServer([failure, failure]) as server:
        (note,) = ask_for(server)
    assert isinstance(note, Note)
    assert server.counts == {failure: 2, "good": 1}


def test_a_slow_answer_is_given_up_and_asked_for_again():
    with MllmServer(["good", "slow"]) as server:
        notes = ask_for(server, times=2, timeout_s=0.5)
    assert all(isinstance(note, Note) for note in notes)
    assert server.counts == {"good": 2, "slow": 1}


@pytest.mark.parametrize(
    ("failure", "calls"),
    [("500", 3), ("400", 1), ("429 come back tomorrow", 1), ("429 no quota", 1), ("404", 1)],
)
def test_an_endpoint_that_has_answered_before_costs_only_the_call(failure, calls):
    with MllmServer(["good", *[failure] * calls]) as server:
        first, failed, last = ask_for(server, times=3)
    assert isinstance(first, Note) and isinstance(last, Note)
    assert failed.rule == "endpoint_error"
    assert server.counts == {"good": 2, failure: calls}


@pytest.mark.parametrize(
    ("behaviour", "told"),
    [
        ("404", "404: .*no such model.*check endpoint.url"),
        ("429 no quota", "you owe us money.*quota"),
        ("redirect", "redirects elsewhere, which is refused"),
        ("html", "no chat completion; check endpoint.url"),
        ("broken body", "no chat completion"),
        ("closed socket", "no connection to 127.0.0.1"),
    ],
)
def test_an_endpoint_that_has_never_answered_ends_the_build_in_one_line(behaviour, told):
    with (
        MllmServer(rule=lambda request: behaviour) as server,
        pytest.raises(mllm.EndpointUnavailable, match=told) as caught,
    ):
        ask_for(server)
    assert isinstance(caught.value, PairmillError)
    assert "\n" not in str(caught.value)


def test_nobody_listening_ends_the_build():
    with MllmServer() as server:
        pass
    with pytest.raises(mllm.EndpointUnavailable, match="start the server or check"):
        ask_for(server)


def test_three_first_requests_may_be_rejected_before_the_endpoint_is_given_up():
    with MllmServer(["400"] * 3) as server:
        flaw, note = ask_for(server, times=2)
    assert flaw.rule == "endpoint_error" and isinstance(note, Note)
    with (
        MllmServer(rule=lambda request: "400") as server,
        pytest.raises(mllm.EndpointUnavailable, match="not to our liking"),
    ):
        ask_for(server, times=4)


def test_an_endpoint_that_dies_is_not_asked_for_ever():
    with MllmServer(["good"], rule=lambda request: "500") as server:
        _, *flaws = ask_for(server, times=20, concurrency=1, attempts=1)
    assert {flaw.rule for flaw in flaws} == {"endpoint_error"}
    assert server.counts == {"good": 1, "500": 4}


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
    async def talk(server):
        async with mllm.connect(endpoint(server), PICTURES.__getitem__) as client:
            asked = (mllm.ask(client, REQUEST) for _ in range(20))
            return await asyncio.gather(*asked), client.asked

    with MllmServer(formats=[]) as server:
        answers, asked = asyncio.run(talk(server))
    assert server.counts == {"wrong format": 2, "good": 20}
    assert asked == len(answers) == 20
    assert answers[0].usage == {"input": 100, "output": 20}


def test_the_key_is_sent_and_shown_nowhere(monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("TEST_LABEL_KEY", "sk-very-secret")
    with MllmServer(key="sk-very-secret") as server:
        (note,) = ask_for(server, api_key_env="TEST_LABEL_KEY")
    assert isinstance(note, Note)
    with (
        MllmServer(key="another") as server,
        pytest.raises(
            mllm.EndpointUnavailable, match=r"401: .*Bearer \*\*\*.*key was refused"
        ) as e,
    ):
        ask_for(server, api_key_env="TEST_LABEL_KEY")
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


def test_a_missing_key_names_its_variable(monkeypatch):
    monkeypatch.delenv("TEST_LABEL_KEY", raising=False)
    with MllmServer() as server, pytest.raises(ConfigError, match="TEST_LABEL_KEY is not set"):
        ask_for(server, api_key_env="TEST_LABEL_KEY")
    assert not server.ledger


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

    async def talk(server):
        def images(image_id):
            loaded.append(image_id)
            return PICTURES[image_id]

        async with mllm.connect(endpoint(server), images) as client:
            await asyncio.gather(*(mllm.ask(client, REQUEST) for _ in range(8)))

    with MllmServer() as server:
        asyncio.run(talk(server))
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
    ]
    assert len({key, *map(mllm.request_key, changed)}) == 11
    assert key == "62c44e5256552248eb510ee0a7b727e6e7ae15fecc12034fed8d01ae32b1365f"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"instructions": ["a"]}', ["a"]),
        ('so { this } then {"x": 1} then {"instructions": ["b"]}', ["b"]),
        ('{"instructions": "a"}', "instructions: Input should be a valid list"),
        ('{"instructions": [], "x\\u001b[31m": 1}', "x[31m: Extra inputs are not permitted"),
        ("[" * 100_000 + '{"a":' * 100_000, "there is no JSON object in it"),
        ("", "there is no JSON object in it"),
    ],
)
def test_parse(text, found):
    parsed = mllm.parse(text, Note)
    assert (parsed.instructions if isinstance(parsed, Note) else parsed) == found
