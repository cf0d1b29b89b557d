"""One of several processes that serve one model together: `serve_together.py MODE PROCESS PROCESSES PORT`, or
`serve_together.py slora ARGUMENTS` for the command.

The leader serves the same traffic until it is killed, and prints its first tokens as JSON. Modes: "serve"; in "idle"
the leader prints {} and waits; in "differ" process 1 has another setting; in "fault" process 1 fails in its tenth step.
"""

import json
import math
import os
import sys
import time
from dataclasses import replace

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("PJRT_NPROC", "8")

import jax
import numpy as np
from jax._src import distributed

from slora_jax import Engine, EngineConfig, Follower, ProcessGroup, SamplingParams, cli, join_processes
from slora_jax.adapters import random_adapter
from slora_jax.distributed import join as joining
from slora_jax.engine import adapter_geometry, placement
from slora_jax.engine.device import Device
from slora_jax.models import ModelConfig, init_random

HF_CONFIG = {
    "model_type": "llama",
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
RANKS = (1, 3, 8, 5, 2, 7)
PROMPTS = (5, 17, 30, 2, 9, 12, 21, 4, 16, 11)
ADAPTERS = (None, "1", "3", "8", "8", None, "5", "2", "7", "3")
PAGES = 30
"""Pages that fit on the leader; the other processes have room for fewer."""
CONFIG = EngineConfig(
    dtype="float32",
    num_pages=None,
    page_size=8,
    max_num_seqs=4,
    max_num_batched_tokens=16,
    max_model_len=48,
    max_lora_rank=8,
    adapter_slots=8,
    decode_buckets=(4,),
    mixed_buckets=(16,),
    prefetch=2,
    upload_pages_per_step=3,
    compile_ahead=False,
    compilation_cache_dir=None,
    progress=False,
)


def make_model() -> tuple:
    """Returns model config, graph definition, and parameters with varied greedy tokens."""
    model = ModelConfig.from_dict(HF_CONFIG)
    with jax.default_device(jax.local_devices()[0]):
        graphdef, params = init_random(model, "float32", seed=0)
        params = jax.tree.map(lambda x: x * (2 / (0.02 * math.sqrt(x.shape[0])) if x.ndim > 1 else 1.0), params)
    return model, graphdef, params


def load_adapters(engine: Engine) -> None:
    geometry = adapter_geometry(engine.model, CONFIG.page_size)
    for rank in RANKS:
        engine.load_adapter(str(rank), random_adapter(geometry, rank, seed=rank))


def serve(engine: Engine) -> list[list[int]]:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 101, length).tolist() for length in PROMPTS]
    sampling = [
        SamplingParams(
            max_tokens=14,
            ignore_eos=True,
            temperature=0.5 * (i % 2),
            seed=i,
            logprobs=2 if i == 4 else None,
            logit_bias={7: 3.0, 100: -2.0} if i in (4, 5) else None,
        )
        for i in range(len(PROMPTS))
    ]
    return [output.token_ids for output in engine.generate(prompts, sampling, list(ADAPTERS))]


def fail_in_tenth_step() -> None:
    step, calls = Device.step, iter(range(10**9))

    def failing(*args: object) -> object:
        if next(calls) == 9:
            raise RuntimeError("the device is on fire")
        return step(*args)

    Device.step = failing


def lead(config: EngineConfig, group: ProcessGroup, is_idle: bool) -> None:
    with Engine(*make_model(), config, processes=group) as engine:
        while is_idle:
            print(json.dumps({}), flush=True)
            time.sleep(60)
        load_adapters(engine)
        staged = []
        stage = engine.executor.stage
        engine.executor.stage = lambda upload: stage(upload) or staged.append(upload)
        tokens = serve(engine)
        engine.scheduler.config = replace(engine.scheduler.config, prefetch=0)  # uploads before the step from here on
        again = serve(engine)
        stats = engine.stats()
        counts = {name: getattr(stats, name) for name in ("preemptions", "adapter_evictions")} | {"staged": len(staged)}
        pages = engine.allocator.num_pages
        print(json.dumps({"tokens": tokens, "again": again, "num_pages": pages, **counts}), flush=True)
        while True:
            serve(engine)


def all_write_cache(group: ProcessGroup) -> ProcessGroup:
    """Lets followers write the compilation cache too; JAX lets only process 0, but on CPUs each has its own keys."""
    jax.devices()
    distributed.global_state.process_id = 0
    return group


def main(mode: str, process: int, processes: int, port: int) -> None:
    config = replace(CONFIG, tensor_parallel_size=processes)
    if process == 1 and mode == "differ":
        config = replace(config, max_lora_rank=16)
    if process == 1 and mode == "fault":
        fail_in_tenth_step()
    placement.pages_that_fit = lambda *_: PAGES - process
    with all_write_cache(join_processes(f"127.0.0.1:{port}", processes, process, timeout=100)) as group:
        if group.is_leader:
            lead(config, group, mode == "idle")
        else:
            Follower(*make_model(), config, group).run()


if __name__ == "__main__":
    if sys.argv[1] == "slora":
        join = joining.join_processes
        joining.join_processes = lambda *args, **options: all_write_cache(join(*args, **options))
        sys.exit(cli.main(sys.argv[2:]))
    main(sys.argv[1], *map(int, sys.argv[2:]))
