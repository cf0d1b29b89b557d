"""Step programs: compiled in parts on a CPU, cached on disk, interrupted by Ctrl-C."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from slora_jax import ConfigError, EngineConfig, SamplingParams
from slora_jax.adapters import random_adapter
from slora_jax.engine import sizing
from slora_jax.engine.program_cache import ProgramCache
from slora_jax.engine.programs import on_threads
from slora_jax.engine.sizing import coarse, pages_that_fit, pool_shape, step_spec
from slora_jax.engine.step_spec import StepSpec

PROMPTS = [[3, 17, 5, 9], [40, 41], list(range(60, 70))]
PARTS = ("begin", "lora_prepare", "lora_layer", "end")


def answers(engine):
    """Tokens and logits of requests with an adapter, in one prefill step."""
    engine.load_adapter("a", random_adapter(engine.store.geometry, rank=8, targets=("q", "v", "down"), seed=1))
    outputs = engine.generate(PROMPTS, SamplingParams(max_tokens=1, ignore_eos=True), "a")
    return [o.token_ids for o in outputs], np.concatenate([o.logits for o in outputs])


def test_whole_step_layered_step_and_programs_from_disk_give_the_same_answers(tiny, tmp_path, monkeypatch):
    settings = {"keep_logits": True, "compile_ahead": False, "compilation_cache_dir": tmp_path}
    with tiny.engine(**settings) as engine:
        tokens, logits = answers(engine)
        programs = engine.executor.device.programs.programs
        assert {program.name for program in programs} == {f"mixed_16_{part}" for part in PARTS}
        assert not any(program.is_cached for program in programs)
    with tiny.engine(**settings) as engine:
        places = [layer.unsafe_buffer_pointer() for layer in engine.executor.device.pool]
        again = answers(engine)
        assert all(program.is_cached for program in engine.executor.device.programs.programs)
        assert [layer.unsafe_buffer_pointer() for layer in engine.executor.device.pool] == places, "updated in place"
    assert again[0] == tokens
    np.testing.assert_array_equal(again[1], logits)
    monkeypatch.setattr(StepSpec, "layered", False)
    with tiny.engine(**settings) as engine:
        whole_tokens, whole_logits = answers(engine)
        assert {program.name for program in engine.executor.device.programs.programs} == {"mixed_16_lora"}
    assert tokens == whole_tokens
    np.testing.assert_allclose(logits, whole_logits, atol=1e-5)


def test_cached_program_is_found_by_its_spec_and_compiled_again_if_damaged(tiny, tmp_path, caplog):
    """The entry is of a small function: the key is the engine's spec, and what the caller says of the program."""
    config = tiny.settings()
    specs = [
        step_spec(tiny.config, tiny.graphdef, tiny.params, each, pool_shape(tiny.config, each))
        for each in (config, config, replace(config, max_lora_rank=24), replace(config, num_pages=80))
    ]
    first, same, *others = (ProgramCache(tmp_path, spec) for spec in specs)
    first.compile("double", "16", jax.jit(lambda x: 2 * x).lower(np.ones(3)))
    assert same.load("double", "16")(np.arange(3.0)).tolist() == [0, 2, 4]
    assert [cache.load("double", "16") for cache in others] == [None, None]
    assert same.load("double", "32") is None and same.load("triple", "16") is None
    (entry,) = tmp_path.iterdir()
    entry.write_bytes(entry.read_bytes()[:100])
    with caplog.at_level(logging.WARNING, "slora_jax"):
        assert same.load("double", "16") is None
    assert f"{entry}: this compiled program cannot be used" in caplog.text


def test_compiling_on_use_compiles_only_what_a_request_needs(tiny):
    config = {"compile_ahead": False, "max_num_seqs": 1, "decode_buckets": (1,), "mixed_buckets": (16,)}
    with tiny.engine(max_num_batched_tokens=16, **config) as engine:
        programs = engine.executor.device.programs
        assert programs.programs == []
        engine.generate([[1, 2, 3]], SamplingParams(max_tokens=1, ignore_eos=True))
        assert {p.name for p in programs.programs} == {"mixed_16_begin", "mixed_16_layer", "mixed_16_end"}
        engine.generate([[1, 2, 3]], SamplingParams(max_tokens=2, ignore_eos=True, temperature=1.0, logprobs=1))
        new = {"decode_1_begin", "decode_1_layer", "decode_1_end", "sample_1", "logprobs_1"}
        names = new | {"mixed_16_begin", "mixed_16_layer", "mixed_16_end"}
        assert {p.name for p in programs.programs} == names
        engine.generate([[1, 2, 3]], SamplingParams(max_tokens=1, top_k=4, top_p=0.5))  # greedy
        assert {p.name for p in programs.programs} == names
        engine.generate([[1, 2, 3]], SamplingParams(max_tokens=1, temperature=1.0, top_p=0.5))
        assert {p.name for p in programs.programs} == names | {"cutoff_1"}


def test_pools_of_similar_memory_have_one_size():
    for pages in (1, 2, 31, 32, 33, 1000, 9983, 123456):
        assert pages * 15 / 16 < coarse(pages) <= pages
    assert coarse(9983) == coarse(9876) == 9728
    assert len({coarse(pages) for pages in range(1000, 2000)}) <= 17


START = """
import sys, jax
from slora_jax import Engine, EngineConfig, SamplingParams
from slora_jax.engine import sizing
misses = []
jax.monitoring.register_event_listener(lambda name, **_: misses.append(name) if name.endswith("cache_misses") else None)
sizing.os = type("os", (), {"sysconf": lambda name, real=sizing.os.sysconf: {
    "SC_PHYS_PAGES": 1 << 18, "SC_AVPHYS_PAGES": int(float(sys.argv[3]) * (1 << 18))}.get(name, real(name))})
few = dict(max_num_seqs=1, max_num_batched_tokens=16, mixed_buckets=(16,), lora="off", compile_ahead=False)
config = EngineConfig(compilation_cache_dir=sys.argv[2], dtype="float32", **few)
with Engine.from_pretrained(sys.argv[1], config) as engine:
    engine.generate([[3, 4, 5]], SamplingParams(max_tokens=1))
    programs = engine.executor.device.programs.programs
    print(sum(not program.is_cached for program in programs), len(misses), engine.allocator.capacity)
"""


def test_second_start_compiles_nothing_although_free_memory_differs(model_dir, tmp_path):
    """Counts step programs that were not on disk and misses of JAX's cache, over the whole process."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": ""}
    environment.pop("JAX_COMPILATION_CACHE_DIR")
    counts = []
    for free in ("0.93", "0.71"):
        done = subprocess.run(
            [sys.executable, "-c", START, str(model_dir), str(tmp_path), free],
            capture_output=True, text=True, env=environment, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        counts.append([int(n) for n in done.stdout.split()])
    first, second = counts
    assert first[0] > 0
    assert first[1] > 0
    assert second[:2] == [0, 0]
    assert first[2] == second[2]


def test_an_exception_leaves_programs_that_are_being_compiled():
    release, begun = threading.Event(), []

    def fails():
        raise ValueError("no such shape")

    def waits():
        begun.append(1)
        release.wait(60)

    jobs = {"fails": fails, **{f"waits{i}": waits for i in range(6)}}
    with pytest.raises(ValueError, match="no such shape"):
        list(on_threads(jobs, 2))
    release.set()
    while any(thread.name == "compile" for thread in threading.enumerate()):
        time.sleep(0.01)
    assert len(begun) <= 2


INTERRUPTED = """
import sys
from slora_jax import Engine, EngineConfig
from slora_jax.engine import programs
compile = programs._compile
def told(*args):
    print("compiling", flush=True)
    return compile(*args)
programs._compile = told
Engine.from_pretrained(sys.argv[1], EngineConfig(compilation_cache_dir=None, dtype="float32", num_pages=100))
"""


def test_ctrl_c_while_programs_compile_ends_the_process_cleanly(model_dir: Path):
    """The first ends it after the programs under way; more of them change nothing."""
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(model_dir)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT)
    assert "KeyboardInterrupt" in errors
    assert "Fatal" not in errors


def test_a_compile_thread_whose_start_was_interrupted_ends_the_process_without_a_crash():
    code = """
import threading
from slora_jax.engine import programs
programs.GRACE_SECONDS = 0.1
programs._running.add(threading.Thread())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (130, "")


def test_the_pool_is_sized_from_the_memory_of_the_engines_own_devices(tiny, monkeypatch) -> None:
    """The second of two engines must not be sized by the first one's devices, which are full."""
    full, empty = ({"bytes_limit": 2**30, "bytes_in_use": used} for used in (2**30 - 1, 0))
    devices = [SimpleNamespace(process_index=0, memory_stats=stats.copy) for stats in (full, full, empty, empty)]
    monkeypatch.setattr(sizing.jax, "devices", lambda: devices)
    config = EngineConfig(dtype="float32", tensor_parallel_size=2, max_model_len=64, progress=False)
    assert pages_that_fit(tiny.config, replace(config, tp_first_device=2)) > 1000
    with pytest.raises(ConfigError, match="num_pages=None"):
        pages_that_fit(tiny.config, config)
