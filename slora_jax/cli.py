"""The console script `slora`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from slora_jax.errors import SloraError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0, 1 (the demo's check failed), 2 (an error of the user's making,
    one line on stderr), 130 (Ctrl-C)."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except SloraError as error:
        print("slora: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("slora: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="slora", description="One base model, thousands of LoRA adapters, one unified paged pool."
    )
    parser.add_argument("--version", action="version", version=f"slora-jax {version('slora-jax')}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    demo = commands.add_parser(
        "demo",
        help="serve hundreds of random adapters and check the answers",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--dir", type=Path, default=Path(".demo"), help="where its model and adapters go")
    demo.add_argument("--adapters", type=int, default=200, help="number of adapters")
    demo.add_argument("--requests", type=int, default=300, help="number of requests")
    demo.add_argument("--layers", type=int, default=4, help="layers of the model")
    demo.add_argument("--pages", type=int, default=512, help="pages of the memory pool")
    demo.add_argument("--seed", type=int, default=0, help="of weights, prompts and arrivals")
    demo.set_defaults(run=_demo)

    generate = commands.add_parser(
        "generate",
        help="answer a prompt",
        description="Answers a prompt and writes the text as it comes. With several adapters, each answers in turn, "
        "after a line with its name.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    generate.add_argument("model_dir", metavar="MODEL_DIR", type=Path, help="Hugging Face model directory")
    generate.add_argument("--prompt", required=True, help="text to go on from")
    generate.add_argument(
        "--adapter", metavar="NAME=DIR", type=_named_directory, action="append", default=[], help="PEFT directory"
    )
    generate.add_argument("--max-tokens", type=int, default=128, help="most tokens to generate")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token")
    generate.add_argument("--seed", type=int, default=0, help="of sampling, when the temperature is above 0")
    generate.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"), help="of weights and cache")
    generate.set_defaults(run=_generate)
    return parser


def _named_directory(text: str) -> tuple[str, Path]:
    name, _, directory = text.partition("=")
    if not name or not directory:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR")
    return name, Path(directory)


def _demo(args: argparse.Namespace) -> int:
    from slora_jax.demo import DemoSettings, run_demo

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
    from slora_jax.engine import Engine, EngineConfig
    from slora_jax.scheduling import SamplingParams

    params = SamplingParams(max_tokens=args.max_tokens, temperature=args.temperature, seed=args.seed)
    config = EngineConfig(dtype=args.dtype, max_seqs=1, decode_buckets=(1,), mixed_buckets=(256,))
    with Engine.from_pretrained(args.model_dir, config) as engine:
        for name, directory in args.adapter:
            engine.load_adapter(name, directory)
        names = [name for name, _ in args.adapter] or [None]
        for name in names:
            if len(names) > 1:
                print(f"[{name}]")
            for delta in engine.stream(args.prompt, params, name):
                print(delta.text, end="", flush=True)
            print()
    return 0
