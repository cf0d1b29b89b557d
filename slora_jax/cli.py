"""The console script `slora`."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from pallas_kernels.lora.layout import ceil_div
from slora_jax.adapters import read_peft
from slora_jax.demo import DemoSettings, run_demo
from slora_jax.engine import Engine, EngineConfig, adapter_geometry
from slora_jax.errors import SloraError
from slora_jax.models import ModelConfig
from slora_jax.scheduling import SamplingParams


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0, 1 (the demo's check failed), 2 (an error of the user's making,
    one line on stderr), 130 (Ctrl-C)."""
    args = _parser().parse_args(argv)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found": it is not needed
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # in a pipe too, text and progress bars come in order
    try:
        return args.run(args)
    except SloraError as error:
        print("slora: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
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
    option("model_dir", metavar="MODEL_DIR", type=Path, help="Hugging Face model directory")
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
    generate.set_defaults(run=_generate)
    return parser


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
    params = SamplingParams(max_tokens=args.max_tokens, temperature=args.temperature, seed=args.seed)
    model = ModelConfig.from_directory(args.model_dir)
    geometry = adapter_geometry(model, EngineConfig.page_size)
    adapters = {name: read_peft(directory, geometry) for name, directory in args.adapter}
    longest = min(args.max_model_len, model.max_position_embeddings)
    adapter_pages = [int(geometry.layout.num_pages(adapter.ranks.max(0))) for adapter in adapters.values()]
    config = EngineConfig(
        dtype=args.dtype,
        num_pages=1 + ceil_div(longest, EngineConfig.page_size) + max(adapter_pages, default=0),
        max_seqs=1,
        max_model_len=longest,
        mixed_buckets=(EngineConfig.max_tokens_per_step,),
    )
    with Engine.from_pretrained(args.model_dir, config) as engine:
        for name, adapter in adapters.items():
            engine.load_adapter(name, adapter)
        for name in adapters or [None]:
            if len(adapters) > 1:
                print(f"[{name}]")
            for delta in engine.stream(args.prompt, params, name):
                print(delta.text, end="", flush=True)
            print(flush=True)
    return 0
