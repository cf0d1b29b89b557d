"""The console script `slora`."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import jax

from pallas_kernels.devices import DEVICES
from pallas_kernels.lora.layout import ceil_div
from slora_jax.adapters import read_peft
from slora_jax.demo import DemoSettings, run_demo
from slora_jax.engine import Engine, EngineConfig, Follower, adapter_geometry
from slora_jax.errors import ConfigError, ProcessLostError, SloraError
from slora_jax.models import ModelConfig
from slora_jax.models.config import read_json
from slora_jax.parallel.join import join_processes
from slora_jax.parallel.layout import LORA_SHARDINGS
from slora_jax.parallel.mesh import cut
from slora_jax.parallel.processes import EXIT_LOST, ProcessGroup
from slora_jax.scheduling import SamplingParams


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0, 1 (the demo's check failed, or a compile report has a spill or a
    copy of the pool), 2 (an error of the user's making, one line on stderr), 3 (another process of those that serve
    together is lost, one line on stderr), 130 (Ctrl-C)."""
    args = _parser().parse_args(argv)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found": it is not needed
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # in a pipe too, text and progress bars come in order
    try:
        return args.run(args)
    except SloraError as error:
        print("slora: error:", " ".join(str(error).split()), file=sys.stderr)
        return EXIT_LOST if isinstance(error, ProcessLostError) else 2
    except KeyboardInterrupt:
        print("slora: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of stdout has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="slora", description="One base model, thousands of LoRA adapters, one unified paged pool."
    )
    parser.add_argument("--version", action="version", version=f"slora-jax {version('slora-jax')}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    demo = commands.add_parser("demo", help="serve hundreds of random adapters and check the answers")
    demo.add_argument("--dir", type=Path, default=DemoSettings.directory, help="for its files (default: %(default)s)")
    for name, default, what in (
        ("adapters", DemoSettings.adapters, "number of adapters"),
        ("requests", DemoSettings.requests, "number of requests"),
        ("layers", DemoSettings.layers, "layers of the model"),
        ("pages", DemoSettings.num_pages, "pages of the memory pool"),
        ("seed", DemoSettings.seed, "of weights, prompts and arrivals"),
    ):
        demo.add_argument(f"--{name}", metavar="N", type=int, default=default, help=f"{what} (default: {default})")
    demo.set_defaults(run=_demo)

    generate = commands.add_parser(
        "generate",
        help="answer a prompt",
        description="Answers a prompt and writes the text as it comes. With several adapters, each answers in turn, "
        "after a line with its name.",
    )
    option = generate.add_argument
    option("model_dir", metavar="MODEL", type=Path, help="Hugging Face model directory or GGUF file")
    option("--prompt", metavar="TEXT", required=True, help="text to go on from")
    option(
        "--adapter",
        metavar="NAME=DIR",
        type=_named_directory,
        action="append",
        default=[],
        help="a PEFT directory and a name for it; may be given several times",
    )
    option("--max-tokens", metavar="N", type=int, default=128, help="most tokens to generate (default: %(default)s)")
    option("--max-model-len", metavar="N", type=int, default=4096, help="most with the prompt (default: %(default)s)")
    option("--temperature", metavar="T", type=float, default=0.0, help="0, the default, takes the likeliest token")
    option("--seed", metavar="N", type=int, default=0, help="of sampling (default: %(default)s)")
    option("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of weights (default: %(default)s)")
    _add_parallel_options(generate)
    generate.set_defaults(run=_generate, tp=1)

    serve = commands.add_parser(
        "serve",
        help="serve the model and its adapters over HTTP, as OpenAI's API does",
        description="Serves the model and its adapters over HTTP, as OpenAI's API does, until SIGTERM or Ctrl-C. The "
        "config file has all settings (those of slora_jax/serving/settings.py); options take precedence over it.",
    )
    option = serve.add_argument
    option("model_dir", metavar="MODEL", type=Path, help="Hugging Face model directory or GGUF file")
    option("--adapters", metavar="DIR", type=Path, help="PEFT directories; new ones are registered as they come")
    option("--config", metavar="FILE", type=Path, help="settings, in YAML")
    option("--name", metavar="NAME", help="of the base model, for clients (default: the directory's)")
    option("--host", metavar="ADDRESS", help="to listen on (default: 127.0.0.1, this machine only)")
    option("--port", metavar="N", type=int, help="to listen on (default: 8000; 0: any that is free)")
    option("--dtype", choices=("bfloat16", "float32"), help="of weights (default: bfloat16)")
    option("--max-seqs", metavar="N", type=int, help=f"sequences running at once (default: {EngineConfig.max_seqs})")
    option("--num-pages", metavar="N", type=int, help="pages of the pool (default: what memory allows)")
    option("--replicas", metavar="N", type=int, help="engines, behind Ray Serve if more than one (default: 1)")
    _add_parallel_options(serve)
    serve.set_defaults(run=_serve)

    report = commands.add_parser(
        "compile-report",
        help="compile the step for a GPU that is not there, and tell what it takes",
        description="Compiles an engine's step programs for a GPU that is not there and reports memory, custom kernels "
        "(registers, spills, shared memory) and collectives. Exit status 1: a kernel spills, or the pool is copied.",
    )
    option = report.add_argument
    option("--model-config", metavar="FILE", type=Path, required=True, help="a Hugging Face config.json")
    option("--target", choices=tuple(DEVICES), required=True, help="the GPU")
    option("--tp", metavar="N", type=int, default=1, help="GPUs the model is spread over (default: %(default)s)")
    option(
        "--tp-lora",
        choices=LORA_SHARDINGS,
        default=EngineConfig.tp_lora,
        help="how adapters are cut: as S-LoRA does (the default), A and B as vLLM's default, or A by input everywhere",
    )
    option("--max-tokens", metavar="T", type=int, required=True, help="rows of the largest step")
    option("--max-seqs", metavar="S", type=int, required=True, help="sequences running at once")
    option("--json", metavar="FILE", type=Path, help="write the report there too")
    option("--max-rank", metavar="R", type=int, default=64, help="largest LoRA rank served (default: %(default)s)")
    option("--rank", metavar="R", type=int, default=16, help="rank to count adapters in (default: %(default)s)")
    option("--page-size", metavar="N", type=int, default=EngineConfig.page_size, help="tokens (default: %(default)s)")
    option("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of weights (default: %(default)s)")
    option("--max-model-len", metavar="N", type=int, help="longest sequence (default: the model's)")
    option("--adapter-slots", metavar="N", type=int, help="adapters in the pool at once (default: as the engine's)")
    option(
        "--gpu-memory-fraction",
        metavar="F",
        type=float,
        default=0.75,
        help="share of the GPU's memory that JAX may take, as XLA_PYTHON_CLIENT_MEM_FRACTION would tell it (default: "
        "JAX's own, %(default)s); the engine's pool gets 90%% of what weights and temporaries leave",
    )
    option(
        "--programs",
        metavar="NAME,...",
        type=lambda text: tuple(text.split(",")),
        default=(),
        help="compile these only, e.g. decode_64,mixed_2048_lora",
    )
    option("--layers", metavar="N", type=int, help="compile so many layers only: faster, and labelled so")
    report.set_defaults(run=_compile_report)
    return parser


def _add_parallel_options(parser: argparse.ArgumentParser) -> None:
    """Options of `_processes`, for every command that serves a model."""
    option = parser.add_argument_group("several devices, several processes").add_argument
    option("--tp", metavar="N", type=int, help="devices the model is cut over, of all processes together (default: 1)")
    option(
        "--coordinator",
        metavar="HOST:PORT",
        help="address of process 0, where the processes meet (it uses PORT and PORT + 1); each is started with the "
        "same command and its own --process-id, and all but process 0 write nothing",
    )
    option("--num-processes", metavar="N", type=int, help="how many there are")
    option("--process-id", metavar="I", type=int, help="which one this is, from 0")
    option(
        "--join-timeout", metavar="SECONDS", type=float, default=300.0, help="for all to come (default: %(default)s)"
    )


def _processes(args: argparse.Namespace, tp: int) -> ProcessGroup | None:
    """The processes that serve the model together; None: this one alone.

    Raises:
      ConfigError: the options are incomplete or out of range, or the others cannot be met.
    """
    given = {name: getattr(args, name) for name in ("coordinator", "num_processes", "process_id")}
    if all(value is None for value in given.values()):
        return None
    for name, value in given.items():
        if value is None:
            raise ConfigError(f"--{name.replace('_', '-')} is missing: it goes with {', '.join(_options(given))}")
    if args.num_processes > 1 and (tp < 1 or tp % args.num_processes):
        raise ConfigError(f"--tp={tp}: must be a multiple of --num-processes={args.num_processes}")
    return join_processes(**given, timeout=args.join_timeout)


def _options(given: dict[str, object]) -> list[str]:
    return [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None]


def _named_directory(text: str) -> tuple[str, Path]:
    name, _, directory = text.partition("=")
    if not name or not directory:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR")
    return name, Path(directory)


def _demo(args: argparse.Namespace) -> int:
    settings = DemoSettings(
        directory=args.dir,
        adapters=args.adapters,
        requests=args.requests,
        layers=args.layers,
        num_pages=args.pages,
        seed=args.seed,
    )
    return 0 if run_demo(settings) else 1


def _generate(args: argparse.Namespace) -> int:
    with _processes(args, args.tp) or nullcontext() as processes:
        if processes is None or processes.is_leader:
            return _answer(args, processes)
        longest = min(args.max_model_len, ModelConfig.from_directory(args.model_dir).max_position_embeddings)
        Follower.from_pretrained(args.model_dir, _generate_config(args, longest), processes).run()
    return 0


def _answer(args: argparse.Namespace, processes: ProcessGroup | None) -> int:
    params = SamplingParams(max_tokens=args.max_tokens, temperature=args.temperature, seed=args.seed)
    model = ModelConfig.from_directory(args.model_dir)
    geometry = adapter_geometry(model, EngineConfig.page_size, cut(model, args.tp))
    adapters = {name: read_peft(directory, geometry) for name, directory in args.adapter}
    longest = min(args.max_model_len, model.max_position_embeddings)
    adapter_pages = [int(geometry.layout.num_pages(adapter.ranks.max(0))) for adapter in adapters.values()]
    num_pages = 1 + ceil_div(longest, EngineConfig.page_size) + max(adapter_pages, default=0)
    config = replace(_generate_config(args, longest), num_pages=num_pages)
    with Engine.from_pretrained(args.model_dir, config, processes=processes) as engine:
        for name, adapter in adapters.items():
            engine.load_adapter(name, adapter)
        for name in adapters or [None]:
            if len(adapters) > 1:
                print(f"[{name}]")
            for delta in engine.stream(args.prompt, params, name):
                print(delta.text, end="", flush=True)
            print(flush=True)
    return 0


def _generate_config(args: argparse.Namespace, longest: int) -> EngineConfig:
    """But for the number of pages."""
    return EngineConfig(
        dtype=args.dtype,
        max_seqs=1,
        max_model_len=longest,
        mixed_buckets=(EngineConfig.max_tokens_per_step,),
        tp=args.tp,
    )


def _serve(args: argparse.Namespace) -> int:
    try:
        from slora_jax.serving.serve import serve
        from slora_jax.serving.settings import ServerSettings
    except ImportError as error:
        raise ConfigError(f"slora serve needs {error.name}: pip install 'slora-jax[serve]'") from error
    engine = {"dtype": args.dtype, "max_seqs": args.max_seqs, "num_pages": args.num_pages, "tp": args.tp}
    given = {
        "model_dir": args.model_dir,
        "adapters": args.adapters,
        "name": args.name,
        "host": args.host,
        "port": args.port,
        "replicas": args.replicas,
        "engine": {name: value for name, value in engine.items() if value is not None},
    }
    settings = ServerSettings.from_file(args.config, **given)
    if settings.replicas > 1 and args.coordinator is not None:
        raise ConfigError(f"--replicas={settings.replicas}: of engines in one process each; leave --coordinator out")
    ModelConfig.from_directory(settings.model_dir)  # what is wrong with it is told before anything listens
    with _processes(args, settings.engine.tp) or nullcontext() as processes:
        if processes is None or processes.is_leader:
            return serve(settings, lambda: settings.build_engine(processes))
        Follower.from_pretrained(settings.model_dir, settings.engine, processes).run()
    return 0


def _compile_report(args: argparse.Namespace) -> int:
    # The GPU is not there, and one that is must be left alone: the compiler runs on the host.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    # The compiler logs that it cannot tune for a GPU that is not there, and that the pool leaves less than the fifth of
    # memory that it likes to have. What fails is raised.
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL") == "1":  # as JAX sets it
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    jax.config.update("jax_platforms", "cpu")
    from slora_jax.analysis.report import compile_report
    from slora_jax.analysis.report_table import report_table
    from slora_jax.analysis.targets import TARGETS

    if not args.model_config.is_file():
        raise ConfigError(f"--model-config={args.model_config}: no such file; give a Hugging Face config.json")
    if args.json is not None and not args.json.parent.is_dir():
        raise ConfigError(f"--json={args.json}: no such directory; make {args.json.parent} first")
    if not 0 < args.gpu_memory_fraction <= 1:
        raise ConfigError(f"--gpu-memory-fraction={args.gpu_memory_fraction}: must be in (0, 1]")
    config = EngineConfig(
        dtype=args.dtype,
        page_size=args.page_size,
        max_seqs=args.max_seqs,
        max_tokens_per_step=args.max_tokens,
        max_model_len=args.max_model_len,
        adapter_slots=args.adapter_slots,
        max_rank=args.max_rank,
        tp=args.tp,
        tp_lora=args.tp_lora,
    )
    report = compile_report(
        ModelConfig.from_dict(read_json(args.model_config)),
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
