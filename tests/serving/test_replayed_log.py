"""A log of requests replayed against a running server by the experiments' runner."""

import json

import pytest
from live_server import SERVE_KEY

from experiments.config import make_experiment
from experiments.runners import run_served
from slora_jax import ConfigError


def run_of(live, log, monkeypatch, **changes):
    monkeypatch.setenv("SERVE_KEY", SERVE_KEY)
    content = {
        "mode": "served",
        "model": "mini-llama",
        "server": {"url": live.url, "key_env": "SERVE_KEY"},
        "workload": {"kind": "replay", "path": str(log), "speed": 10},
    }
    (run,) = make_experiment("x", content | changes).runs
    return run.config


def write(tmp_path, *rows):
    log = tmp_path / "log.jsonl"
    fields = ("time", "adapter", "prompt_tokens", "output_tokens")
    log.write_text("".join(json.dumps(dict(zip(fields, row, strict=True))) + "\n" for row in rows))
    return log


ROWS = [(0, "adapter-3", [5, 6, 7], 4), (1, None, [5, 6], 3), (2, "adapter-5", [7] * 20, 6)]


def test_log_is_replayed_against_a_running_server(server, tmp_path, monkeypatch) -> None:
    figures = run_served(run_of(server, write(tmp_path, *ROWS), monkeypatch))
    assert (figures["requests"], figures["completed"], figures["failed"]) == (3, 3, 0)
    assert figures["wall_seconds"] >= 0.2  # the log's two seconds, ten times as fast
    assert figures["token_throughput"] == pytest.approx(13 / figures["wall_seconds"])
    assert 0 < figures["first_token_latency"] <= figures["latency"]


def test_failed_requests_are_counted_and_reported(server, tmp_path, monkeypatch) -> None:
    figures = run_served(run_of(server, write(tmp_path, *ROWS, (3, None, [99999], 2)), monkeypatch))
    assert (figures["completed"], figures["failed"]) == (3, 1)
    assert "token id 99999" in figures["first_failure"]


def test_unknown_adapter_is_refused_before_anything_is_sent(server, tmp_path, monkeypatch) -> None:
    config = run_of(server, write(tmp_path, (0, "unknown", 3, 1)), monkeypatch)
    with pytest.raises(ConfigError, match="the log names adapter 'unknown'; the server has"):
        run_served(config)
    synthetic = {"workload": {"rate": 100, "duration": 1}, "adapters": {"count": 100}}
    with pytest.raises(ConfigError, match="adapters.count=100: the server has 12"):
        run_served(run_of(server, tmp_path / "log.jsonl", monkeypatch, **synthetic))
    with pytest.raises(ConfigError, match="start one with slora serve"):
        run_served(run_of(server, tmp_path / "log.jsonl", monkeypatch, server={"url": "http://127.0.0.1:1"}))
    monkeypatch.delenv("SERVE_KEY")
    with pytest.raises(ConfigError, match="server.key_env='SERVE_KEY': the environment has no such variable"):
        run_served(config)
