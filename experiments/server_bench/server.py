"""`slora serve` without a model: `python server.py MODEL_DIR PORT HTTP_PROCESSES` for the benchmark.

The engine, core, scheduler and HTTP server are the real ones; only the device is replaced. It imports nothing of
`experiments`, so that it can also run the package of another checkout.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from string import ascii_letters
from types import SimpleNamespace
from typing import Any

from slora_jax.adapters import AdapterStore
from slora_jax.engine import Engine
from slora_jax.engine.config import EngineConfig
from slora_jax.engine.core import EngineCore
from slora_jax.engine.request_output import RequestOutputs
from slora_jax.engine.sizing import adapter_geometry, longest_sequence
from slora_jax.engine.structured import Grammars
from slora_jax.engine.text import load_tokenizer
from slora_jax.memory import AdapterResidency, Evictor, Lru, PageAllocator
from slora_jax.models import ModelConfig
from slora_jax.parallel.mesh import cut
from slora_jax.scheduling import AdapterState, Fcfs, Scheduler, StepPlan
from slora_jax.serving.serve import serve
from slora_jax.serving.settings import Limits, ServerSettings

STEP_SECONDS = 0.02
"""Interval of the steps of paced requests, at multiples of it on the monotonic clock."""
FREE, PACED = 3, 4
"""First token of a prompt: a step takes no time; or it ends at the next multiple of `STEP_SECONDS` times the prompt's
second token."""
LETTERS = ascii_letters
"""Text of a token by the number of its interval, modulo their count."""
MAX_STREAMS, MAX_MODEL_LEN = 512, 512


class NoDevice:
    """An executor (`Executor`) that computes nothing: each token is a letter, by the interval in which it is read."""

    pages_in_flight = 0
    page_bytes = 0
    is_lost = False

    def __init__(self, letters: Sequence[int]) -> None:
        self._letters = letters

    def adapter_state(self, digest: str) -> AdapterState:
        return AdapterState.READY

    def lost(self) -> dict[str, str]:
        return {}

    def landed(self) -> list[Any]:
        return []

    def wait(self, digest: str | None) -> None:
        """Returns at once: no upload is ever in flight."""

    def close(self) -> None:
        """Releases nothing."""

    def dispatch(self, plan: StepPlan) -> Any:
        return SimpleNamespace(sequences=plan.sequences, sampled=self, logits=None, pooled=None)

    def read(self, step: Any) -> list[int]:
        now = time.monotonic()
        interval = int(now / STEP_SECONDS)
        prompts = [sequence.request.prompt for sequence in step.sequences]
        if every := max((prompt[1] for prompt in prompts if prompt[0] == PACED), default=0):
            interval = (interval // every + 1) * every
            time.sleep(interval * STEP_SECONDS - now)
        return [self._letters[interval % len(self._letters)]] * len(step.sequences)


class ModelFreeEngine(Engine):
    """An engine whose executor is `NoDevice`."""

    def __init__(self, model_dir: Path, config: EngineConfig) -> None:
        self.model = model = ModelConfig.from_directory(model_dir)
        self.config = config
        self.tokenizer = tokenizer = load_tokenizer(model_dir)
        self.max_model_len = longest_sequence(model, config)
        assert config.num_pages is not None
        self.allocator = PageAllocator(config.num_pages, config.adapter_pages)
        cuts = cut(model, config.tensor_parallel_size, config.tp_lora)
        self.store = AdapterStore(adapter_geometry(model, config.page_size, cuts), "float32", 1 << 30, None)
        self.residency = AdapterResidency(Evictor(self.allocator, Lru()), 8)
        self.prefixes = None
        letters = [tokenizer.backend_tokenizer.token_to_id(letter) for letter in LETTERS]
        self.executor: Any = NoDevice(letters)
        self.scheduler = Scheduler(self.residency, Fcfs(), config, self.executor, None)
        self.core = EngineCore(self.scheduler, self.executor, time.perf_counter)
        self._outputs = RequestOutputs(self.core, tokenizer, model.vocab_size)
        self.grammars = Grammars(tokenizer, model.vocab_size, sorted(model.eos_token_ids))
        self._unread = []
        self._arrivals = 0


def main(model_dir: Path, port: int, http_processes: int) -> int:
    """Serves until SIGTERM."""
    config = EngineConfig(
        num_pages=1 + MAX_STREAMS * (MAX_MODEL_LEN // 16),
        page_size=16,
        max_num_seqs=MAX_STREAMS,
        max_num_batched_tokens=4 * MAX_STREAMS,
        max_model_len=MAX_MODEL_LEN,
        prefix_cache=False,
    )
    settings = ServerSettings(
        model_dir=model_dir,
        port=port,
        engine=config,
        limits=Limits(per_client=2 * MAX_STREAMS),
        drain_seconds=0.1,
        **({"http_processes": http_processes} if http_processes else {}),
    )
    return serve(settings, lambda: ModelFreeEngine(model_dir, config))


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
