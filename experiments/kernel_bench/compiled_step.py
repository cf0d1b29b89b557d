"""Rows of the sampler, of writes into the pool and of the decode graph for `experiments.kernel_bench.compiled`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pallas_kernels.devices import Device

MODEL = Path(__file__).parents[1] / "models" / "llama-3-8b.json"
SEQS = (64, 256)
LAYERS = 4
POOL_PAGES = 20_000

Row = dict[str, Any]


def rows(device: Device) -> Iterator[Row]:
    """Compiles the programs for `device` and yields their rows. They also have `compare_and_swaps` (instructions),
    `temp_bytes` and `is_sequential`."""
    for row in (*samplers(device.name), *writes(device.name), graph(device.name)):
        yield {"device": device.name, "version": "new"} | row


def samplers(device: str) -> Iterator[Row]:
    """Launches after a step: of the draw alone, and with the search for top-k and top-p."""
    from pallas_kernels.targets import TARGETS, compile_for
    from slora_jax.analysis import launches
    from slora_jax.engine.after_step import AFTER_STEP

    spec = _spec(1)
    for seqs in SEQS:
        count, temp = dict[str, int](), dict[str, int]()
        for kind in ("cutoff", "sample"):
            make, shapes = AFTER_STEP[kind]
            compiled = compile_for(TARGETS[device], make(spec, seqs), *shapes(spec, seqs))
            count[kind], temp[kind] = launches(compiled.as_text()), compiled.memory_analysis().temp_size_in_bytes
        case = f"{seqs} sequences, vocabulary {spec.model.vocab_size}"
        yield {"kernel": "sampler", "case": f"{case}, temperature", "launches": count["sample"]} | {
            "temp_bytes": temp["sample"]
        }
        yield {"kernel": "sampler", "case": f"{case}, top-k and top-p", "launches": sum(count.values())} | {
            "temp_bytes": max(temp.values())
        }


def writes(device: str) -> Iterator[Row]:
    """The writes of a step's keys and values, and of an adapter's pages, into one layer's pool."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.pool_write import write_kv, write_pages
    from pallas_kernels.targets import TARGETS
    from slora_jax.analysis import launches
    from slora_jax.analysis.compiled import compile_with_ptx
    from slora_jax.analysis.ptxas import assemble

    struct, dtype, width = jax.ShapeDtypeStruct, jnp.bfloat16, 1024
    pool, contents = struct((POOL_PAGES, 2, 16, width), dtype), struct((32, 2, 16, width), dtype)
    row, ids = struct((64, width), dtype), struct((64,), jnp.int32)
    cases = {
        ("write_kv", "64 rows"): (write_kv, (row, row, ids, ids)),
        ("write_pages", "32 pages"): (write_pages, (struct((32,), jnp.int32), contents)),
    }
    for (kernel, case), (write, arguments) in cases.items():
        compiled, ptx = compile_with_ptx(TARGETS[device], jax.jit(write, donate_argnums=0), pool, *arguments)
        yield {
            "kernel": kernel,
            "case": case,
            "launches": launches(compiled.as_text()),
            "registers": assemble(ptx).registers,
            "compare_and_swaps": ptx.count(".cas."),
        }


def graph(device: str) -> Row:
    """The CUDA graph of a decode step with LoRA, compiled in a process of its own, whose log has it."""
    from slora_jax.analysis.graph import LOG, read_graph

    environment = os.environ | LOG | {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    command = [sys.executable, "-m", "experiments.kernel_bench.compiled_step", device]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = read_graph(done.stderr)
    return {
        "kernel": "decode graph",
        "case": f"64 sequences, {LAYERS} layers",
        "launches": len(found.nodes),
        "is_sequential": found.is_sequential,
        "temp_bytes": int(done.stdout),
    }


def _spec(layers: int) -> Any:
    from slora_jax.engine import EngineConfig
    from slora_jax.engine.sizing import pool_shape, step_spec
    from slora_jax.models import ModelConfig, abstract_decoder
    from slora_jax.models.config import read_json

    model = replace(ModelConfig.from_dict(read_json(MODEL)), num_layers=layers)
    config = EngineConfig(dtype="bfloat16", max_num_seqs=256, max_lora_rank=64, num_pages=POOL_PAGES)
    return step_spec(model, *abstract_decoder(model, config.dtype), config, pool_shape(model, config))


def _compile_step(device: str) -> int:
    """Compiles a decode step and returns the bytes of its temporaries."""
    from pallas_kernels.devices import compiling_for
    from pallas_kernels.targets import TARGETS, compile_for
    from slora_jax.engine.config import Bucket
    from slora_jax.engine.step import make_step, step_shapes

    spec = _spec(LAYERS)
    with compiling_for(TARGETS[device].device):
        layout = spec.layout(Bucket(64, 64, decode=True))
        compiled = compile_for(TARGETS[device], make_step(spec, layout, with_lora=True), *step_shapes(spec, layout))
    return int(compiled.memory_analysis().temp_size_in_bytes)


if __name__ == "__main__":
    print(_compile_step(sys.argv[1]))
