"""The comparison's phases, ratios and table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from experiments.config.schema import MODELS
from experiments.machine import provenance
from experiments.rounds import different_requests, turns
from experiments.systems.peft import write_random_checkpoint
from experiments.vllm_comparison.settings import Settings
from experiments.vllm_comparison.slora_worker import TARGETS
from experiments.vllm_comparison.worker import Answer, Worker, slora_worker, vllm_environment, vllm_worker
from experiments.workloads import WorkloadRequest, batch, engine_requests
from slora_jax.adapters import random_adapter, write_peft
from slora_jax.engine.sizing import adapter_geometry
from slora_jax.models import ModelConfig

PAGE_SIZE = 16
SHAPE = {
    "layers": "num_layers", "hidden": "hidden_size", "heads": "num_heads", "intermediate": "intermediate_size",
    "vocab": "vocab_size",
}  # fmt: skip
"""Names in the result of the random model's fields."""
PHASES = ("base", "lora", "alone")
"""Base model beside vLLM, adapters beside vLLM, slora-jax alone."""
MIXED, MANY = "mixed-", "many-"
"""Prefixes of adapters' names: of those that both sides serve, and of slora-jax alone."""


@dataclass
class Side:
    """Requests that one worker answers once a round, and its answers."""

    worker: Worker
    requests: Sequence[WorkloadRequest]
    answers: list[Answer] = field(default_factory=list)

    def run(self) -> None:
        self.answers.append(self.worker.run(self.requests))

    def rates(self) -> list[float]:
        """Output tokens per second, by round."""
        tokens = sum(request.output for request in self.requests)
        return [tokens / answer.seconds for answer in self.answers]

    def values(self) -> dict[str, Any]:
        """JSON values."""
        rates = self.rates()
        return {
            "tokens_per_second": {"median": round(statistics.median(rates), 2), "rounds": [round(x, 2) for x in rates]},
            "seconds": [round(answer.seconds, 3) for answer in self.answers],
            "cpu_seconds": [round(answer.cpu_seconds, 3) for answer in self.answers],
            "cores_used_by_others": [round(answer.others, 2) for answer in self.answers],
        }


class Comparison:
    """Writes the model and the adapters, and runs the phases."""

    def __init__(self, settings: Settings, scratch: Path, vllm_python: Path | None, model: Path | None = None) -> None:
        """vllm_python: None leaves vLLM out. model: a Hugging Face directory; None: the random Llama."""
        self.settings, self._scratch, self._python = settings, scratch, vllm_python
        self._model = model or scratch / "model"
        if model is None:
            write_random_checkpoint(MODELS / f"{settings.model}.json", self._model, settings.seed)
        self.config = ModelConfig.from_directory(self._model)
        geometry = adapter_geometry(self.config, PAGE_SIZE)
        self._adapters = {}
        for i in range(settings.adapters):
            rank = settings.ranks[i % len(settings.ranks)]
            adapter = random_adapter(geometry, rank, TARGETS, seed=settings.seed + i)
            self._adapters[f"{MIXED}{i}"] = str(write_peft(scratch / f"adapter-{i}", adapter))
        self.versions: dict[str, dict[str, str]] = {}

    def run(self, names: Sequence[str] = PHASES) -> dict[str, Any]:
        """The phases `names`, as JSON values."""
        settings = self.settings
        phases = {}
        if "base" in names:
            phases["base"] = self._beside_vllm(0, settings.rounds)
        if "lora" in names:
            phases["lora"] = self._beside_vllm(settings.adapters, settings.lora_rounds)
        if "alone" in names:
            phases["alone"] = self._alone()
        return {
            "settings": asdict(settings) | {"model": self._describe()},
            "vllm_environment": self._environment(),
            "provenance": provenance(("jax", "jaxlib", "numpy", "transformers")) | {"workers": self.versions},
            "phases": phases,
        }

    def _beside_vllm(self, num_adapters: int, rounds: int) -> dict[str, Any]:
        """slora-jax and vLLM in turn, over the same requests."""
        settings = self.settings
        name = f"{num_adapters} adapters" if num_adapters else "base only"
        requests = self._requests(settings.requests, MIXED, num_adapters)
        vllm = {
            "model": str(self._model),
            "engine": settings.vllm_engine(lora=num_adapters > 0),
            "adapters": self._adapters if num_adapters else {},
        }
        with ExitStack() as stack:
            slora = stack.enter_context(slora_worker(self._slora(), self._log("slora")))
            assert self._python is not None
            peer = stack.enter_context(vllm_worker(self._python, vllm, settings.vllm_kv_gib, self._log("vllm")))
            self.versions |= {"slora-jax": slora.versions, "vllm": peer.versions}
            sides = {"slora-jax": Side(slora, requests), "vllm": Side(peer, requests)}
            take_turns(name, sides, rounds, warm_up=short(requests))
        ours, theirs = (sides[name].answers[-1].tokens for name in ("slora-jax", "vllm"))
        equal = len(ours) - len(different_requests(ours, theirs))
        return {
            **{side: run.values() for side, run in sides.items()},
            "slora-jax over vllm": ratios(sides["slora-jax"].rates(), sides["vllm"].rates()),
            "requests_with_equal_tokens": {"equal": equal, "of": len(requests)},
        }

    def _alone(self) -> dict[str, Any]:
        """slora-jax with no adapter, with those of the comparison, and with few and many, in turn."""
        settings = self.settings
        few, many = settings.many_adapters
        with slora_worker(self._slora(random=many), self._log("slora-alone")) as worker:
            self.versions |= {"slora-jax": worker.versions}
            sides = {
                "base": Side(worker, self._requests(settings.requests, MIXED, 0)),
                f"{settings.adapters}": Side(worker, self._requests(settings.requests, MIXED, settings.adapters)),
                f"{few}": Side(worker, self._requests(settings.many_requests, MANY, few)),
                f"{many}": Side(worker, self._requests(settings.many_requests, MANY, many)),
            }
            take_turns("slora-jax alone", sides, settings.rounds)
        rates = {name: side.rates() for name, side in sides.items()}
        return {
            **{name: side.values() for name, side in sides.items()},
            f"{settings.adapters} adapters over base": ratios(rates[f"{settings.adapters}"], rates["base"]),
            f"{many} adapters over {few}": ratios(rates[f"{many}"], rates[f"{few}"]),
        }

    def _requests(self, count: int, prefix: str, num_adapters: int) -> list[WorkloadRequest]:
        return make_requests(self.settings, self.config.vocab_size, count, prefix, num_adapters)

    def _slora(self, random: int = 0) -> dict[str, Any]:
        """Settings of a slora-jax worker with `random` adapters beside those that both sides serve."""
        return {
            "model": str(self._model),
            "engine": self.settings.slora_engine() | {"page_size": PAGE_SIZE},
            "adapters": self._adapters,
            "random_adapters": {"prefix": MANY, "count": random, "rank": self.settings.many_rank},
        }

    def _log(self, name: str) -> Path:
        return self._scratch / f"{name}.log"

    def _describe(self) -> dict[str, Any]:
        """The model: the settings of the random one, or the directory's name."""
        if self._model.parent == self._scratch:
            return {"random": {name: getattr(self.config, field) for name, field in SHAPE.items()}}
        return {"directory": self._model.name}

    def _environment(self) -> dict[str, str]:
        """Environment of the vLLM worker; preloaded libraries by file name."""
        if self._python is None:
            return {}
        environment = vllm_environment(self._python, self.settings.vllm_kv_gib)
        preloaded = environment["LD_PRELOAD"].split(":")
        return environment | {"LD_PRELOAD": ":".join(Path(path).name for path in preloaded)}


def make_requests(settings: Settings, vocab: int, count: int, prefix: str, num_adapters: int) -> list[WorkloadRequest]:
    """Makes `count` requests spread evenly, in random order, over the adapters `prefix`0 .. `prefix`(n-1); 0 adapters:
    base model only. Prompts depend on `count` and the seed alone."""
    work = batch(
        num_adapters=num_adapters, ranks=(1,), rate=1.0, duration=1.0, seed=settings.seed, requests=count,
        input_range=(settings.prompt_low, settings.prompt_high + 1),
        output_range=(settings.output, settings.output + 1),
    )  # fmt: skip
    requests = engine_requests(work, vocab, settings.seed)
    return [replace(one, adapter=None if one.adapter is None else f"{prefix}{one.adapter}") for one in requests]


def short(requests: Sequence[WorkloadRequest]) -> list[WorkloadRequest]:
    """Returns the requests with prompts of at most 8 tokens and 4 new tokens: they touch every adapter."""
    return [replace(one, prompt=one.prompt[:8], output=min(one.output, 4)) for one in requests]


def take_turns(
    name: str, sides: dict[str, Side], rounds: int, warm_up: Sequence[WorkloadRequest] | None = None
) -> None:
    """Runs every side once a round, in turn, after a warm-up. warm_up: its requests; None: each side's own."""
    for number, side in turns(list(sides), rounds, name):
        if number:
            sides[side].run()
        else:
            sides[side].worker.run(warm_up or sides[side].requests)


def ratios(over: Sequence[float], under: Sequence[float]) -> dict[str, Any]:
    """Ratios of two sides' rates: of each round's pair, and the median of these; of the two medians."""
    pairs = [a / b for a, b in zip(over, under, strict=True)]
    return {
        "median_of_pairs": round(statistics.median(pairs), 3),
        "of_medians": round(statistics.median(over) / statistics.median(under), 3),
        "pairs": [round(pair, 3) for pair in pairs],
    }


def table(results: dict[str, Any]) -> str:
    """Medians and ratios, for a terminal."""
    lines = [f"{'output tokens/s, median':36s} {'slora-jax':>10s} {'vLLM':>10s} {'ratio':>7s}  same tokens"]
    adapters = results["settings"]["adapters"]
    for phase, title in (("base", "base only"), ("lora", f"{adapters} adapters")):
        if (values := results["phases"].get(phase)) is not None:
            rates = [values[side]["tokens_per_second"]["median"] for side in ("slora-jax", "vllm")]
            ratio = values["slora-jax over vllm"]["median_of_pairs"]
            same = values["requests_with_equal_tokens"]
            lines.append(
                f"{title:36s} {rates[0]:10.1f} {rates[1]:10.1f} {ratio:7.2f}  {same['equal']} of {same['of']} requests"
            )
    for name, values in results["phases"].get("alone", {}).items():
        if "pairs" in values:
            lines.append(f"{'slora-jax: ' + name:36s} {'':10s} {'':10s} {values['median_of_pairs']:7.2f}")
        else:
            title = "slora-jax alone, " + (name if name == "base" else f"{name} adapters")
            lines.append(f"{title:36s} {values['tokens_per_second']['median']:10.1f}")
    return "\n".join(lines)
