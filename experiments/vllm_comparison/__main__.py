"""Throughput of slora-jax beside vLLM's CPU build: `python -m experiments.vllm_comparison`.

One model in float32 and the same requests (token ids, greedy, outputs of fixed length) for both sides, each in a
process of its own. Every round runs each side once, in turn. Phases:

- base: no adapters. vLLM runs without LoRA layers.
- lora: 32 adapters of mixed ranks, all resident on both sides.
- alone: slora-jax without adapters, with the same 32, with 5 and with 1000, in turn.

The JSON file has every round, the ratio of every pair, the number of requests with the same tokens from both sides, and
the cores that other processes used. In float32 two libraries add in different orders, so where two tokens are
almost equally likely the sides may choose differently, and the rest of that request differs.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from experiments.machine import write_json
from experiments.vllm_comparison.compare import PHASES, Comparison, table
from experiments.vllm_comparison.settings import QUICK, Settings
from experiments.vllm_comparison.worker import require_vllm

NEAR_TIES = "greedy in float32: a request differs from its first near-tie on, because the sides add in different orders"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a toy model, in minutes; its numbers mean nothing")
    parser.add_argument("--vllm-python", type=Path, default=Path(".vllm/bin/python"), help="of vLLM's environment")
    parser.add_argument(
        "--phases", default=",".join(PHASES), help="base and lora beside vLLM, alone without it (default: %(default)s)"
    )
    parser.add_argument("--vllm-compiled", action="store_true", help="vLLM with torch.compile")
    parser.add_argument("--model", type=Path, help="a Hugging Face directory instead of the random Llama")
    parser.add_argument("--rounds", type=int, help="timed repetitions, of phases base and alone")
    parser.add_argument("--lora-rounds", type=int, help="timed repetitions of phase lora, where vLLM takes minutes")
    parser.add_argument("--note", default="", help="about the machine during the run; kept in the file")
    parser.add_argument("--output", type=Path, default=Path("experiments/results/vllm_comparison.json"))
    args = parser.parse_args()
    phases = args.phases.split(",")
    if unknown := set(phases) - set(PHASES):
        parser.error(f"--phases {args.phases}: {', '.join(sorted(unknown))} is none of {', '.join(PHASES)}")
    if phases != ["alone"]:
        try:
            require_vllm(args.vllm_python)
        except FileNotFoundError as error:
            parser.error(str(error))
    settings: Settings = QUICK if args.quick else Settings()
    given = {"rounds": args.rounds, "lora_rounds": args.lora_rounds, "vllm_eager": not args.vllm_compiled}
    settings = replace(settings, **{name: value for name, value in given.items() if value is not None})
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the workers, as Ctrl-C does
    with tempfile.TemporaryDirectory() as scratch:
        python = None if phases == ["alone"] else args.vllm_python.absolute()
        results = {"note": args.note, "equal_tokens": NEAR_TIES}
        results |= Comparison(settings, Path(scratch), python, args.model).run(phases)
    print(table(results))
    write_json(args.output, results)


if __name__ == "__main__":
    main()
