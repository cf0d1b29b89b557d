"""The picture of a trace is drawn from the file's events, with disk reads and without."""

import pytest

from experiments.run_trace import counters, draw, tracks

PAGES = ("free", "kv", "prefix_in_use", "prefix_idle", "adapter_in_use", "adapter_idle")
TRACKS = ("host", "adapter uploads", "device, even steps", "device, odd steps", "disk: worker")


def events(steps=20):
    names = [{"name": "thread_name", "ph": "M", "pid": 0, "tid": i, "args": {"name": t}} for i, t in enumerate(TRACKS)]
    made = []
    for i in range(steps):
        ts = 1000.0 * i
        pages = dict(zip(PAGES, (8 - i % 4, i % 4, 1, 1, 3, 2), strict=True))
        made += [
            {"name": "pool (pages)", "ph": "C", "pid": 0, "ts": ts, "args": pages},
            {"name": "queues (requests)", "ph": "C", "pid": 0, "ts": ts, "args": {"running": i, "waiting": 3}},
            {"name": "step", "ph": "X", "pid": 0, "tid": 0, "ts": ts, "dur": 900.0, "args": {}},
            {"name": "schedule", "ph": "X", "pid": 0, "tid": 0, "ts": ts, "dur": 100.0, "args": {}},
            {"name": f"step {i}", "ph": "X", "pid": 0, "tid": 2 + i % 2, "ts": ts, "dur": 1500.0, "args": {}},
        ]
    made.append({"name": "read", "ph": "X", "pid": 0, "tid": 4, "ts": 3000.0, "dur": 9000.0, "args": {}})
    return names + made


def test_events_are_found_by_track_and_counters_by_name() -> None:
    by_track = tracks(events())
    assert set(by_track) == set(TRACKS)
    assert [len(by_track[t]) for t in TRACKS] == [40, 0, 10, 10, 1]
    times, series = counters(events(), "pool")
    assert times.tolist() == list(range(20))  # ms
    assert sum(series.values()).tolist() == [15] * 20


@pytest.mark.parametrize("with_reads", [True, False])
def test_the_picture_is_drawn(tmp_path, with_reads) -> None:
    draw([e for e in events() if with_reads or e["name"] != "read"], tmp_path / "new" / "trace.png")
    assert (tmp_path / "new" / "trace.png").read_bytes().startswith(b"\x89PNG")
