"""The report in a real browser: it fits a phone and a desktop, and breaks no rule of its policy."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.tasks.test_report import AGREEMENT, ATTACKED, ATTACKS, CHECKS, World

pytestmark = pytest.mark.browser

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage",
)  # fmt: skip


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
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    window = webdriver.Chrome(options=options, service=Service(driver))
    yield window
    window.quit()


@pytest.fixture(scope="module", params=["calm", "hostile"])
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    world = World(folder)
    if request.param == "hostile":
        world = World(folder, (*ATTACKS[:2], "unbroken" * 40, ATTACKS[4]))
        world.instructions = [*ATTACKS, "W" * 300]
        world.extra = [
            {"level": "object", "id": f"{'folder/' * 40}{attack}", "fate": "unreadable",
             "stage": "describe", "rule": "unreadable", "detail": attack * 20}
            for attack in ATTACKS
        ]  # fmt: skip
    path = folder / "report.html"
    more: dict[str, Any] = (
        {"refused": [*ATTACKS, "publish.gates." + "W" * 300]} if request.param == "hostile" else {}
    )
    world.judged = True
    more |= {"checks": CHECKS, "attacks": ATTACKED, "agreement": AGREEMENT}
    path.write_bytes(world.render_after(world.last_version(), **more))
    return path


@pytest.mark.parametrize("width", [360, 390, 768, 1440])
def test_fits_and_keeps_its_policy(browser: Any, report: Path, width: int) -> None:
    browser.get_log("browser")
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    browser.get(report.as_uri())
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    scroll, client = browser.execute_script(
        "const e = document.documentElement; return [e.scrollWidth, e.clientWidth]"
    )
    assert scroll <= client <= width
    assert browser.execute_script(
        "return [...document.images].map(i => i.complete && i.naturalWidth > 0)"
    ).count(True) == len(browser.find_elements("tag name", "img"))
    assert browser.get_log("browser") == []
    style = "return getComputedStyle(document.querySelector('.masthead h1')).fontSize"
    assert float(browser.execute_script(style).removesuffix("px")) >= 39


def test_the_policy_stops_what_would_slip_through(
    browser: Any, report: Path, tmp_path: Path
) -> None:
    """Were an attack not escaped, neither script nor foreign picture nor style would work."""
    broken = tmp_path / "broken.html"
    attack = (
        "<script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\">"
        "<p id=styled style='color: rgb(1, 2, 3)'>x</p>"
    )
    broken.write_text(report.read_text("utf-8").replace("<main", f"{attack}<main", 1), "utf-8")
    browser.get(broken.as_uri())
    assert "broken" not in browser.title
    colour = "return getComputedStyle(document.getElementById('styled')).color"
    assert browser.execute_script(colour) != "rgb(1, 2, 3)"
    assert len(browser.get_log("browser")) >= 3
