"""The GPU benchmark: a miniature of all its cases, and kernels that fail, hang, crash, or are wrong."""

import json
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.kernel_bench import __main__ as command
from experiments.kernel_bench import visit
from experiments.kernel_bench.goals import goals
from pallas_kernels.bench import measure, peers
from pallas_kernels.bench.adapters import resident, spread
from pallas_kernels.bench.case import Case, Program, System, chain
from pallas_kernels.bench.measure import Measurement, distance
from pallas_kernels.bench.models import decoder_layout
from pallas_kernels.bench.pools import random_pages
from pallas_kernels.bench.record import BROKEN_DEVICE, Record
from pallas_kernels.bench.size import FULL, MINIATURE
from pallas_kernels.bench.timing import Timing, time_in_turn
from pallas_kernels.roofline import Work


def cases_of(miniature: bool) -> list[Case]:
    sections = command._sections(command._parser().parse_args([]), miniature)
    return [case for cases in sections.values() for case in cases]


def bench(*arguments: object) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "experiments.kernel_bench", *map(str, arguments)]
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    return subprocess.run(line, env=os.environ | cache, capture_output=True, text=True, check=False)


@pytest.mark.timeout(900)  # a minute of one core's time; more where several share it
def test_miniature_runs_every_case_on_a_cpu(tmp_path):
    out = tmp_path / "results.json"
    done = bench("--miniature", "--budget-seconds", 800, "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(out.read_text())
    assert results["finished"] and results["miniature"] and "under_way" not in results
    assert "--miniature" in results["command"]
    assert results["provenance"].keys() >= {"date", "device", "driver", "versions", "git"}

    for row in results["checks"] + results["rows"]:
        assert "failed" not in row, row
        assert "skipped" not in row or (row["system"] == "loop" and "unrolled" in row["skipped"]), row
    assert all(check["ok"] for check in results["checks"])
    checked = {(c["op"], c["regime"], c["system"]) for c in results["checks"]}
    for regime in ("decode", "prefill"):
        assert checked >= {("lora", regime, system) for system in ("triton", "ragged_dot", "loop")}
        assert ("attention", regime, "triton") in checked
    measured = {(row["op"], row["regime"], row["system"]) for row in results["rows"] if "seconds" in row}
    for regime in ("decode", "prefill"):
        assert measured >= {("lora", regime, system) for system in ("triton", "xla", "ragged_dot", "loop")}
        assert measured >= {("attention", regime, system) for system in ("triton", "xla")}
        assert measured >= {(op, regime, "triton") for op in ("lora_shrink", "lora_expand")}
    assert ("experts", "decode", "triton") in checked
    assert measured >= {("experts", "decode", system) for system in ("triton", "xla")}
    assert measured >= {("write_kv", "write", "xla"), ("write_pages", "write", "xla")}
    assert measured >= {("step", "decode", system) for system in ("base", "1 adapters", "2 adapters")}
    assert measured >= {("ceiling", name, system) for name, system in (("copy", "copy"), ("matmul", "xla"))}
    for row in results["rows"]:
        if "seconds" in row:
            assert row["seconds"] > 0 and row["bytes"] > 0 and len(row["rounds"]) >= 1
            assert row["op"] == "ceiling" or row["over_floor"] == pytest.approx(row["seconds"] / row["floor_seconds"])

    assert [goal["met"] for goal in results["goals"]] == [None] * 4
    plots = ("lora_decode", "lora_ranks", "lora_prefill", "attention", "step")
    assert {path.name for path in tmp_path.glob("*.png")} == {f"results_{name}.png" for name in plots}


def test_compile_only_compiles_for_an_absent_gpu(tmp_path):
    out = tmp_path / "compiled.json"
    case = "^lora_expand decode model=llama-3-8b rows=64 adapters=64 rank=16$"
    assert command.main(["--compile-only", "h200", "--only", "lora", "--match", case, "--out", str(out)]) == 0
    programs = {program["name"]: program for program in json.loads(out.read_text())["programs"]}
    assert programs["lora_expand-llama-3-8b-decode-64-triton-32"]["temp_bytes"] < 2**20  # y is not copied
    assert "ceiling-matmul" in programs


def test_list_prints_the_cases_and_runs_none(capsys):
    assert command.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    label = "lora decode model=llama-3-8b rows=256 adapters=256 rank=16"
    assert any(f"{label}: triton, xla, ragged_dot" in line for line in lines)
    label = "attention prefill model=llama-3-8b rows=4096 sequences=one prompt"
    assert any(f"{label}: triton, mosaic_gpu, xla" in line for line in lines)
    for section in command.SHARES:
        assert any(line.startswith(section) for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget-seconds", "0"], "--budget-seconds: '0': must be a number above 0"),
        (["--budget-seconds", "soon"], "--budget-seconds: 'soon': must be a number above 0"),
        (["--seed", "-1"], "--seed: '-1': must be an integer in 0..2^31-1"),
        (["--match", "("], "is not a regular expression"),
        (["--only", "gemm"], "invalid choice: 'gemm'"),
        (["--compile-only", "h100"], "invalid choice: 'h100'"),
        (["--out", "."], "'.': cannot be written"),
        (["--list", "--compile-only", "h200"], "not allowed with argument"),
    ],
)
def test_invalid_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_match_without_cases_is_refused():
    with pytest.raises(SystemExit, match="'no such case': no case has such a label"):
        command.main(["--list", "--match", "no such case"])


@pytest.mark.parametrize("size", [FULL, MINIATURE], ids=["full", "miniature"])
def test_labels_and_program_names_are_unique(size):
    cases = cases_of(size.miniature)
    labels = [case.label for case in cases]
    assert len(set(labels)) == len(labels)
    programs = {id(s.program): s.program.name for case in cases for s in case.systems if s.program}
    assert len(set(programs.values())) == len(programs)


def test_full_size_has_the_cases_of_the_goals():
    cases = [case for case in cases_of(False) if not case.is_check]
    decode = [case.facts for case in cases if (case.op, case.regime) == ("lora", "decode")]
    assert {facts["adapters"] for facts in decode} == {1, 4, 16, 64, 256}
    assert {facts["rank"] for facts in decode} == {8, 16, 32, 64, 128, "mixed"}
    attention = [case.facts for case in cases if (case.op, case.regime) == ("attention", "decode")]
    assert {facts["context"] for facts in attention} == {2**n for n in range(9, 16)}
    assert {facts["batch"] for facts in attention} == {1, 4, 16, 64, 256}
    steps = {
        case.facts["batch"]: [s.name for s in case.systems]
        for case in cases
        if (case.op, case.regime) == ("step", "decode")
    }
    assert steps[64] == ["base", "1 adapters", "16 adapters", "64 adapters"]
    assert steps[256] == ["base", "1 adapters", "16 adapters", "64 adapters", "256 adapters"]


# Measuring systems that fail


def program(function, name):
    x = jax.ShapeDtypeStruct((8,), jnp.float32)
    return Program(name, jax.jit(function), lambda: (x,))


def system(name, function=lambda x: 2 * x):
    return System(name, program(function, name), chain(lambda: jnp.arange(8.0), lambda: [()]))


def measured(tmp_path, *cases, seconds=100.0):
    record = Record(tmp_path / "results.json")
    Measurement("toy", MINIATURE, record, time.time() + seconds, seconds).run(cases)
    return json.loads(record.path.read_text())


def case(*systems, op="toy", **fields):
    return Case(op, "decode", {}, Work(bytes=100), systems, **fields)


def test_a_failing_system_leaves_the_others_measured(tmp_path):
    def declines(x):
        raise NotImplementedError("takes no float32")

    def breaks(x):
        raise KeyError("tile")

    def bad_start(compiled):
        raise MemoryError("no room")

    def bad_dispatch(compiled):
        def dispatch():
            raise ValueError("no dispatch")

        return dispatch

    systems = [system("declines", declines), system("breaks", breaks), system("works")]
    systems += [System("bad start", start=bad_start), System("bad dispatch", start=bad_dispatch)]
    systems += [System("left out", skip="not today")]
    rows = {row["system"]: row for row in measured(tmp_path, case(*systems))["rows"]}
    assert rows["works"]["seconds"] > 0
    assert rows["declines"]["skipped"] == "takes no float32"
    assert rows["left out"]["skipped"] == "not today"
    assert "KeyError" in rows["breaks"]["failed"]
    assert "no room" in rows["bad start"]["failed"]
    assert "no dispatch" in rows["bad dispatch"]["failed"]


def test_a_missing_package_fails_its_system(tmp_path):
    def imports(x):
        import jax_triton_that_is_not_there  # noqa: F401

    (row,) = measured(tmp_path, case(system("triton", imports)))["rows"]
    assert "No module named 'jax_triton_that_is_not_there'" in row["failed"]


def test_a_wrong_kernel_fails_its_check_and_is_not_timed(tmp_path):
    wrong, nan = system("wrong", lambda x: 2 * x + 0.5), system("nan", lambda x: 2 * x * jnp.nan)
    check = case(system("xla"), wrong, nan, system("right"), tolerance=1e-2)
    results = measured(tmp_path, check, case(wrong, nan, system("right"), op="timed"))
    assert {c["system"]: c["ok"] for c in results["checks"]} == {"wrong": False, "nan": False, "right": True}
    rows = {row["system"]: row for row in results["rows"]}
    assert rows["wrong"]["skipped"] == rows["nan"]["skipped"] == "failed its check"
    assert rows["right"]["seconds"] > 0


def test_results_without_a_reference_are_unchecked(tmp_path):
    def breaks(x):
        raise KeyError("tile")

    check = case(system("xla", breaks), system("ours"), tolerance=1e-2)
    results = measured(tmp_path, check, case(system("ours"), op="timed"))
    assert [c["system"] for c in results["checks"] if "unchecked" in c] == ["ours"]
    (row,) = results["rows"]
    assert row["unchecked"] and row["seconds"] > 0
    assert all(goal["met"] is None for goal in goals([row | {"op": "lora", "over_floor": 1.0}]))


def test_distance_is_relative_and_propagates_nan():
    reference = (jnp.ones(100), 10 * jnp.ones(100))
    assert distance(reference, reference) == (0, 0)
    off = (jnp.ones(100), 10 * jnp.ones(100).at[3].set(1.5))
    assert distance(off, reference) == pytest.approx((0.05, 0.5))
    assert np.isnan(distance((jnp.ones(100).at[0].set(jnp.nan), reference[1]), reference)).all()


def test_cases_after_the_deadline_are_skipped(tmp_path):
    results = measured(tmp_path, case(system("works")), seconds=-1.0)
    assert [(row["system"], row["skipped"]) for row in results["rows"]] == [("works", "out of time")]


def test_a_floor_includes_the_time_of_the_system_it_is_over(tmp_path):
    def ceiling(regime, work):
        return Case("ceiling", regime, {}, work, (system(regime),))

    base, more = system("base"), system("more")
    more = System("more", more.program, more.start, work=Work(bytes=7), over="base")
    cases = (ceiling("copy", Work(bytes=10)), ceiling("matmul", Work(flops=10)), case(base, more, importance=1))
    rows = {row["system"]: row for row in measured(tmp_path, *cases)["rows"]}
    bandwidth = 10 / rows["copy"]["seconds"]
    assert rows["base"]["floor_seconds"] == pytest.approx(100 / bandwidth)
    assert rows["more"]["floor_seconds"] == pytest.approx(rows["base"]["seconds"] + 7 / bandwidth)


def test_timing_interleaves_rounds_and_drops_functions_that_raise():
    order = []

    def dispatch(name, failing_from=None):
        calls = iter(range(10**6))

        def run():
            order.append(name)
            if failing_from is not None and next(calls) >= failing_from:
                raise RuntimeError(name)
            return jnp.zeros(1)

        return run

    systems = {"a": dispatch("a"), "b": dispatch("b"), "never": dispatch("never", 0), "later": dispatch("later", 3)}
    results = time_in_turn(systems, rounds=3, round_seconds=1e-9)
    assert isinstance(results["a"], Timing) and len(results["a"].rounds) in (1, 3)
    assert str(results["never"]) == "never"
    assert "never" not in order[order.index("later") :]


# The measuring processes

CHILD = """
import os, sys, time
if sys.argv[2] == "late":
    time.sleep(100)
from pathlib import Path
from pallas_kernels.bench.case import Case, System
from pallas_kernels.bench.measure import Measurement
from pallas_kernels.bench.record import BROKEN_DEVICE, Record
from pallas_kernels.roofline import Work
path, mode = Path(sys.argv[1]), sys.argv[2]
record = Record(path)
measurement = Measurement("lora", None, record, 0.0, 1.0)
if mode == "compiler":
    record.begin(9.0)
    os.abort()
case = Case("lora", "decode", {}, Work(), tuple(map(System, ("hang", "crash", "device", "works"))))
other = Case("lora", "prefill", {}, Work(), (System("triton"),))
if not record.has(case, "hang"):
    with measurement._watched(0.5, case, "hang"):
        time.sleep(100)
if not record.has(case, "crash"):
    with measurement._watched(9.0, case, "crash"):
        os.abort()
if not record.has(case, "device"):
    record.add(case, "device", "lora", failed="illegal access")
    os._exit(BROKEN_DEVICE)
if not record.has(case, "works"):
    record.add(case, "works", "lora", seconds=1.0)
if not record.has(other, "triton"):
    with measurement._watched(9.0, other):
        os.abort()
"""


def test_after_a_hang_or_crash_a_new_process_measures_what_is_left(tmp_path):
    """A crash between systems fails the whole case."""
    path = tmp_path / "results.json"
    command.run_section([sys.executable, "-c", CHILD, str(path), "all"], path, time.time() + 280, dict(os.environ))
    results = json.loads(path.read_text())
    assert [(row["label"], row["system"], row.get("failed")) for row in results["rows"]] == [
        ("lora decode", "hang", "hung"),
        ("lora decode", "crash", "died of SIGABRT"),
        ("lora decode", "device", "illegal access"),
        ("lora decode", "works", None),
        ("lora prefill", "", "died of SIGABRT"),
    ]
    assert "ended_early" not in results


@pytest.mark.parametrize(("mode", "seconds", "reason"), [("compiler", 280, "SIGABRT"), ("late", 0, "past its")])
def test_a_section_whose_process_dies_outside_of_a_system_ends_early(tmp_path, monkeypatch, mode, seconds, reason):
    if mode == "late":
        monkeypatch.setattr(command, "RESERVE", 0.1)
    path = tmp_path / "results.json"
    command.run_section([sys.executable, "-c", CHILD, str(path), mode], path, time.time() + seconds, dict(os.environ))
    results = json.loads(path.read_text())
    assert reason in results["ended_early"][mode] and results["rows"] == []


def test_a_broken_device_ends_the_process_after_its_failure_is_recorded(tmp_path, monkeypatch):
    def breaks(x):
        monkeypatch.setattr(measure.jax, "block_until_ready", breaks)
        raise ValueError("illegal access")

    def leave(status):
        raise SystemExit(status)

    monkeypatch.setattr(measure.os, "_exit", leave)
    with pytest.raises(SystemExit, match=str(BROKEN_DEVICE)):
        measured(tmp_path, case(System("breaks", start=breaks)))
    assert "illegal access" in json.loads((tmp_path / "results.json").read_text())["rows"][0]["failed"]


@pytest.mark.parametrize("call", visit.CALLS)
def test_a_visits_call_runs_the_benchmark_and_keeps_its_compiled_programs(tmp_path, monkeypatch, call):
    def run(line, env, check):
        args = command._parser().parse_args(line[3:])  # after: python -m experiments.kernel_bench
        assert args.miniature and args.budget_seconds <= visit.CALLS[call][0]
        assert any(command._sections(args, True)[name] for name in args.only)
        found.append(sorted(os.listdir(env["JAX_COMPILATION_CACHE_DIR"])))
        (tmp_path / "1" / "compiled_programs" / "step").write_text("program")
        return subprocess.CompletedProcess(line, 1)

    found: list[list[str]] = []
    (tmp_path / "1" / "compiled_programs").mkdir(parents=True)
    monkeypatch.setattr(visit.subprocess, "run", run)
    assert visit.main([str(call), "--rehearse", "--out", str(tmp_path / "1")]) == 1
    archive = tmp_path / "1" / visit.CACHE
    visit.main([str(call), "--rehearse", "--out", str(tmp_path / "2"), "--cache", str(archive)])
    assert found == [[], ["step"]]


# Goals and inputs


def row(op, regime, system, label, over_floor=1.0, fraction=1.0, **facts):
    numbers = {"over_floor": over_floor, "bandwidth_fraction": fraction}
    return {"op": op, "regime": regime, "system": system, "label": label, "facts": facts, **numbers}


def test_goals_take_the_best_backend_of_a_case_and_the_worst_case():
    rows = [
        row("lora", "decode", "triton", "a", fraction=0.7, adapters=64),
        row("lora", "decode", "faster", "a", fraction=0.85, adapters=64),
        row("lora", "decode", "triton", "b", fraction=0.9, adapters=256),
        row("lora", "decode", "triton", "few", fraction=0.1, adapters=16),
        row("lora", "decode", "ragged_dot", "b", fraction=0.95, adapters=256),
        row("lora", "prefill", "triton", "c", over_floor=1.5, adapters=1),
        row("step", "decode", "64 adapters", "d", over_floor=1.1, rank=16),
        row("step", "decode", "256 adapters", "d", over_floor=9.0, rank=16),
    ]
    decode, attention, prefill, step = goals(rows)
    assert decode["met"] is True and decode["measured"].startswith("0.850 at worst (a, faster)")
    assert attention["met"] is None
    assert prefill["met"] is False and "0 of 1 cases" in prefill["measured"]
    assert step["met"] is True


def test_a_page_repeats_only_after_all_were_used(rng):
    pages = random_pages(14, 8, rng)
    assert sorted(pages[:7]) == sorted(pages[7:]) == list(range(1, 8))


def test_rows_are_spread_evenly():
    assert spread(10, 4).tolist() == [3, 3, 2, 2]


def test_baselines_read_the_adapters_matrices(rng):
    """`x A B` from the contiguous copies equals the sum over rows of tiles, read by the layout's own arithmetic."""
    layout = decoder_layout(hidden_size=24, q_width=32, kv_width=16, intermediate_size=40, page_size=8)
    adapters = resident(layout, "ragged", slots=3, max_rank=12, pool_pages=400, rng=rng)
    pool = rng.standard_normal((400, 2, 8, 16)).astype(np.float32)
    slots = np.array([2, 0])
    weights = peers.contiguous(jnp.asarray(pool), adapters.table(), jnp.asarray(slots), layout, 12)
    tiles, _ = layout.stack_tiles(adapters.ranks)

    def matrix(slot, first, row, columns):
        numbers = [int(first) + c for c in range(-(-columns // 16))]
        return np.concatenate([pool[adapters.pages[slot, t // 2], t % 2, row % 8] for t in numbers])[:columns]

    for stack, place, (a, bs) in zip(layout.stacks, tiles, weights, strict=True):
        for i, slot in enumerate(slots):
            of_slot = type(place)(*(field[slot] for field in vars(place).values()))
            row = 0
            for p, (index, d_out) in enumerate(zip(stack.rank_index, stack.d_outs, strict=True)):
                rank = adapters.ranks[slot, index]
                for j in range(12):
                    a_row, b_row = a[i, :, p * 12 + j], bs[p][i, j]
                    if j >= rank:
                        assert not a_row.any() and not b_row.any()
                        continue
                    expected = matrix(slot, layout.a_tile(stack, of_slot, row // 8), row, stack.d_in)
                    np.testing.assert_array_equal(a_row, expected)
                    expected = matrix(slot, layout.b_tile(stack, of_slot, row // 8), row, d_out)
                    np.testing.assert_array_equal(b_row, expected)
                    row += 1
