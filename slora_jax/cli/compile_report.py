"""`slora compile-report`: memory, kernels and collectives of the step programs on a GPU, without that GPU."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from pallas_kernels.devices import DEVICES
from slora_jax.cli.values import count
from slora_jax.engine.config import EngineConfig
from slora_jax.errors import ConfigError
from slora_jax.parallel.layout import LORA_SHARDINGS
from slora_jax.scheduling.config import KV_DTYPES, WEIGHTS


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "compile-report",
        help="compile the step for a GPU without having one, and report memory, kernels and collectives",
        description="Compiles an engine's step programs for a GPU without having one, and reports memory, custom "
        "kernels (registers, spills, shared memory) and collectives. Exit status 1: a kernel spills, or the pool is "
        "copied.",
    )
    option = parser.add_argument
    option("--model-config", metavar="FILE", type=Path, required=True, help="a Hugging Face config.json")
    option("--target", choices=tuple(DEVICES), required=True, help="GPU to compile for")
    option(
        "--tensor-parallel-size",
        metavar="N",
        type=count,
        default=1,
        help="GPUs that share the model (default: %(default)s)",
    )
    option(
        "--tp-lora",
        choices=LORA_SHARDINGS,
        default=EngineConfig.tp_lora,
        help="sharding of adapters: S-LoRA's (the default), A and B as in vLLM's default, or A by input everywhere",
    )
    option("--max-num-batched-tokens", metavar="T", type=count, required=True, help="rows of the largest step")
    option("--max-num-seqs", metavar="S", type=count, required=True, help="sequences running at once")
    option("--json", metavar="FILE", type=Path, help="also write the report to this file")
    option(
        "--max-lora-rank", metavar="R", type=count, default=64, help="largest LoRA rank served (default: %(default)s)"
    )
    option("--rank", metavar="R", type=count, default=16, help="rank of the adapters counted (default: %(default)s)")
    option("--page-size", metavar="N", type=count, default=EngineConfig.page_size, help="tokens (default: %(default)s)")
    option("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="weight dtype (default: %(default)s)")
    option("--weights", default="auto", choices=WEIGHTS, help="format of the layers' weights (default: the dtype)")
    option("--kv-dtype", default="auto", choices=KV_DTYPES, help="format of keys and values (default: the dtype)")
    option("--max-model-len", metavar="N", type=count, help="longest sequence (default: the model's)")
    option("--adapter-slots", metavar="N", type=count, help="adapters in the pool at once (default: the engine's)")
    option(
        "--gpu-memory-fraction",
        metavar="F",
        type=float,
        default=0.75,
        help="share of the GPU's memory that JAX may use, like XLA_PYTHON_CLIENT_MEM_FRACTION (default: %(default)s, "
        "as in JAX); the engine's pool gets 90%% of the memory left by weights and temporaries",
    )
    option(
        "--programs",
        metavar="NAME,...",
        type=lambda text: tuple(text.split(",")),
        default=(),
        help="compile only these programs, e.g. decode_64,mixed_2048_lora",
    )
    option("--layers", metavar="N", type=count, help="compile only N layers: faster, and noted in the report")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the report. Returns 1 if it has a problem, else 0."""
    if not args.model_config.is_file():
        raise ConfigError(f"--model-config={args.model_config}: no such file; give a Hugging Face config.json")
    if args.json is not None and not args.json.parent.is_dir():
        raise ConfigError(f"--json={args.json}: no such directory; make {args.json.parent} first")
    if not 0 < args.gpu_memory_fraction <= 1:
        raise ConfigError(f"--gpu-memory-fraction={args.gpu_memory_fraction}: must be in (0, 1]")
    config = EngineConfig(
        dtype=args.dtype,
        weights=args.weights,
        kv_dtype=args.kv_dtype,
        page_size=args.page_size,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_model_len=args.max_model_len,
        adapter_slots=args.adapter_slots,
        max_lora_rank=args.max_lora_rank,
        tensor_parallel_size=args.tensor_parallel_size,
        tp_lora=args.tp_lora,
    )
    from slora_jax.models.config import ModelConfig, read_json

    model = config.of_model(ModelConfig.from_dict(read_json(args.model_config)))
    _use_cpu_only()
    from pallas_kernels.targets import TARGETS
    from slora_jax.analysis.report import compile_report
    from slora_jax.analysis.report_table import report_table

    report = compile_report(
        model,
        TARGETS[args.target],
        config,
        adapter_rank=args.rank,
        programs=args.programs,
        layers=args.layers,
        gpu_memory_fraction=args.gpu_memory_fraction,
    )
    print(report_table(report))
    if args.json is not None:
        args.json.write_text(json.dumps(report.to_json(), indent=2) + "\n")
    for problem in report.problems():
        print(f"slora: {problem}", file=sys.stderr)
    return 1 if report.problems() else 0


def _use_cpu_only() -> None:
    """Keeps JAX off any GPU of this machine; compilation runs on the host. Call before JAX starts."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    # Hides warnings that the compiler cannot tune without the GPU and that less than 1/5 of memory is left to it.
    # Failures still raise.
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":  # as JAX sets it
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import jax

    jax.config.update("jax_platforms", "cpu")
