"""Workloads from files: lengths, order and bursts are the log's; errors name line and field."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments.workloads import BASE, LogError, azure, engine_requests, real_trace, replay
from slora_jax import ConfigError

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"
ROWS = ["2023-11-16 18:15:46.6805900,374,44", "2023-11-16 18:15:50.6805900,5000,9", "2023-11-16 18:15:56.6805900,8,3"]


@pytest.fixture
def write(tmp_path):
    def make(text: str | bytes, name: str = "trace.csv"):
        file = tmp_path / name
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return file

    return make


def azure_of(path, num_adapters: int = 4, rate: float = 0.5, duration: float = 4.0, **fields):
    return azure(num_adapters=num_adapters, ranks=(8,), rate=rate, duration=duration, path=path, **fields)


def lines(*rows: str) -> str:
    return "\n".join([HEADER, *rows]) + "\n"


# Azure


@pytest.mark.parametrize(
    "text",
    [
        lines(*ROWS),
        "\ufeff" + lines(*ROWS),
        lines(*ROWS).replace("\n", "\r\n"),
        lines(*ROWS).rstrip("\n"),
        lines(*ROWS).replace("\n", "\n\n"),
        lines(*(row + "0" for row in ROWS))
        .replace("TIMESTAMP", " TIMESTAMP ")
        .replace("440", " 44 ")
        .replace("30\n", "3\n"),
        lines(*(row.replace("900,", "9+00:00,") for row in ROWS)),
        "\n".join(f"{row.split(',')[1]},x,{row.split(',')[0]},{row.split(',')[2]}" for row in [HEADER, *ROWS]),
    ],
    ids=["plain", "BOM", "CRLF", "no last newline", "empty lines", "blanks", "time zones", "other columns and order"],
)
def test_azure_keeps_order_and_lengths_and_rescales_time(write, text) -> None:
    file = write(text)
    workload = azure_of(file)
    assert workload.prompt_tokens.tolist() == [374, 8]  # the long one is left out
    assert workload.output_tokens.tolist() == [44, 3]
    assert workload.arrival.tolist() == [0.0, 4.0]
    assert azure_of(str(file), rate=0.75, longest=5001).arrival.tolist() == pytest.approx([0.0, 1.6, 4.0])
    with pytest.raises(LogError, match="2 requests of 1 to 2047 tokens, of rate x duration = 8 wanted"):
        azure_of(file, rate=2.0)


def test_azure_keeps_the_bursts(write) -> None:
    """Gaps are the trace's, all by the same factor, whatever the rate."""
    gaps = np.random.default_rng(5).gamma(0.1, 10.0, 400)
    times = np.cumsum(gaps)
    file = write("\n".join([HEADER, *(f"{time},10,10" for time in times.tolist())]))
    for rate in (2.0, 30.0):
        made = np.diff(azure_of(file, rate=rate, duration=400 / rate).arrival)
        np.testing.assert_allclose(made / made.sum(), gaps[1:] / gaps[1:].sum(), atol=1e-12)


def test_azure_draws_adapters_by_zipf_or_as_the_papers_code(write) -> None:
    count = 20_000
    file = write("\n".join([HEADER, *(f"{i},10,10" for i in range(count))]))
    for exponent in (0.0, 1.0):
        shares = np.bincount(azure_of(file, 5, 1.0, count, exponent=exponent).adapter, minlength=5) / count
        weights = np.array([(i + 1) ** -exponent for i in range(5)])
        assert shares == pytest.approx(weights / weights.sum(), abs=0.02)
    power = azure_of(file, 5, 1.0, count, popularity="power", alpha=0.3)
    assert power.adapter.tolist() == (np.random.RandomState(42).power(0.3, count) * 5).astype(int).tolist()
    assert set(azure_of(file, 0, 1.0, 100).adapter.tolist()) == {BASE}
    with pytest.raises(ConfigError, match="popularity='pareto': must be one of"):
        azure_of(file, popularity="pareto")
    with pytest.raises(ConfigError, match=r"exponent=-1"):
        azure_of(file, exponent=-1.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"trace\.csv, line 1: is empty; must be a header with TIMESTAMP, ContextTokens, GeneratedTokens"),
        ("\n", "line 1: is empty"),
        (HEADER, "0 requests of 1 to 2047 tokens"),
        ("TIMESTAMP,ContextTokens\n", r"line 1: the column GeneratedTokens is missing; there are TIMESTAMP, Con"),
        (HEADER + ",ContextTokens\n", "line 1: the column ContextTokens is there more than once"),
        ("\n".join(ROWS), "line 1: the column TIMESTAMP is missing; there are 2023-11-16"),
        (lines(ROWS[0], "2023-11-16 18:15:50,8"), "line 3: 2 fields; the header has 3"),
        (lines(ROWS[0], ROWS[1] + ",1"), "line 3: 4 fields"),
        (lines(ROWS[0], "2023-11-16 18:15:50,eight,1"), "line 3: ContextTokens='eight': must be a number of tokens"),
        (lines("2023-11-16 18:15:50,-8,1"), "line 2: ContextTokens='-8'"),
        (lines("2023-11-16 18:15:50,8,1.5"), "line 2: GeneratedTokens='1.5'"),
        (lines("2023-11-16 18:15:50,8,"), "line 2: GeneratedTokens=''"),
        (lines("2023-11-16 18:15:50,8," + "9" * 5000), "line 2: GeneratedTokens='9999"),
        (lines("16 Nov 2023,8,1"), "line 2: TIMESTAMP='16 Nov 2023': must be seconds, or a time like"),
        (lines("nan,8,1"), "line 2: TIMESTAMP='nan'"),
        (lines(ROWS[2], "", ROWS[1]), "line 4: TIMESTAMP='2023-11-16 18:15:50.6805900': is before the line"),
        (lines(ROWS[0], ROWS[0]), "the 2 requests wanted span no time"),
        (HEADER.encode() + b"\n\xff\xfe,1,1\n", "after line 0: .*must be text in UTF-8"),
        (lines(*ROWS).encode("utf-16"), "after line 0: .*must be text in UTF-8"),
    ],
)
def test_a_malformed_azure_trace_is_refused_by_line_and_field(write, text, message) -> None:
    with pytest.raises(LogError, match=message):
        azure_of(write(text))


def test_a_file_that_is_not_there_is_an_error_of_the_system(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.csv"):
        azure_of(tmp_path / "gone.csv")


cells = st.one_of(st.integers(-1, 3000).map(str), st.floats().map(str), st.text(max_size=8), st.sampled_from(ROWS))


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.lists(cells, max_size=4).map(",".join), max_size=6), header=st.booleans())
def test_any_text_is_a_workload_or_a_log_error(write, rows, header) -> None:
    text = "\n".join([HEADER] * header + rows).encode("utf-8", "surrogatepass")
    for make in (lambda: azure_of(write(text)), lambda: arena_of(write(text, "log.jsonl"))):
        try:
            assert len(make()) == 2
        except LogError as error:
            assert str(write(text).parent) in str(error)


# The paper's transform of a log


def arena_of(path, num_adapters: int | None = None, rate: float = 0.5, duration: float = 4.0, **fields):
    return real_trace(num_adapters=num_adapters, ranks=(8, 16), rate=rate, duration=duration, path=path, **fields)


def log(seed: int, count: int) -> list[dict]:
    random = np.random.default_rng(seed)
    return [
        {
            "time": float(random.uniform(1e9, 1e9 + 30 * 86400)),
            "model": str(random.choice(["vicuna", "koala", "dolly", "alpaca"])),
            "prompt_tokens": int(random.integers(1, 700)),
            "output_tokens": int(random.integers(1, 700)),
        }
        for _ in range(count)
    ]


def as_jsonl(requests: list[dict]) -> str:
    return "".join(json.dumps(request) + "\n" for request in requests)


def test_the_papers_transform(write) -> None:
    """Its steps in the order of its code, with every long request dropped."""
    requests, wanted = log(1, 1000), 150
    file = write(as_jsonl(requests), "log.jsonl")
    made = arena_of(file, rate=3.0, duration=50.0, seed=9)
    np.random.seed(9)
    sampled = [requests[i] for i in np.random.choice(len(requests), 2 * wanted, replace=False)]
    kept = [r for r in sampled if r["prompt_tokens"] < 512 and r["output_tokens"] < 512][:wanted]
    assert len(kept) == wanted  # or the paper's run would have had fewer
    kept.sort(key=lambda r: r["time"])
    first, last = kept[0]["time"], kept[-1]["time"]
    np.testing.assert_allclose(made.arrival, [(r["time"] - first) / (last - first) * 50.0 for r in kept])
    assert made.prompt_tokens.tolist() == [r["prompt_tokens"] for r in kept]
    assert made.output_tokens.tolist() == [r["output_tokens"] for r in kept]
    assert made.ranks == (8, 16, 8, 16)
    by_model = {(r["model"], a) for r, a in zip(kept, made.adapter.tolist(), strict=True)}
    assert len(by_model) == 4 and {a for _, a in by_model} == {0, 1, 2, 3}
    assert arena_of(file, rate=3.0, duration=50.0, seed=10).arrival.tolist() != made.arrival.tolist()


def test_models_share_adapters_if_there_are_fewer_and_csv_is_read_as_well(write) -> None:
    requests = log(2, 300)
    names = list(requests[0])
    table = "\n".join([",".join(names), *(",".join(str(r[name]) for name in names) for r in requests)])
    both = [
        arena_of(file, 3, rate=2.0, duration=50.0)
        for file in (write(as_jsonl(requests), "log.jsonl"), write(table, "log.csv"))
    ]
    for field in ("arrival", "adapter", "prompt_tokens", "output_tokens"):
        assert getattr(both[0], field).tolist() == getattr(both[1], field).tolist()
    all_own = arena_of(write(as_jsonl(requests), "log.jsonl"), 50, rate=2.0, duration=50.0)
    assert both[0].ranks == (8, 16, 8) and both[0].adapter.tolist() == (all_own.adapter % 3).tolist()
    assert len(all_own.ranks) == 50 and all_own.adapter.max() == 3
    assert set(arena_of(write(as_jsonl(requests), "log.jsonl"), 0).adapter.tolist()) == {BASE}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "0 requests of 1 to 511 tokens"),
        ("[1]\n", r"log\.jsonl, line 1: must be a JSON object, not \[1\]"),
        ("{}\n", "line 1: the field time is missing"),
        (as_jsonl(log(1, 2)) + "{\n", "line 3: .*must be a JSON object"),
        ('{"time": true, "model": "a", "prompt_tokens": 1, "output_tokens": 1}', "line 1: time='True'"),
        ('{"time": 1e999, "model": "a", "prompt_tokens": 1, "output_tokens": 1}', "line 1: time='inf'"),
        ('{"time": 1, "model": " ", "prompt_tokens": 1, "output_tokens": 1}', "line 1: model=' ': must be a name"),
        ('{"time": 1, "model": 5, "prompt_tokens": 1, "output_tokens": 1}', "line 1: model='5'"),
        ('{"time": 1, "model": "a", "prompt_tokens": true, "output_tokens": 1}', "prompt_tokens='True'"),
        ('{"time": 1, "model": "a", "prompt_tokens": 1, "output_tokens": -1}', "output_tokens='-1'"),
        ("[" * 100_000, "must be"),
    ],
)
def test_a_malformed_log_is_refused_by_line_and_field(write, text, message) -> None:
    with pytest.raises(LogError, match=message):
        arena_of(write(text, "log.jsonl"))


# Replay


def replay_of(path, num_adapters: int = 1, **fields):
    return replay(num_adapters=num_adapters, ranks=(8, 4), rate=1.0, duration=1.0, path=path, **fields)


def test_replay_keeps_times_adapters_and_prompts(write) -> None:
    file = write(
        '{"time": 12, "adapter": "b", "prompt_tokens": [3, 4], "output_tokens": 5}\n'
        '{"time": 10, "adapter": "a", "prompt_tokens": 7, "output_tokens": 6, "other": 1}\n'
        '{"time": 11, "adapter": null, "prompt_tokens": 1, "output_tokens": 1}\n',
        "log.jsonl",
    )
    work = replay_of(file, 3, speed=2.0)
    assert work.arrival.tolist() == [0.0, 0.5, 1.0] and work.names == ("a", "b", "2") and work.ranks == (8, 4, 8)
    assert work.adapter.tolist() == [0, BASE, 1]
    assert (work.prompt_tokens.tolist(), work.output_tokens.tolist()) == ([7, 1, 2], [6, 1, 5])
    assert [r.prompt for r in engine_requests(work, 100)][2] == (3, 4)
    assert replay_of(file, 0).adapter.tolist() == [BASE] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_tokens": ...}, "line 1: the field output_tokens is missing"),
        ({"adapter": 3}, "adapter='3': must be a name"),
        ({"prompt_tokens": 0}, "prompt_tokens='0': must be at least 1"),
        ({"prompt_tokens": []}, "must be a number of tokens, or a list"),
        ({"prompt_tokens": [1.5]}, "must be a number of tokens, or a list"),
        ({"output_tokens": 0}, "output_tokens='0': must be at least 1"),
        (None, "has no requests"),
    ],
)
def test_replay_refuses_a_row_by_line_and_field(write, changes, message) -> None:
    row = {"time": 0, "adapter": "a", "prompt_tokens": 1, "output_tokens": 1} | (changes or {})
    text = json.dumps({name: value for name, value in row.items() if value is not ...})
    with pytest.raises(LogError, match=message):
        replay_of(write("" if changes is None else text, "log.jsonl"))
