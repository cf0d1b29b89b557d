"""LoRA on experts against PEFT, in both of its layouts: mixed with other rows, in chunks, evicted and reloaded."""

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from slora_jax import Engine, EngineConfig, SamplingParams
from slora_jax.adapters import AdapterStore
from slora_jax.adapters.config import LoraConfig
from slora_jax.errors import AdapterError
from slora_jax.parallel.layout import Shards

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
from peft_families import SeparateAdapters  # noqa: E402
from small_families import ATTENTION, FAMILIES  # noqa: E402

BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ADAPTERS = {
    "attention": {"r": 5, "lora_alpha": 9, "target_modules": ATTENTION},
    "stacked": {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj"], "target_parameters": BOTH},
    "down": {"r": 4, "use_rslora": True, "target_modules": [], "target_parameters": ["experts.down_proj"]},
    "wide": {
        "r": 18,
        "target_modules": [],
        "target_parameters": BOTH,
        "rank_pattern": {"gate_up_proj": 7},
        "alpha_pattern": {"experts.down_proj": 30},
    },
}
CONFIG = EngineConfig(
    dtype="float32",
    num_pages=50,
    max_num_seqs=4,
    max_num_batched_tokens=16,
    max_model_len=96,
    max_lora_rank=20,
    decode_buckets=(4,),
    mixed_buckets=(16,),
    keep_logits=True,
    compile_ahead=False,
    progress=False,
    adapter_extras=True,
)
LENGTHS = (45, 10, 15, 30)
MODULES = {"mixtral": "block_sparse_moe.experts.{}.w{}", "qwen3_moe": "mlp.experts.{}.{}_proj"}
NAMES = {"mixtral": ("1", "3", "2"), "qwen3_moe": ("gate", "up", "down")}


def write_modules(directory, family, matrices, fields):
    """Writes LoRA on experts as transformers 4 names it; `matrices` are A and B by layer, expert and projection."""
    tensors = {}
    for (layer, expert, projection), pair in matrices.items():
        module = MODULES[family].format(expert, NAMES[family][projection])
        for side, matrix in zip("AB", pair, strict=True):
            name = f"base_model.model.model.layers.{layer}.{module}.lora_{side}.weight"
            tensors[name] = np.ascontiguousarray(matrix, np.float32)
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **fields}))


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe"])
def family(request, tmp_path_factory):
    kind, fields, _ = FAMILIES[request.param]
    family = SeparateAdapters(tmp_path_factory.mktemp(kind), kind, fields, ADAPTERS, LENGTHS)
    if kind == "mixtral":  # PEFT reads the adapter of a model with experts in all layers
        rng, d, ffn = np.random.default_rng(3), 64, fields["intermediate_size"]
        shapes = {0: (d, ffn), 1: (d, ffn), 2: (ffn, d)}
        matrices = {
            (layer, expert, projection): (rng.normal(0, 0.1, (4, d_in)), rng.normal(0, 0.3, (d_out, 4)))
            for layer in range(2)
            for expert in range(fields["num_local_experts"])
            for projection, (d_in, d_out) in shapes.items()
        }
        config = {"r": 4, "lora_alpha": 6, "target_modules": ["w1", "w2", "w3"]}
        write_modules(family.adapter_dir / "modules", kind, matrices, config)
        family.add("modules", family.adapter_dir / "modules", kind, fields)
    return family


class SelectedError(Exception):
    """The LoRA work of a step's program."""


def test_mixed_batch_matches_peft_before_and_after_eviction(family, monkeypatch):
    is_mixtral = (family.adapter_dir / "modules").exists()
    batch = ["stacked", None, "attention", "modules" if is_mixtral else "down"]
    params = SamplingParams(max_tokens=8 if is_mixtral else 1, ignore_eos=True)  # 1: no decode program is compiled
    with Engine.from_pretrained(family.model_dir, CONFIG) as engine:
        for name in {*batch, "wide"} - {None}:
            assert ("experts" in engine.load_adapter(name, family.adapter_dir / name).extras) == (name != "attention")
        for _ in range(2):  # "wide" takes the pages of the others
            # An adapter of experts is there first, so that every step runs the program for them.
            family.check(engine.generate(family.prompts[1:2], replace(params, max_tokens=1), "stacked"))
            family.check(engine.generate(family.prompts, params, batch))
            family.check(engine.generate(family.prompts[2:3], params, "wide"))
        assert engine.stats().adapter_evictions >= 5
        engine.check()

        def select(tokens, seqs, lora, *rest):
            raise SelectedError(lora)

        monkeypatch.setattr(engine.executor.device.programs, "select", select)
        with pytest.raises(SelectedError, match="^True$"):  # not the program of experts
            engine.generate([[1, 2, 3]], params, "attention")


def test_both_layouts_give_the_same_content(family, tmp_path):
    kind = family.name.rstrip("0123456789")
    saved = family.adapter_dir / "wide"
    config = json.loads((saved / "adapter_config.json").read_text())
    count = FAMILIES[kind][1].get("num_local_experts") or FAMILIES[kind][1]["num_experts"]
    matrices = {}
    tensors = load_file(saved / "adapter_model.safetensors")
    for layer in range(2):
        prefix = f"base_model.model.model.layers.{layer}.mlp.experts"
        for module, projections in ((f"{prefix}.base_layer", (0, 1)), (prefix, (2,))):
            if f"{module}.lora_A.weight" not in tensors:  # a layer without experts
                continue
            a, b = (tensors[f"{module}.lora_{side}.weight"] for side in "AB")
            a, b = a.reshape(count, -1, a.shape[1]), b.reshape(len(b), -1, count)
            for expert in range(count):
                for projection, own in zip(projections, np.split(b[..., expert], len(projections)), strict=True):
                    matrices[layer, expert, projection] = a[expert], own
    names = [MODULES[kind].format("[0-9]+", name) for name in NAMES[kind]]
    own = {name: config[name] for name in ("r", "lora_alpha")}
    patterns = {"rank_pattern": dict.fromkeys(names[:2], 7), "alpha_pattern": {names[2]: 30}}
    fields = own | patterns | {"target_modules": ".*(" + "|".join(names) + ")"}
    write_modules(tmp_path / "modules", kind, matrices, fields)
    with Engine.from_pretrained(family.model_dir, CONFIG) as engine:
        stacked, modules = (engine.load_adapter(str(path), path) for path in (saved, tmp_path / "modules"))
        assert stacked.digest == modules.digest and stacked.num_pages == modules.num_pages
        geometry = engine.store.geometry
    reason = "LoRA on experts, .*need EngineConfig.adapter_extras=True, found False"
    with AdapterStore(geometry, "float32", 10**9) as store, pytest.raises(AdapterError, match=reason):
        store.prepare("x", saved)
    split = AdapterStore(replace(geometry, shards=Shards(2)), "float32", 10**9, extras=True)
    with (
        split as store,
        pytest.raises(AdapterError, match="changes experts, .*needs EngineConfig.tensor_parallel_size=1"),
    ):
        store.prepare("x", saved)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"target_parameters": ["gate.weight"]}, "'gate.weight': LoRA on the router is not supported"),
        ({"target_parameters": ["q_proj.weight"]}, "'q_proj.weight': it is no parameter of experts"),
        ({"target_parameters": BOTH, "alora_invocation_tokens": [1]}, "cannot be combined with target_parameters"),
    ],
)
def test_other_parameters_are_refused_by_name(fields, reason):
    with pytest.raises(AdapterError, match=reason):
        LoraConfig.from_json({"peft_type": "LORA"} | fields)
