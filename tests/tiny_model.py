"""A tiny model whose greedy outputs vary, and engine shapes that all tests share, because each is compiled once."""

import fcntl
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from byte_level import train_tokenizer
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerFast

from slora_jax import Engine, EngineConfig
from slora_jax.adapters import BaseGeometry
from slora_jax.models import ModelConfig, Params, init_random
from slora_jax.models.placements import tensor_placements

CACHE = Path(__file__).parents[1] / ".cache"
SHARED_PROGRAMS = {
    "JAX_COMPILATION_CACHE_DIR": str(CACHE / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_NUM_CPU_DEVICES": "8",  # part of the cache's keys
}
"""Environment of processes that find the tests' compiled programs."""
PAGE_SIZE = 8
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TINY_LLAMA = Path(__file__).with_name("tiny_llama.json")
"""Config of the tiny model, for experiments that make random weights of their own."""
HF_CONFIG = json.loads(TINY_LLAMA.read_text())
EOS = HF_CONFIG["eos_token_id"]
SMALL = {
    "num_pages": 81,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 16,
    "max_model_len": 96,
    "max_lora_rank": 16,
    "decode_buckets": (4,),
    "mixed_buckets": (16,),
}
"""The engine shape of tests that need no other. A new shape costs about 25 s of compilation."""
MEDIUM = SMALL | {
    "max_model_len": 128,
    "num_pages": 160,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 32,
    "max_lora_rank": 24,
    "decode_buckets": (16,),
    "mixed_buckets": (32,),
}
"""The engine shape of live servers in tests."""
REAL_RUN = {
    "system": {"num_tokens": 640, "page_size": 8, "max_num_seqs": 4, "max_num_batched_tokens": 16},
    "engine": {"max_model_len": 96, "decode_buckets": [4], "mixed_buckets": [16], "batch": 4},
}
"""`SMALL` as sections of an experiment on `TINY_LLAMA`, whose adapters have ranks up to 16."""
REPLICAS_TOKENS = 3080
"""`num_tokens` with which each of three packed replicas has the pages of `SMALL`."""


def hf_tensors(config: ModelConfig, params: Params) -> dict[str, np.ndarray]:
    """Returns parameters as the tensors of a Hugging Face checkpoint, by name."""
    tensors = {}
    for name, placement in tensor_placements(config).items():
        array: Any = params
        for key in placement.path:
            array = array[key]
        width = placement.shape[0] if placement.transposed or len(placement.shape) == 1 else None
        part = np.asarray(array)[..., placement.column :][..., :width]
        tensors[name] = np.ascontiguousarray(part.T if placement.transposed else part)
    return tensors


@contextmanager
def one_start_at_a_time() -> Iterator[None]:
    """Lets one test process start an engine; others wait, and then find the compiled programs on disk."""
    CACHE.mkdir(exist_ok=True)
    with (CACHE / "start.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class TinyModel:
    """Two layers of width 32 with grouped-query attention: `config`, `graphdef`, `params`, and adapter geometry."""

    def __init__(self) -> None:
        self.config = ModelConfig.from_dict(HF_CONFIG)
        self.graphdef, params = init_random(self.config, "float32", seed=0)
        # Embeddings of unit variance and kernels of gain 2: greedy tokens depend on the context and on every adapter.
        self.params = jax.tree.map(lambda x: x if x.ndim < 2 else x * (2 / (0.02 * math.sqrt(x.shape[0]))), params)
        self.params["embed"]["embedding"] = params["embed"]["embedding"] / 0.02
        config = self.config
        self.geometry = BaseGeometry(
            config.num_layers, config.hidden_size, config.q_width, config.kv_width, config.intermediate_size, PAGE_SIZE
        )

    def settings(self, **changes: object) -> EngineConfig:
        return EngineConfig(**({"dtype": "float32", "page_size": PAGE_SIZE, "progress": False} | SMALL | changes))  # type: ignore[arg-type]

    def engine(self, tokenizer: Any = None, **changes: object) -> Engine:
        with one_start_at_a_time():
            return Engine(self.config, self.graphdef, self.params, self.settings(**changes), tokenizer=tokenizer)

    def save(self, directory: Path) -> Path:
        """Writes a Hugging Face directory with a tokenizer."""
        save_file(hf_tensors(self.config, self.params), directory / "model.safetensors")
        (directory / "config.json").write_text(json.dumps(HF_CONFIG))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(), bos_token="<s>", eos_token="</s>")
        tokenizer.chat_template = CHAT_TEMPLATE
        tokenizer.save_pretrained(directory)
        return directory
