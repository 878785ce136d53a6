# SPDX-License-Identifier: Apache-2.0
"""The page's files with their headers, and the engine's load."""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from lightllm_backend.front import engine_load
from lightllm_backend.front.engine_load import load_from_metrics
from lightllm_backend.front.page.router import CONTENT_SECURITY_POLICY, STATIC
from lightllm_backend.triton_server.metric_table import METRICS
from tests.front.page.fake_front import FakeFront, running

FILES = sorted(path.name for path in STATIC.iterdir())


@pytest.fixture(scope="module")
def front() -> Iterator[FakeFront]:
    yield from running()


def ask(front: FakeFront, path: str, method: str = "GET", **headers: str) -> tuple[int, http.client.HTTPMessage, bytes]:
    connection = http.client.HTTPConnection(urlsplit(front.url).netloc, timeout=30)
    connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    try:
        return response.status, response.headers, response.read()
    finally:
        connection.close()


@pytest.mark.parametrize("path", ["/", *(f"/page/{name}" for name in FILES)])
def test_a_file_is_served_once_and_confirmed_afterwards(front: FakeFront, path: str) -> None:
    status, headers, body = ask(front, path)
    assert (status, body) == (200, (STATIC / (path.removeprefix("/page/").strip("/") or "index.html")).read_bytes())
    kind = {"html": "text/html", "js": "javascript", "css": "text/css", "svg": "image/svg"}
    assert kind[path.rpartition(".")[2] if "." in path else "html"] in headers["content-type"]
    again, headers_again, body = ask(front, path, if_none_match=headers["etag"])
    assert (again, body) == (304, b"")
    for got in (headers, headers_again):
        assert got["content-security-policy"] == CONTENT_SECURITY_POLICY
        assert got["cache-control"] == "no-cache"
        assert got["x-content-type-options"] == "nosniff"
    assert ask(front, path, "HEAD")[::2] == (200, b"")


@pytest.mark.parametrize("path", ["/page/", "/page/missing.js", "/page/../router.py", "/page/%2e%2e/router.py"])
def test_what_is_not_a_file_of_the_page_is_not_found(front: FakeFront, path: str) -> None:
    status, _, body = ask(front, path)
    assert status == 404
    assert path in json.loads(body)["error"]["message"] or "%" in path


def test_the_files_name_no_other_host_and_the_document_has_no_script_or_style_inside() -> None:
    for name in FILES:
        text = (STATIC / name).read_text()
        assert set(re.findall(r"https?://[^/\"']+", text)) <= {"http://www.w3.org"}, name  # SVG's namespace
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|DOMParser", text), name
    document = (STATIC / "index.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", document)


def test_every_control_has_a_label() -> None:
    document = (STATIC / "index.html").read_text()
    labelled = set(re.findall(r'<label[^>]* for="([^"]+)"', document))
    for tag in re.findall(r"<(?:input|textarea)[^>]*>", document):
        name = re.search(r' id="([^"]+)"', tag)
        assert "aria-label=" in tag or 'type="radio"' in tag or (name and name[1] in labelled), tag
    for tag, text in re.findall(r"<button([^>]*)>(.*?)</button>", document, re.DOTALL):
        assert "aria-label=" in tag or re.sub(r"<.*?>|\s", "", text), tag


def test_the_load_is_that_of_the_metrics() -> None:
    gauges = ("queued_requests", "running_requests", "kv_tokens_used", "kv_tokens_cached", "kv_tokens_total")
    assert set(engine_load.GAUGES) == set(gauges) < METRICS.keys()
    samples = "".join(f"lightllm_{name} {value}\n" for value, name in enumerate(gauges))
    text = f"# HELP lightllm_engine_up x\n{samples}lightllm_engine_up 0\n"
    assert load_from_metrics(text) == {
        "up": False, "queued_requests": 0, "running_requests": 1, "kv_tokens_used": 2, "kv_tokens_cached": 3,
        "kv_tokens_total": 4,
    }  # fmt: skip
    assert load_from_metrics("lightllm_engine_up 1\n")["up"] is True
    assert set(load_from_metrics("").values()) == {None}


def test_many_pages_cost_one_look_at_the_metrics(front: FakeFront, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_load, "MAX_AGE_S", 1000.0)
    front.metrics = "lightllm_engine_up 1\nlightllm_running_requests 3\n"
    before = front.num_scrapes
    answers = [json.loads(ask(front, "/status")[2]) for _ in range(5)]
    assert answers[0] == {"chat": True, "up": True, "running_requests": 3} | dict.fromkeys(
        ("queued_requests", "kv_tokens_used", "kv_tokens_cached", "kv_tokens_total")
    )
    assert answers == [answers[0]] * 5
    assert front.num_scrapes == before + 1


def test_the_load_asks_for_a_key_and_the_page_does_not() -> None:
    with FakeFront(api_keys=("secret",), has_chat_template=False) as front:
        assert ask(front, "/")[0] == ask(front, "/page/page.js")[0] == 200
        assert ask(front, "/status")[0] == 401
        status, _, body = ask(front, "/status", authorization="Bearer secret")
        assert (status, json.loads(body)["chat"]) == (200, False)
