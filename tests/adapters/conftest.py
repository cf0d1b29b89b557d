"""A tiny grouped-query Llama with distinct widths, its geometry, adapters of one size, and stores for them."""

import pytest

from slora_jax.adapters import AdapterStore, BaseGeometry, pack_tiles, random_adapter

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 3, 24, 4, 2, 8, 40
VOCAB = 32


@pytest.fixture(scope="session")
def geometry():
    return BaseGeometry(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        q_width=HEADS * HEAD_DIM,
        kv_width=KV_HEADS * HEAD_DIM,
        intermediate_size=INTERMEDIATE,
        page_size=8,
        vocab_size=VOCAB,
    )


@pytest.fixture(scope="session")
def tiny_llama():
    """Returns a function that makes the same small torch model each time; PEFT changes its model."""
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
    )

    def make():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()

    return make


@pytest.fixture(scope="session")
def peft_with_weights(tiny_llama):
    """`make(**lora_config) -> PeftModel` with random, nonzero A and B."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")

    def make(seed=0, **fields):
        model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**({"task_type": "CAUSAL_LM"} | fields)))
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_()
        return model.eval()

    return make


@pytest.fixture(scope="session")
def adapters(geometry):
    """Eight adapters of one size."""
    return [random_adapter(geometry, 4, seed=seed) for seed in range(8)]


@pytest.fixture(scope="session")
def size(adapters, geometry):
    return pack_tiles(adapters[0], geometry, "float32").nbytes


@pytest.fixture
def open_store(geometry, tmp_path):
    stores = []

    def make(host_adapter_bytes):
        stores.append(AdapterStore(geometry, "float32", host_adapter_bytes, tmp_path / "spill"))
        return stores[-1]

    yield make
    for store in stores:
        store.close()
