# SPDX-License-Identifier: Apache-2.0
"""The page in a real browser, before a front whose answers the test writes."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from perf.capacity import best, cost, stored_capacities
from perf.capacity_page import FOLDER
from tests.front.page.fake_front import MODEL, WAIT, FakeFront, running

sync_api = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
Browser, Page, expect = sync_api.Browser, sync_api.Page, sync_api.expect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
EXECUTABLE = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(EXECUTABLE is None, reason=f"no browser is installed: {', '.join(NAMES)}")

PHONE = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}
METRICS = """lightllm_engine_up 1
lightllm_running_requests 3
lightllm_queued_requests 2
lightllm_kv_tokens_used 250
lightllm_kv_tokens_cached 500
lightllm_kv_tokens_total 1000
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        # Chromium's sandbox does not run as root, as in most containers.
        browser = playwright.chromium.launch(
            executable_path=EXECUTABLE,
            chromium_sandbox=os.geteuid() != 0,
            args=["--disable-dev-shm-usage", "--disable-gpu"],
        )
        expect.set_options(timeout=WAIT * 1000)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def front() -> Iterator[FakeFront]:
    yield from running()


class Tab:
    """An open page, and what its console complained about. Calls that the front refuses are no complaint."""

    def __init__(self, browser: Any, front: FakeFront, **options: Any) -> None:
        self.front = front
        self.context = browser.new_context(reduced_motion="reduce", **options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(WAIT * 1000)
        self.complaints: list[str] = []
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(front.url)

    def _on_console(self, message: Any) -> None:
        is_refusal = message.text.startswith("Failed to load resource") and re.search(
            "/v1/|/status", message.location["url"]
        )
        if message.type in ("error", "warning") and not is_refusal:
            self.complaints.append(message.text)

    def send(self, text: str) -> Any:
        """Send a prompt, and return its call."""
        self.page.get_by_label("Your prompt").fill(text)
        self.page.get_by_role("button", name="Send").click()
        return self.front.next_call()

    @property
    def last(self) -> Any:
        return self.page.locator("article").last

    def background(self) -> str:
        return str(self.page.evaluate("getComputedStyle(document.body).backgroundColor"))


@pytest.fixture
def open_tab(browser: Any, front: FakeFront) -> Iterator[Any]:
    tabs: list[Tab] = []

    def open_one(front: FakeFront = front, **options: Any) -> Tab:
        tabs.append(Tab(browser, front, **options))
        return tabs[-1]

    yield open_one
    for tab in tabs:
        tab.context.close()
    assert [tab.complaints for tab in tabs] == [[]] * len(tabs)


def test_an_answer_comes_token_by_token(open_tab: Any) -> None:
    tab = open_tab()
    tab.page.get_by_label("Top-k").fill("40")
    tab.page.get_by_label("Stop strings").fill("END\n\\n")
    tab.page.get_by_label("Your prompt").fill("Hi")
    tab.page.keyboard.press("Enter")
    call = tab.front.next_call()
    assert call.path == "/v1/chat/completions"
    assert call.body == {
        "model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "stream": True,
        "stream_options": {"include_usage": True}, "temperature": 0.7, "top_p": 0.95, "top_k": 40, "max_tokens": 512,
        "stop": ["END", "\n"],
    }  # fmt: skip
    call.token("Hm.", "reasoning_content")
    expect(tab.last.locator(".thoughts")).to_have_text("Hm.")
    call.token("Hello ")
    expect(tab.last.locator(".answer")).to_have_text("Hello")
    expect(tab.last).to_have_attribute("aria-busy", "true")
    expect(tab.page.get_by_role("button", name="Stop")).to_be_visible()
    call.token("**wor")
    expect(tab.last.locator(".answer")).to_have_text("Hello **wor")
    call.token("ld**!")
    expect(tab.last.locator("strong")).to_have_text("world")
    call.finish("length", completion_tokens=1234)
    expect(tab.last.locator(".facts")).to_have_text(
        re.compile(r"1,234 tokens · [\d.]+ tokens/s · first token [\d.]+ m?s · ended at max tokens")
    )
    expect(tab.last).to_have_attribute("aria-busy", "false")
    expect(tab.page.locator("#first")).to_have_text(re.compile("s$"))

    second = tab.send("And now?")
    assert [message["content"] for message in second.body["messages"]] == ["Hi", "Hello **world**!", "And now?"]
    second.finish()
    expect(tab.page.get_by_role("button", name="Send")).to_be_visible()


def test_markup_of_a_model_stays_text(open_tab: Any) -> None:
    tab = open_tab()
    call = tab.send("Attack")
    attack = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    call.token(f"{attack}\n\n## Title\n- one `{attack}`\n  - two\n\n```html\n{attack}\n**x**\n```\n> {attack}")
    call.finish()
    answer = tab.last.locator(".answer")
    expect(answer.locator("h5")).to_have_text("Title")
    expect(answer.locator("ul ul li")).to_have_text("two")
    expect(answer.locator("pre code")).to_have_text(f"{attack}\n**x**")
    expect(answer.locator("blockquote")).to_have_text(attack)
    assert answer.locator("img, script").count() == 0
    assert answer.text_content().count(attack) == 4


def test_stop_ends_the_request_and_keeps_what_had_come(open_tab: Any) -> None:
    tab = open_tab()
    tab.page.get_by_text("Completion", exact=True).click()
    by_button = tab.send("Once upon")
    assert (by_button.path, by_button.body["prompt"]) == ("/v1/completions", "Once upon")
    by_button.token(" a time")
    expect(tab.last.locator(".text")).to_have_text("Once upon a time")
    tab.page.get_by_role("button", name="Stop").click()
    assert by_button.has_ended.wait(WAIT)
    expect(tab.last.locator(".facts")).to_have_text(re.compile("stopped"))
    expect(tab.last.locator(".text")).to_have_text("Once upon a time")

    by_key = tab.send("Twice")
    by_key.token(" upon")
    expect(tab.last.locator(".text")).to_have_text("Twice upon")
    tab.page.keyboard.press("Escape")
    assert by_key.has_ended.wait(WAIT)
    expect(tab.page.get_by_role("button", name="Send")).to_be_visible()


def test_an_error_is_shown_in_words_and_the_prompt_can_be_tried_again(open_tab: Any) -> None:
    tab = open_tab()
    alert = tab.page.get_by_role("alert")
    tab.send("Hi").refuse(400, "temperature is -1; allowed: a finite temperature ≥ 0")
    expect(alert).to_have_text("temperature is -1; allowed: a finite temperature ≥ 0")

    tab.page.get_by_role("button", name="Try again").click()
    call = tab.front.next_call()
    expect(alert).to_be_hidden()
    call.token("He")
    call.event({"error": {"message": "the engine has failed", "type": "server_error"}})
    call.close()
    expect(alert).to_have_text("the engine has failed")
    expect(tab.last.locator(".answer")).to_have_text("He")

    tab.page.get_by_role("button", name="Try again").click()
    call = tab.front.next_call()
    call.token("Hel")
    call.close()
    expect(alert).to_have_text("The server ended the answer early.")

    tab.context.set_offline(True)
    tab.page.get_by_role("button", name="Try again").click()
    expect(alert).to_have_text("The server cannot be reached.")
    tab.context.set_offline(False)
    # What has not been answered is not told to the model.
    assert [message["content"] for message in tab.send("Again").body["messages"]] == ["Again"]
    tab.complaints = [text for text in tab.complaints if "ERR_INTERNET_DISCONNECTED" not in text]


def test_a_reload_keeps_the_conversation_the_draft_and_the_settings(open_tab: Any) -> None:
    tab = open_tab()
    call = tab.send("Hi")
    call.token("Hello")
    call.finish()
    expect(tab.last.locator(".facts")).to_have_text(re.compile("2 tokens"))
    tab.page.get_by_label("Seed").fill("7")
    half = tab.send("Go on")
    half.token("On and")
    expect(tab.last.locator(".answer")).to_have_text("On and")
    tab.page.get_by_label("Your prompt").fill("a draft")
    tab.page.reload()
    assert half.has_ended.wait(WAIT)
    expect(tab.page.locator(".given")).to_have_text(["Hi", "Go on"])
    expect(tab.page.locator(".answer")).to_have_text(["Hello", "On and"])
    expect(tab.last.locator(".facts")).to_have_text(re.compile("stopped"))
    expect(tab.page.get_by_label("Your prompt")).to_have_value("a draft")
    assert tab.send("More").body["seed"] == 7

    tab.page.get_by_role("button", name="New conversation").click()
    expect(tab.page.locator("article")).to_have_count(0)
    tab.page.reload()
    expect(tab.page.get_by_role("heading", name="Ask the model something")).to_be_visible()


def test_light_and_dark_follow_the_system_until_the_reader_chooses(open_tab: Any) -> None:
    tab = open_tab(color_scheme="dark")
    dark = tab.background()
    tab.page.emulate_media(color_scheme="light")
    light = tab.background()
    assert light != dark
    switch = tab.page.get_by_role("button", name="Dark colours")
    expect(switch).to_have_attribute("aria-pressed", "false")
    switch.click()
    assert tab.background() == dark
    tab.page.reload()
    assert tab.background() == dark
    expect(switch).to_have_attribute("aria-pressed", "true")
    switch.click()  # the system's own choice: from now on the page follows it again
    assert tab.background() == light
    tab.page.emulate_media(color_scheme="dark")
    assert tab.background() == dark


def test_on_a_phone_everything_is_in_reach(open_tab: Any) -> None:
    tab = open_tab(**PHONE)
    expect(tab.page.get_by_label("Max tokens")).to_be_hidden()
    tab.page.get_by_role("button", name="Engine and settings").tap()
    tab.page.get_by_label("Max tokens").fill("9")
    tab.page.keyboard.press("Escape")
    expect(tab.page.get_by_label("Max tokens")).to_be_hidden()
    call = tab.send("Hi")
    assert call.body["max_tokens"] == 9
    call.token("a-very-long-word-" * 30 + "\n```\n" + "long line of code " * 20)
    call.finish()
    expect(tab.last.locator("pre")).to_be_visible()
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= PHONE["viewport"]["width"]
    for button in tab.page.locator("button.round:visible, button.quiet:visible").all():
        assert min(button.bounding_box()[side] for side in ("width", "height")) >= 40


def test_the_engine_s_load_is_live(open_tab: Any, front: FakeFront) -> None:
    front.metrics = METRICS
    tab = open_tab()
    expect(tab.page.get_by_role("status")).to_have_text("ready")
    expect(tab.page.locator("#running")).to_have_text("3")
    expect(tab.page.locator("#queued")).to_have_text("2")
    expect(tab.page.locator("#kv")).to_have_text("25 %")
    expect(tab.page.locator("#kv-tokens")).to_have_text("250 of 1,000 · 500 cached")
    assert tab.page.locator("#kv-chart .line.layer-2").get_attribute("d")
    front.metrics = METRICS.replace("running_requests 3", "running_requests 4").replace("up 1", "up 0")
    expect(tab.page.locator("#running")).to_have_text("4")
    expect(tab.page.get_by_role("status")).to_have_text("not ready")


def test_a_key_is_asked_for_and_kept_and_a_model_without_chat_template_completes(open_tab: Any) -> None:
    with FakeFront(api_keys=("secret",), has_chat_template=False) as front:
        tab = open_tab(front)
        dialog = tab.page.get_by_role("dialog")
        dialog.get_by_label("API key").fill("wrong")
        tab.page.keyboard.press("Enter")
        expect(dialog.locator("#key-note")).to_have_text(re.compile("the API key is not one of the server's keys"))
        dialog.get_by_label("API key").fill("secret")
        dialog.get_by_role("button", name="Continue").click()
        expect(tab.page.locator("#model")).to_have_text(MODEL)
        expect(tab.page.get_by_role("radio", name="Chat")).to_be_disabled()
        expect(tab.page.get_by_role("heading", name="Begin a text")).to_be_visible()
        tab.page.reload()
        expect(tab.page.locator("#model")).to_have_text(MODEL)
        expect(dialog).to_be_hidden()
        call = tab.send("Hi")
        call.token(" there")
        call.finish()
        expect(tab.last.locator(".text")).to_have_text("Hi there")


def test_the_documentation_s_page_of_costs_calculates_under_a_strict_policy(browser: Any) -> None:
    """Here, since a browser takes a second to start."""
    policy = "default-src 'none'; script-src 'self'; style-src 'self'"
    [result] = [one for one in stored_capacities() if one["model"] == "llama-7b"]
    complaints: list[str] = []
    context = browser.new_context()
    context.route(
        "**/*",
        lambda route: route.fulfill(
            path=FOLDER / route.request.url.rpartition("/")[2], headers={"Content-Security-Policy": policy}
        ),
    )
    page = context.new_page()
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto("http://docs.test/cost.html")
    page.get_by_label("Model").select_option(result["model"])
    page.get_by_label("Replicas").select_option("8")
    page.get_by_label("The proxy chooses by").select_option("both")
    page.get_by_label("Dollars for a GPU and hour").fill("3.6")
    [row] = [row for row in best(result["rows"], 0.5) if (row["replicas"], row["policy"]) == (8, "both")]
    dollars = cost(row, result["gpus"], price=3.6)
    for name, value in zip(("A million output tokens", "A million tokens of"), dollars.values(), strict=True):
        shown = page.get_by_role("row", name=name).get_by_role("cell").inner_text()
        assert float(shown.removeprefix("$")) == pytest.approx(value, rel=0.01)
    page.get_by_label("Dollars for a GPU and hour").fill("-1")
    expect(page.locator("output")).to_have_text("The price is -1; allowed: a number of at least 0.")
    context.close()
    assert complaints == []
