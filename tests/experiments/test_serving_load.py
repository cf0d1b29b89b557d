"""The load test of the server, in miniature, and its parts."""

import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from tiny_model import MEDIUM, PAGE_SIZE, SHARED_PROGRAMS, TINY_LLAMA, TinyModel

from experiments import run as runner
from experiments.config import load_experiment
from experiments.results_file import read_results
from experiments.rounds import Outcome, side_by_side
from experiments.serving import load_test
from experiments.serving.answers import Answer, Answers, CpuSeconds
from experiments.serving.processes import clients, finish
from experiments.serving.soak import IN_USE, Sample, growth
from experiments.workloads import WorkloadRequest, read_requests, write_requests

CONFIG = runner.RESULTS.parents[1] / "configs" / "measured" / "serving_load.yaml"
SMALL = (
    f"model={TINY_LLAMA}", "adapters.count=12", "adapters.ranks=[2,4,24]", "workload.requests=48", "measured.rounds=1",
    "workload.input_range=[2,25]", "workload.output_range=[2,13]", "client.users=8", "load_test.warm_up=16",
    "load_test.soak_seconds=8", f"system.num_tokens={(MEDIUM['num_pages'] - 1) * PAGE_SIZE}",
    f"system.page_size={PAGE_SIZE}", f"system.max_num_seqs={MEDIUM['max_num_seqs']}",
    f"system.max_num_batched_tokens={MEDIUM['max_num_batched_tokens']}",
    f"engine.max_model_len={MEDIUM['max_model_len']}", f"engine.decode_buckets={list(MEDIUM['decode_buckets'])}",
    f"engine.mixed_buckets={list(MEDIUM['mixed_buckets'])}",
)  # fmt: skip


def test_the_load_test_compares_both_sides(tmp_path, monkeypatch):
    monkeypatch.setattr(load_test, "IDLE_SECONDS", 2.5)
    monkeypatch.setattr(load_test, "write_checkpoint", write_tiny_model)
    for name, value in SHARED_PROGRAMS.items():
        monkeypatch.setenv(name, value)
    output = tmp_path / "out.jsonl"
    directory = f"load_test.directory={tmp_path / 'files'}"
    assert runner.main([str(CONFIG), *SMALL, directory, "--output", str(output)]) == 0
    alone, served, soak = read_results(output).values()
    wanted = sum(request.output for request in read_requests(tmp_path / "files" / "requests.jsonl"))
    for one in (alone["metrics"], served["metrics"]):
        assert (one["requests"], one["tokens"], one["failed"]) == (48, wanted, 0)
        assert one["goodput"] == pytest.approx(wanted / one["seconds"])
        assert 1 < one["tokens_per_step"] <= 8
    assert served["same_tokens"] == [48, 48] and served["versions"]["locust"]
    assert served["over"]["ratios"]["goodput"] == pytest.approx(
        served["metrics"]["goodput"] / alone["metrics"]["goodput"]
    )
    (details,) = soak["details"]
    assert soak["metrics"]["requests"] > 0 and sum(details["pages_when_idle"].values()) == MEDIUM["num_pages"]
    assert details["pages_when_idle"]["kv"] == soak["metrics"]["pages_lost"] == 0
    assert any(sample["pages"]["kv"] for sample in details["samples"])


def write_tiny_model(directory, *_):
    """Writes the model for which the programs of `MEDIUM` are compiled."""
    directory.mkdir()
    TinyModel().save(directory)


def test_half_of_the_requests_are_sampled_and_every_round_has_others(tmp_path):
    run = load_experiment(CONFIG, [*SMALL, f"load_test.directory={tmp_path}"]).runs[0].config
    written = []
    for number in (1, 1, 2):
        load_test._Files(run, tmp_path).write(number)
        written.append(read_requests(tmp_path / "requests.jsonl"))
    assert written[0] == written[1] != written[2]
    assert sum(request.temperature > 0 for request in written[0]) == 24


def test_trained_adapters_of_a_model_with_weights_are_served_beside_random_ones(tmp_path):
    model, trained = tmp_path / "model", tmp_path / "trained"
    write_tiny_model(model)
    changes = [*SMALL, f"model={model}"]
    load_test._Files(load_experiment(CONFIG, changes).runs[0].config, tmp_path / "first").write(1)
    trained.mkdir()
    (tmp_path / "first/adapters/adapter-0003").rename(trained / "haiku")
    run = load_experiment(CONFIG, [*changes, f"load_test.trained={trained}"]).runs[0].config
    load_test._Files(run, tmp_path / "second").write(1)
    adapters = {one.name for one in (tmp_path / "second/adapters").iterdir()}
    assert adapters == {"haiku", *(f"adapter-{i:04d}" for i in range(11))}
    used = {request.adapter for request in read_requests(tmp_path / "second/requests.jsonl")}
    assert "haiku" in used and used <= adapters
    assert not (tmp_path / "second/model").exists()


def test_the_seed_decides_which_adapters_are_popular_in_the_warm_up_and_afterwards(tmp_path):
    changes = ("load_test.warm_up=200", "workload.requests=200", f"load_test.directory={tmp_path}")
    popular = set()
    for seed in range(3):
        run = load_experiment(CONFIG, [*SMALL, *changes, f"seed={seed}"]).runs[0].config
        load_test._Files(run, tmp_path).write(1)
        for name in ("warm_up", "requests"):
            adapters = Counter(request.adapter for request in read_requests(tmp_path / f"{name}.jsonl"))
            popular.add(adapters.most_common(1)[0][0])
    assert len(popular) > 3


def test_a_failure_and_other_tokens_are_problems():
    found = Answers(seconds=1.0, cpu=CpuSeconds(1, 1, 1, 4), answered=[(1, Answer([5], 0.1, 0.2))], failures=["lost"])
    outcome = load_test._outcome(found, None, num_requests=3)
    assert outcome.problems == ("lost",) and outcome.tokens == [[], [5], []] and outcome.metrics["failed"] == 1
    runs = load_experiment(CONFIG, [*SMALL, "measured.rounds=2"]).runs[:2]

    def measure(config, number):
        wrong = number == 2 and config.load_test.side == "served"
        return Outcome({"goodput": 1.0}, [[1, 2], [3], []] if wrong else [[1, 2], [4], [5]], {}, ("lost",) * wrong)

    _, served = side_by_side(runs, measure, warm_up=False)
    assert served["same_tokens"] == [4, 6]
    different = "round 2: 2 of 3 requests have other tokens than alone's: [1, 2]"
    assert served["problems"] == ["round 2: lost", different]


def test_lost_pages_are_a_problem_and_problems_are_exit_status_1(tmp_path, monkeypatch, capsys):
    answers = Answers(1.0, CpuSeconds(1, 1, 1, 4), [(i, Answer([5], 0.1, 0.2)) for i in range(2)])
    samples = [Sample(float(t), 100, 20, 9, {"free": 199}) for t in range(12)]
    lost = dict.fromkeys(IN_USE, 0) | {"free": 190, "prefix_idle": 6, "kv": 3}
    monkeypatch.setattr(load_test._Files, "write", lambda *_: (199, 2))
    monkeypatch.setattr(load_test._Files, "soak", lambda _: (answers, SimpleNamespace(samples=samples), lost))
    arguments = [str(CONFIG), *SMALL, "--panel", "soak", "--output", str(tmp_path / "x.jsonl")]
    assert runner.main([*arguments, "--picture", str(tmp_path / "x.svg")]) == 1
    (soak,) = read_results(tmp_path / "x.jsonl").values()
    assert soak["metrics"]["pages_lost"] == 3
    assert soak["problems"] == ["round 1: 3 pages are neither free nor idle at the end"]
    shown = capsys.readouterr()
    assert "soak: round 1: 3 pages" in shown.err and "1 points, 1 with an error" in shown.out
    assert runner.main(arguments) == 1  # also when the result is read from the file


def test_a_closed_load_test_leaves_the_signal_handler_as_it_was():
    before = signal.getsignal(signal.SIGTERM)
    with closing(load_test.LoadTest()):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


class Liar(BaseHTTPRequestHandler):
    """Streams an answer to each request, with a fault that depends on the request's seed."""

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
    requests = [WorkloadRequest(0.0, (1, 2, 3), "a", 2 + i % 3, seed=i) for i in range(35)]
    write_requests(files[0], requests[:1])
    write_requests(files[1], requests)
    with clients(liar, os.getpid(), 4, *files) as process:
        finish(process, "locust")
    found = Answers.read(files[2])
    right = [i for i in range(35) if FAULTS[i % len(FAULTS)] == "none"]
    assert sorted(number for number, _ in found.answered) == right
    assert found.tokens == sum(requests[i].output for i in right)
    assert len(found.failures) == 35 - len(right)
    for fault, words in (
        ("status", "status 503"), ("too few", "tokens of"), ("reason", "stop"), ("error", "the engine failed"),
        ("no DONE", "without [DONE]"),
    ):  # fmt: skip
        failures = [one for one in found.failures if f"request {FAULTS.index(fault)}:" in one]
        assert len(failures) == 1 and words in failures[0]


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
