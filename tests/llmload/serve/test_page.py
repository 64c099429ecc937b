"""The page in a real browser of a phone's size: chat, stop, and see who computes.

Without Chromium and its driver (Debian: chromium, chromium-driver) it is skipped, saying so; where
`NATSWARM_BROWSER=require` is set, as in continuous integration, it fails instead.
"""

from __future__ import annotations

import os
import shutil
from functools import partial

import pytest
import trio
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

WIDTH, HEIGHT = 390, 844
WAIT_S = 30


@pytest.fixture
def browser(tmp_path):
    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if missing := [name for name, path in programs.items() if path is None]:
        reason = f"not installed: {', '.join(missing)} (Debian: chromium, chromium-driver)"
        if os.environ.get("NATSWARM_BROWSER") == "require":
            pytest.fail(f"NATSWARM_BROWSER=require, but {reason}")
        pytest.skip(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = programs["chromium"]
    # As root there is no sandbox; the page is ours. Nothing is asked of the network outside.
    for argument in (
        *("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--no-proxy-server"),
        *(
            "--disable-background-networking",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        ),
        f"--user-data-dir={tmp_path / 'profile'}",
    ):
        options.add_argument(argument)
    metrics = {"width": WIDTH, "height": HEIGHT, "pixelRatio": 1.0}
    options.add_experimental_option("mobileEmulation", {"deviceMetrics": metrics})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(programs["chromedriver"])
    with webdriver.Chrome(options=options, service=service) as driver:
        yield driver


async def test_chat_and_see_who_computes(serving, mesh_source, browser):
    async with mesh_source() as source, serving(source) as server:
        await trio.to_thread.run_sync(partial(use_page, browser, server.url))


def use_page(browser, url):
    def one(selector):
        return browser.find_element(By.CSS_SELECTOR, selector)

    def wait(condition):
        return WebDriverWait(browser, WAIT_S, poll_frequency=0.05).until(lambda _: condition())

    browser.get(url)
    wait(lambda: one("#model").text == "model")
    one("#settings summary").click()
    one("#max_tokens").clear()
    one("#max_tokens").send_keys("8")
    one("#settings summary").click()

    one("#text").send_keys("the mesh\n")
    wait(lambda: one("#send").is_enabled())
    assert [each.text for each in browser.find_elements(By.CSS_SELECTOR, ".user")] == ["the mesh"]
    assert one(".assistant").get_attribute("textContent")
    assert not browser.find_elements(By.CSS_SELECTOR, ".error")

    # The route, and the peers behind it.
    wait(lambda: one("#where").text == "kim (0) \u2192 otto (1-2)")
    assert "tokens/s" in one("#speed").text
    one("#swarm summary").click()
    wait(lambda: "kim blocks 0" in one("#peers").text)
    assert "/24" in one("#route").text

    # A long answer, stopped as soon as it is there.
    browser.execute_script("document.getElementById('max_tokens').value = ''")
    one("#text").send_keys("the peers\n")
    wait(
        lambda: browser.find_elements(By.CSS_SELECTOR, ".assistant")[1].get_attribute("textContent")
    )
    one("#stop").click()
    wait(lambda: one("#send").is_enabled())
    answering = "return fetch('/swarm').then(r => r.json()).then(s => s.answering)"
    wait(lambda: browser.execute_script(answering) == 0)

    # It fits on the phone, and nothing was blocked, missing or broken.
    assert browser.execute_script("return document.documentElement.scrollWidth") == WIDTH
    assert [entry["message"] for entry in browser.get_log("browser")] == []
