"""The page in a real headless browser, on a real server: two panes, poles, promotion with progress, reload, cancel."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from steer import pocket
from steer.engine import Engine
from steer.server.promotions import Promotions

CHROMIUM = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: scripts/browser.sh installs Debian's")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        made = p.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"],
        )
        yield made
        made.close()


@pytest.fixture(scope="module", autouse=True)
def own_weights(engine: Engine) -> Iterator[None]:
    """A promotion changes what the session's engine serves; this puts it back."""
    yield
    if engine.weights_path != str(pocket.MODEL):
        engine.update_weights(pocket.MODEL)


@pytest.fixture
def page(browser: Any, served: tuple[str, Promotions]) -> Iterator[Any]:
    made = browser.new_page(viewport={"width": 1200, "height": 1000})
    errors: list[str] = []
    outside: list[str] = []
    made.on("pageerror", lambda e: errors.append(str(e)))
    made.on("request", lambda r: outside.append(r.url) if not r.url.startswith((served[0], "data:", "blob:")) else None)
    made.goto(served[0])
    made.wait_for_selector("#generate")
    yield made
    made.close()
    assert errors == []
    assert outside == [], "the page asks nobody but its own server"


def test_two_panes_from_one_prompt_and_seed(page: Any) -> None:
    poles = page.locator("#poles").inner_text()
    assert "suggests alternatives" in poles
    assert "accepts the direction it is given" in poles
    page.fill("#prompt textarea", "Can you cook the soup with garlic?")
    page.click("#generate")
    page.wait_for_function(
        "document.querySelector('#steered-receipt').innerText.includes('tokens steered')", timeout=30_000
    )
    plain, steered = (page.input_value(f"#{side} textarea") for side in ("plain", "steered"))
    assert plain
    assert steered
    assert re.search(r"\d+ tokens steered at layer \d", page.locator("#steered-receipt").inner_text())
    assert "steered" not in page.locator("#plain-receipt").inner_text()


def test_the_whole_grammar_as_json(page: Any) -> None:
    page.click("text=Settings")
    page.fill(
        "#spec textarea",
        '[{"vector": "accept", "op": "ablate"}, {"vector": "warm", "op": "reflect", "tokens": [-3, null]}]',
    )
    page.click("#generate")
    page.wait_for_function(
        "document.querySelector('#steered-receipt').innerText.includes('tokens steered')", timeout=30_000
    )
    page.fill("#spec textarea", '[{"vector": "accept", "op": "sing"}]')
    page.click("#generate")
    page.wait_for_selector("text=steering[0].op", timeout=10_000)


def test_an_empty_prompt_says_so(page: Any) -> None:
    page.fill("#prompt textarea", "  ")
    page.click("#generate")
    page.wait_for_selector("text=Write a prompt first.", timeout=10_000)


def test_promotion_runs_outside_the_page_and_survives_a_reload(page: Any, served: tuple[str, Promotions]) -> None:
    address, promotions = served
    version = promotions.engine.weight_version
    page.click("#promote")
    page.wait_for_function("/training step|training/.test(document.querySelector('#job').innerText)", timeout=90_000)
    page.reload()
    page.wait_for_function("document.querySelector('#job [data-state=done]') !== null", timeout=240_000)
    text = page.locator("#job").inner_text()
    assert "the vector is off" in text
    assert f"weight version {version} → {version + 1}" in text
    assert page.locator("#loss svg").count() == 1
    job = promotions.jobs.all()[0]
    assert [r["step"] for r in promotions.jobs.losses(job.id)] == list(range(1, 7))
    assert promotions.engine.weight_version == version + 1
    assert job.result["weight_version"] == {"before": version, "after": version + 1}
    health = page.request.get(f"{address}/health").json()
    assert health["weight_version"] == version + 1


def test_a_vector_file_that_is_broken_is_named(page: Any, served: tuple[str, Promotions]) -> None:
    (served[1].root / "vectors" / "zzz.safetensors").write_bytes(b"junk")
    page.reload()
    page.wait_for_selector("#vector input")
    page.click("#vector input")
    page.click("text=zzz")
    page.wait_for_selector("text=not a readable vector file", timeout=10_000)
    (served[1].root / "vectors" / "zzz.safetensors").unlink()
