"""The page of the gold set, over real HTTP and in a real browser."""

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import polars as pl
import pytest

from flows.gold import sample
from flows.gold_page import Desk, Item, Served, served
from infra import gold
from infra.corpus import Source
from infra.errors import PairmillError
from infra.store import Location, open_store
from infra.text import plain
from tests import pictures
from tests.e2e.test_report_browser import FLAGS
from tests.tasks.test_report import ATTACKS

TEXTS = ("Make it red <b>now</b>", "Like this one, but at night", *ATTACKS)
KEPT = (
    "content-security-policy", "x-content-type-options", "referrer-policy", "cache-control",
    "cross-origin-resource-policy",
)  # fmt: skip


class Page(Served):
    """A page that is served, its gold file, and the items on it."""

    desk: Desk

    @property
    def names(self) -> list[str]:
        return list(self.desk.items)


def make_desk(folder: Path, count: int = 4) -> Desk:
    """Pictures 0..n, each the source of the next one; one of them has gone."""
    bucket = open_store(Location(uri=str(folder / "corpus")))
    ids, sources = [], {}
    for seed in range(count + 1):
        data = pictures.jpeg(300 + 40 * seed, 220, seed)
        ids.append(hashlib.sha256(data).hexdigest())
        bucket.put(f"{seed}.jpg", data)
        sources[ids[-1]] = Source(f"{seed}.jpg", "loose", "1", len(data))
    bucket.delete(f"{count}.jpg")
    items = [
        Item(hashlib.sha256(f"{at}".encode()).hexdigest(), ids[at], ids[at + 1], TEXTS[at])
        for at in range(count)
    ]
    return Desk(items, folder / "gold.jsonl", "ann", bucket, sources)


@contextmanager
def running(desk: Desk) -> Iterator[Page]:
    page = Page(*served(desk))
    page.desk = desk
    thread = threading.Thread(target=page.run, daemon=True)
    thread.start()
    try:
        yield page
    finally:
        page.server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    folder = tmp_path_factory.mktemp("desk")
    (folder / "corpus").mkdir()
    with running(make_desk(folder)) as found:
        yield found


@pytest.fixture
def page(opened: Page) -> Page:
    """The page with nothing judged yet."""
    opened.desk.path.unlink(missing_ok=True)
    opened.desk.who = "ann"
    return opened


@pytest.fixture
def client(page: Page) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=page.address, trust_env=False) as found:
        yield found


def say(client: httpx.Client, item: str, verdict: str | None, **more: Any) -> int:
    return client.post("verdict", json={"item": item, "verdict": verdict, **more}).status_code


def test_a_verdict_is_kept_and_a_second_one_replaces_it(page: Page, client: httpx.Client) -> None:
    first, second, *_ = page.names
    assert say(client, first, "wrong", reason="vague") == 204
    assert say(client, second, "fits", reason="vague") == 204
    assert say(client, first, "partly", reason="untrue") == 204
    rows = {row.item: row for row in gold.read(page.desk.path)}
    item = page.desk.items[first]
    found = rows[item.pair_id, item.instruction]
    assert len(rows) == 2
    assert (found.verdict, found.reason, found.who) == ("partly", "untrue", "ann")
    assert (found.query, found.target) == (item.query, item.target)
    told = {row["item"]: row for row in client.get("items").json()["items"]}
    assert [told[name]["verdict"] for name in page.names] == ["partly", "fits", None, None]
    assert told[second]["reason"] == "none"  # what fits needs no reason


def test_a_verdict_is_taken_back(page: Page, client: httpx.Client) -> None:
    first = page.names[0]
    assert say(client, first, "fits") == say(client, first, None) == 204
    assert say(client, first, None) == 204
    assert gold.read(page.desk.path) == []


def test_another_person_is_left_alone(page: Page, client: httpx.Client) -> None:
    first = page.names[0]
    assert say(client, first, "fits") == 204
    page.desk.who = "bo"
    assert say(client, first, "wrong", reason="vague") == 204
    assert say(client, first, None) == 204
    assert [(row.who, row.verdict) for row in gold.read(page.desk.path)] == [("ann", "fits")]


def test_pictures_come_by_id_from_the_sample(page: Page, client: httpx.Client) -> None:
    item = page.desk.items[page.names[0]]
    answer = client.get(f"picture/{item.query}")
    assert answer.headers["content-type"] == "image/jpeg"
    assert answer.content[:3] == b"\xff\xd8\xff"
    gone = page.desk.items[page.names[-1]].target
    assert client.get(f"picture/{gone}").status_code == 404
    assert client.get(f"picture/{'0' * 64}").status_code == 404


def test_a_file_that_changed_is_not_shown(page: Page, client: httpx.Client) -> None:
    changed = page.desk.items[page.names[2]].query
    (page.desk.path.parent / "corpus/2.jpg").write_bytes(pictures.jpeg(64, 64, 99))
    assert client.get(f"picture/{changed}").status_code == 404


@pytest.mark.parametrize(
    "path",
    [
        "picture/0.jpg", "picture/../gold.jsonl", "picture/%2e%2e%2fgold.jsonl", "picture/%00",
        f"picture/{'A' * 64}", f"picture/{'0' * 64}/..", "picture//etc/passwd", "gold.py",
        "gold.jsonl", "..%2f..%2fpyproject.toml", "docs", "openapi.json", "verdict",
    ],
)  # fmt: skip
def test_paths_lead_nowhere(client: httpx.Client, path: str) -> None:
    status = raw(client, f"/{path}").partition(" ")[2][:3]
    assert status in ("404", "405", "422", "403")


def raw(client: httpx.Client, path: str, *headers: str) -> str:
    """The answer to a request that no client would tidy up."""
    import socket

    address = client.base_url
    with socket.create_connection((address.host, address.port)) as link:
        token = address.path.strip("/")
        lines = [f"GET /{token}{path} HTTP/1.1", "Connection: close"]
        lines += headers or (f"Host: {address.host}:{address.port}",)
        link.sendall("\r\n".join([*lines, "", ""]).encode())
        return b"".join(iter(lambda: link.recv(65536), b"")).decode("latin-1")


@pytest.mark.parametrize(
    "headers",
    [
        ("Host: evil.example",), ("Host: evil.example:{port}",), ("Host: 127.0.0.1",),
        ("Host: 127.0.0.1.evil.example:{port}",), ("Host: 0.0.0.0:{port}",),
        ("Host: 127.0.0.1:{port}", "Host: evil.example"),
    ],
)  # fmt: skip
def test_another_host_is_refused(client: httpx.Client, headers: tuple[str, ...]) -> None:
    port = str(client.base_url.port)
    answer = raw(client, "/items", *(header.replace("{port}", port) for header in headers))
    assert answer.partition(" ")[2][:3] == "400"
    assert "instruction" not in answer


def test_localhost_is_this_host(client: httpx.Client) -> None:
    assert "200 OK" in raw(client, "/items", f"Host: LocalHost:{client.base_url.port}")


def test_without_the_token_there_is_nothing(page: Page, client: httpx.Client) -> None:
    token = client.base_url.path.strip("/")
    assert len(token) >= 32
    root = page.address.removesuffix(f"{token}/")
    for path in ("", "items", "gold.js", "x/items", f"{token[:-1]}/items", f"{token}x/items",
                 "%00/items", "\u00fc/items", f"?token={token}", token):  # fmt: skip
        answer = httpx.get(root + path, trust_env=False)
        assert answer.status_code == 403, path
        assert token not in answer.text


def test_another_page_may_not_send(page: Page, client: httpx.Client) -> None:
    body = json.dumps({"item": page.names[0], "verdict": "fits"})
    for headers in (
        {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"},
    ):  # fmt: skip
        sent = {"Content-Type": "application/json", **headers}
        assert client.post("verdict", content=body, headers=sent).status_code == 403
    # What a form of another page could send without asking.
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        headers = {"Content-Type": kind}
        assert client.post("verdict", content=body, headers=headers).status_code == 415
    answer = client.options("verdict", headers={"Access-Control-Request-Method": "POST"})
    assert not any(name.startswith("access-control") for name in answer.headers)
    assert gold.read(page.desk.path) == []


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"item": "../../etc/passwd", "verdict": "fits"}, 422),
        ({"item": "0" * 64, "verdict": "fits"}, 404),
        ({"item": None, "verdict": "fits"}, 422),
        ({"verdict": "fits"}, 422),
        ({"verdict": "good"}, 422),
        ({"verdict": "wrong", "reason": "<script>"}, 422),
        ({"verdict": "fits", "path": "/etc/passwd"}, 422),
        ([], 422),
        ("x" * 5_000, 413),
    ],
)
def test_what_is_sent_is_checked(page: Page, client: httpx.Client, body: Any, status: int) -> None:
    if isinstance(body, dict) and "item" not in body and len(body) > 1:
        body = {"item": page.names[0], **body}
    assert client.post("verdict", json=body).status_code == status
    assert gold.read(page.desk.path) == []


def test_a_body_without_a_length_is_bounded_too(client: httpx.Client) -> None:
    parts = iter([b"x" * 1_000] * 100)
    headers = {"Content-Type": "application/json"}
    assert client.post("verdict", content=parts, headers=headers).status_code == 413


def test_every_answer_says_what_a_browser_may_do(page: Page, client: httpx.Client) -> None:
    item = page.desk.items[page.names[0]]
    for path in (
        "",
        "items",
        "gold.js",
        "gold.css",
        "gold.svg",
        f"picture/{item.query}",
        "nothing",
    ):
        answer = client.get(path)
        assert set(KEPT) <= set(answer.headers), path
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
    assert "<script>" not in client.get("").text  # what runs is in a file of its own


def test_the_sample_goes_over_spaces_and_is_a_function_of_the_set() -> None:
    ids = [hashlib.sha256(bytes([at])).hexdigest() for at in range(60)]
    ties = [
        [{"space": "dino" if at % 6 else "clip", "in_band": True},
         {"space": "text", "in_band": False}]
        for at in range(60)
    ]  # fmt: skip
    labels = pl.DataFrame({"pair_id": ids, "instructions": [["one", "two", "three"]] * 60})
    pairs = pl.DataFrame({"pair_id": ids, "query": ids, "target": ids, "ties": ties})
    found = sample(labels, pairs, 12)
    spaces = [ties[ids.index(item.pair_id)][0]["space"] for item in found]
    assert sorted(spaces) == ["clip"] * 6 + ["dino"] * 6
    assert len({item.instruction for item in sample(labels, pairs, 60)}) == 3
    mixed = labels.sample(fraction=1, shuffle=True, seed=1)
    assert sample(mixed, pairs.reverse(), 12) == found
    assert sample(labels, pairs, 20)[:12] == found
    assert len(sample(labels, pairs, 1000)) == 60


def test_a_port_that_is_taken_is_told_in_one_line(page: Page) -> None:
    port = page.listening.getsockname()[1]
    with pytest.raises(PairmillError, match=f"port {port} is taken"):
        served(page.desk, port)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("Chromium and its driver are not installed: apt install chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    profile = tmp_path_factory.mktemp("profile")
    for flag in (*FLAGS, f"--user-data-dir={profile}", "--window-size=1280,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    window = webdriver.Chrome(options=options, service=Service(driver))
    yield window
    window.quit()


@pytest.mark.browser
def test_pairs_are_judged_by_keyboard(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    (tmp_path / "corpus").mkdir()
    desk = make_desk(tmp_path, len(TEXTS))

    def told(name: str) -> str:
        return str(browser.find_element(By.ID, name).text)

    def wait(condition: Any) -> None:
        WebDriverWait(browser, 10, 0.02).until(lambda _: condition())

    def press(keys: str, then: str) -> None:
        for key in keys:
            browser.find_element(By.TAG_NAME, "body").send_keys(key)
        wait(lambda: told("place") == f"{then} of {len(TEXTS)} judged")

    with running(desk) as page:
        browser.get(page.address)
        press("", "0")
        loaded = "return [...document.images].every(i => i.complete && i.naturalWidth > 0)"
        wait(lambda: browser.execute_script(loaded))
        assert told("instruction") == TEXTS[0]  # shown as text, whatever it holds
        press("1", "1")
        assert told("instruction") == TEXTS[1]
        press("36", "2")
        press("u", "1")
        assert told("instruction") == TEXTS[1]
        press("24", "2")
        for done in range(3, len(TEXTS) + 1):
            assert told("instruction") == " ".join(plain(TEXTS[done - 1]).split())
            press("1", str(done))
        wait(lambda: browser.find_element(By.ID, "done").is_displayed())
        assert told("sum") == f"{len(TEXTS) - 1} fit, 1 fit partly, 0 are wrong."
        said = {row.instruction: (row.verdict, row.reason) for row in gold.read(desk.path)}
        assert said[TEXTS[1]] == ("partly", "wrong_target")
        assert len(said) == len(TEXTS)
        # The one picture that has gone is all that a browser complains of.
        logged = [line["message"] for line in browser.get_log("browser")]
        assert logged and [line for line in logged if "404" not in line] == []
        assert "alert" not in browser.title
