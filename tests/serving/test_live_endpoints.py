"""The live page's endpoints on a real server: who may look, and that they tell what the server does."""

import json
import time
import urllib.request

from live_server import SERVE_KEY

from slora_jax.serving.observation import PAGE_KINDS
from slora_jax.serving.state import live_page_files


def test_the_page_is_served_to_anybody_under_a_strict_policy(server) -> None:
    for name, (content, content_type) in live_page_files().items():
        path = "/" if name == "index.html" else f"/{name}"
        with urllib.request.urlopen(server.url + path, timeout=30) as answer:
            assert answer.read() == content and answer.headers["Content-Type"] == content_type
            assert answer.headers["Content-Security-Policy"].startswith("default-src 'self'")


def test_the_state_is_for_those_with_a_key(server) -> None:
    assert server.get("/state")[0] == server.get("/state/pages")[0] == 401


def test_the_state_tells_what_was_served(server) -> None:
    deadline = time.monotonic() + 20
    while not (before := json.loads(server.get("/state", SERVE_KEY)[1])["totals"]):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    body = {"model": "adapter-3", "prompt": [5, 6, 7], "max_tokens": 9, "ignore_eos": True}
    status, _ = server.post("/v1/completions", body, SERVE_KEY)
    assert status == 200
    while True:
        state = json.loads(server.get("/state", SERVE_KEY)[1])
        if state["totals"]["finished"] > before["finished"] and state["queue"]["running"] == 0:
            break
        assert time.monotonic() < deadline, state
        time.sleep(0.2)
    assert (state["model"], state["status"], state["detail"]) == ("base", "ready", None)
    assert state["latency"]["first_token_p50"] > 0 and state["latency"]["inter_token_p95"] > 0
    assert state["adapters"]["states"]["device"] >= 1 and max(state["history"]["tokens_per_second"]) > 0
    status, pages = server.get("/state/pages", SERVE_KEY)
    counts = {kind: pages.count(bytes([index])) for index, kind in enumerate(PAGE_KINDS)}
    assert status == 200 and counts == state["pool"]["kinds"]


def test_adapters_are_found_by_part_of_a_name_or_digest(server) -> None:
    def found(query: str) -> list[str]:
        answer = json.loads(server.get(f"/v1/adapters?{query}", SERVE_KEY)[1])
        assert answer["total"] >= len(answer["data"])
        return sorted(one["name"] for one in answer["data"])

    assert found("search=ADAPTER-1") == ["adapter-1", "adapter-10", "adapter-11"]
    digest = json.loads(server.get("/v1/adapters?search=adapter-7", SERVE_KEY)[1])["data"][0]["digest"]
    assert found(f"search={digest[4:24]}&limit=5") == ["adapter-7"]
    assert found("search=adapter-99") == [] and len(found("limit=2")) == 2
