"""Memory of an engine on a CPU, and its time per token: `python -m experiments.memory_parts --model MODEL`.

Resident memory of this process after each part of a start, in MiB; the anonymous part of it is what no other process
shares and no file backs. With CUDA wheels installed, JAX maps their libraries, which count as resident.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from experiments.machine import provenance, write_json
from slora_jax import Engine, EngineConfig, SamplingParams
from slora_jax.engine.placement import load
from slora_jax.engine.text import load_tokenizer
from slora_jax.models.quantised import num_bytes
from slora_jax.scheduling.config import WEIGHTS

PROMPT = "The capital of France is"
TOKENS = 32
"""Tokens of a timed run."""


def resident() -> dict[str, float]:
    """Resident and anonymous memory of this process in MiB."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return {"resident": round(kib["Rss"] / 1024, 1), "anonymous": round(kib["Anonymous"] / 1024, 1)}


def measure(model: Path, config: EngineConfig) -> dict[str, object]:
    """Memory after each part, the bytes that weights and pool must take, how many programs were compiled, and the time
    per token of one sequence, the best of three runs."""
    after = {}
    jax.devices()
    after["imports"] = resident()
    tokenizer = load_tokenizer(model)
    after["tokenizer"] = resident()
    config_of_model, graphdef, params = load(model, config)
    after["weights"] = resident()
    weights = sum(map(num_bytes, jax.tree.leaves(params)))
    with Engine(config_of_model, graphdef, params, config, tokenizer=tokenizer) as engine:
        after["engine"] = resident()
        engine.generate([PROMPT] * 8, SamplingParams(max_tokens=16))
        after["8 requests"] = resident()
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            engine.generate([PROMPT], SamplingParams(max_tokens=TOKENS, ignore_eos=True))
            seconds.append(time.perf_counter() - start)
        pool = sum(leaf.nbytes for leaf in engine.executor.device.pool)
        compiled = sum(not program.is_cached for program in engine.executor.device.programs.programs)
    sizes = {"weights": round(weights / 2**20, 1), "pool": round(pool / 2**20, 1)}
    return {
        "mib_after": after,
        "mib_by_shape": sizes,
        "programs_compiled": compiled,
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "ms_per_token": round(1000 * min(seconds) / TOKENS, 1),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="model directory or GGUF file")
    parser.add_argument("--num-pages", type=int, default=1000, help="pages of the pool (default: %(default)s)")
    parser.add_argument("--weights", default="auto", choices=WEIGHTS, help="their format (default: the checkpoint's)")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as cache:  # all programs are compiled: the compiler's memory shows, if it stays
        config = EngineConfig(
            dtype="float32",
            weights=args.weights,
            num_pages=args.num_pages,
            compilation_cache_dir=cache,
            progress=False,
        )
        values = measure(args.model, config)
    values = {"provenance": provenance(), "model": args.model.name, **values}
    print(json.dumps(values, indent=1))
    if args.output:
        write_json(args.output, values)


if __name__ == "__main__":
    main()
