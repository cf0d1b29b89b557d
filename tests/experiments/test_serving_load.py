"""The load test of the server, in miniature, and what its parts find."""

import dataclasses
import json
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from experiments.serving.answers import Answer, Answers, different_tokens
from experiments.serving.processes import clients, finish
from experiments.serving.soak import Sample, growth
from experiments.serving.traffic import Traffic, make_requests, read_requests, write_requests
from experiments.serving_load import QUICK, compare, problems

COMPILATION_CACHE = Path(__file__).parents[2] / ".cache" / "jax"
TRAFFIC = Traffic(requests=200, prompt_low=2, prompt_high=5, output_low=2, output_high=4)


def test_the_load_test_compares_both_sides(tmp_path):
    engine = QUICK.engine | {"compilation_cache_dir": str(COMPILATION_CACHE)}
    results = compare(dataclasses.replace(QUICK, engine=engine, soak_seconds=8.0), tmp_path)  # 8 samples, one a second
    assert problems(results) == []
    [one] = results["rounds"]
    wanted = sum(request.max_tokens for request in read_requests(tmp_path / "requests.jsonl"))
    for side in ("alone", "served"):
        assert (one[side]["requests"], one[side]["tokens"]) == (QUICK.traffic.requests, wanted)
        assert one[side]["goodput"] == pytest.approx(wanted / one[side]["seconds"], rel=0.1)
        assert 1 < one[side]["tokens_per_step"] <= QUICK.users
    assert one["ratio"] == pytest.approx(one["served"]["goodput"] / one["alone"]["goodput"], rel=0.01)
    soak = results["soak"]
    assert soak["requests"] > 0 and sum(soak["pages_when_idle"].values()) == QUICK.engine["num_pages"]
    assert soak["pages_when_idle"]["kv"] == soak["pages_lost"] == 0
    assert any(sample["pages"]["kv"] for sample in soak["samples"])
    json.dumps(results)

    one["served"]["failures"] = ["lost"]
    one["requests_with_different_tokens"] = [3]
    soak["pages_lost"] = 1
    assert len(problems(results)) == 3


class Liar(BaseHTTPRequestHandler):
    """Streams an answer to each request; what is wrong with it depends on the request's seed."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        wrong = FAULTS[body["seed"] % len(FAULTS)]
        if wrong == "status":
            self.send_response(503)
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(b"full")
            return
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        count = body["max_tokens"] - (wrong == "too few")
        for i in range(count):
            reason = None if i + 1 < count else "stop" if wrong == "reason" else "length"
            self._event({"choices": [{"token_ids": [7], "finish_reason": reason}]})
            if wrong == "cut":
                self.close_connection = True
                return
            if wrong == "error":
                self._event({"error": {"message": "the engine failed"}})
                break
        if wrong != "no DONE":
            self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _event(self, data: object) -> None:
        self._chunk(b"data: " + json.dumps(data).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def log_message(self, *_: object) -> None:
        pass


FAULTS = ("none", "status", "too few", "reason", "cut", "error", "no DONE")


@pytest.fixture
def liar() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Liar) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_clients_find_every_fault_and_go_on(liar, tmp_path):
    files = [tmp_path / name for name in ("warm_up", "requests", "answers")]
    requests = make_requests(dataclasses.replace(TRAFFIC, requests=35), ["a"], 100, seed=0)
    write_requests(files[0], requests[:1])
    write_requests(files[1], requests)
    with clients(liar, os.getpid(), 4, *files) as process:
        finish(process, "locust")
    found = Answers.read(files[2])
    right = [i for i in range(35) if FAULTS[i % len(FAULTS)] == "none"]
    assert sorted(number for number, _ in found.answered) == right
    assert found.tokens == sum(requests[i].max_tokens for i in right)
    assert len(found.failures) == 35 - len(right)
    for fault, words in (
        ("status", "status 503"), ("too few", "tokens of"), ("reason", "stop"), ("error", "the engine failed"),
        ("no DONE", "without [DONE]"),
    ):  # fmt: skip
        failures = [one for one in found.failures if f"request {FAULTS.index(fault)}:" in one]
        assert len(failures) == 1 and words in failures[0]


def test_requests_are_the_same_from_a_file_and_their_adapters_follow_zipf(tmp_path, seed):
    adapters = [f"adapter-{i}" for i in range(20)]
    requests = make_requests(dataclasses.replace(TRAFFIC, requests=3000), adapters, 100, seed)
    write_requests(tmp_path / "requests", requests)
    assert read_requests(tmp_path / "requests") == requests
    counts = sorted((sum(one.adapter == name for one in requests) for name in adapters), reverse=True)
    assert counts[0] / counts[1] == pytest.approx(2, rel=0.3) and min(counts) > 0
    assert sum(one.temperature > 0 for one in requests) == 1500


def test_growth_is_the_slope_after_the_beginning():
    began = time.monotonic()
    samples = [
        Sample(began + t, rss_mib=1000 * min(t, 30) + 0.5 * t, file_handles=20 + t % 2, threads=9, pages={})
        for t in range(120)
    ]
    found = growth(samples)
    assert found["rss_mib"]["per_minute"] == pytest.approx(30)
    assert abs(found["file_handles"]["per_minute"]) < 2 * found["file_handles"]["standard_error"]
    assert (found["threads"]["per_minute"], found["threads"]["most"]) == (0, 9)


def test_different_tokens_names_the_requests_that_differ_or_lack_an_answer():
    one, other = (
        Answers(answered=[(i, Answer([i, 5], 0.1, 0.2)) for i in numbers]) for numbers in ((0, 1, 2), (1, 2, 3))
    )
    other.answered[0][1].token_ids[1] = 6
    assert different_tokens(one, other) == [0, 1, 3]
