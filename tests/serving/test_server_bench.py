"""The benchmark of the HTTP server measures a real server, started without a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.server_bench.__main__ import HERE, PARTS, WIDTHS, Server, one_round
from experiments.server_bench.server import STEP_SECONDS
from slora_jax.demo.checkpoint import write_checkpoint

STREAMS = 4


@pytest.fixture
def bench_server(tmp_path: Path):
    write_checkpoint(tmp_path / "model", 1, 0, WIDTHS)
    with Server(HERE, 0, tmp_path / "model", tmp_path / "log") as server:
        yield server


def test_paced_streams_get_a_token_each_interval(bench_server: Server) -> None:
    found = one_round(bench_server, STREAMS, is_paced=True, seconds=1.0)
    assert 0 < found["tokens_per_second"] <= 2 * STREAMS / STEP_SECONDS
    assert 0 < found["added_ms_p50"] <= found["added_ms_p99"]
    parts = [found[f"{name}_us_per_token"] for name in PARTS]
    assert sum(parts) == pytest.approx(found["cpu_us_per_token"]) and 0 < found["client_core_share"] < 1
    free = one_round(bench_server, STREAMS, is_paced=False, seconds=0.5)
    assert free["tokens_per_second"] > found["tokens_per_second"]
