"""`slora demo`: serves hundreds of random adapters and checks their answers."""

from __future__ import annotations

import argparse
from pathlib import Path

from slora_jax.cli.values import count
from slora_jax.demo.settings import DemoSettings


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = commands.add_parser("demo", help="serve hundreds of random adapters and check their answers")
    parser.add_argument("--dir", type=Path, default=DemoSettings.directory, help="demo's files (default: %(default)s)")
    parser.add_argument(
        "--model",
        help="smollm2, tiny (random weights), or a GGUF file or model directory (default: smollm2 if it is installed)",
    )
    for name, kind, default, description in (
        ("adapters", count, DemoSettings.adapters, "number of adapters"),
        ("requests", count, DemoSettings.requests, "number of requests"),
        ("layers", count, DemoSettings.layers, "layers of the tiny model"),
        ("pages", count, DemoSettings.num_pages, "pages of the memory pool"),
        ("seed", int, DemoSettings.seed, "random seed of weights, prompts and arrivals"),
    ):
        shown = "depends on the model" if default is None else default
        text = f"{description} (default: {shown})"
        parser.add_argument(f"--{name}", metavar="N", type=kind, default=default, help=text)
    parser.set_defaults(run=run, fields={"num_pages": "pages"})


def run(args: argparse.Namespace) -> int:
    """Runs the demo. Returns 1 if its check failed, else 0."""
    settings = DemoSettings(
        directory=args.dir,
        model=args.model,
        adapters=args.adapters,
        requests=args.requests,
        layers=args.layers,
        num_pages=args.pages,
        seed=args.seed,
    )
    from slora_jax.demo.run import run_demo

    return 0 if run_demo(settings) else 1
