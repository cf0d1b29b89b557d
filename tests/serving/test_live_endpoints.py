"""The live page's endpoints on a real server: access, and a state that agrees with what was served."""

import json
import urllib.request

from live_server import SERVE_KEY, until

from slora_jax.serving.http.page import page_files
from slora_jax.serving.observability.snapshot import PAGE_KINDS


def test_page_is_served_without_a_key_under_a_strict_policy(server) -> None:
    for name, (content, content_type) in page_files().items():
        path = "/" if name == "index.html" else f"/{name}"
        with urllib.request.urlopen(server.url + path, timeout=30) as answer:
            assert answer.read() == content and answer.headers["Content-Type"] == content_type
            assert answer.headers["Content-Security-Policy"].startswith("default-src 'self'")
    assert server.get("/state")[0] == server.get("/state/pages")[0] == 401


def test_state_agrees_with_what_was_served(server) -> None:
    state = {}

    def has_state(finished: int) -> bool:
        state.update(json.loads(server.get("/state", SERVE_KEY)[1]))
        return state["totals"] and state["totals"]["finished"] >= finished and state["queue"]["running"] == 0

    until(lambda: has_state(0), "the first sample")
    before = state["totals"]["finished"]
    body = {"model": "adapter-3", "prompt": [5, 6, 7], "max_tokens": 9, "ignore_eos": True}
    assert server.post("/v1/completions", body, SERVE_KEY)[0] == 200
    until(lambda: has_state(before + 1), "a sample with the request")
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
