"""A small model, a device with round numbers, and workloads."""

import numpy as np

from slora_jax.simulation import DeviceModel, Efficiency, ModelShape, SimulatedRequest

SHAPE = ModelShape(
    num_layers=2, hidden_size=64, q_width=64, kv_width=64, intermediate_size=160, vocab_size=100, dtype_bytes=2
)

EFFICIENCY = Efficiency(
    matmul=0.5, bandwidth=0.8, attention=0.5, prefill_attention=0.25, lora=0.5, lora_reread=0.25, lora_flops=0.5,
    host_to_device=0.5, step_seconds=1e-4, layer_seconds=0.0, lora_layer_seconds=0.0, adapter_load_seconds=1e-3,
    allocation_seconds=1e-3, launch_seconds=1e-5, host_step_seconds=2e-4, host_sequence_seconds=1e-5,
    adapter_wrap_seconds=0.1,
)  # fmt: skip


def device(**changes: float) -> DeviceModel:
    """A device on which a decode step of the small model takes about 2 ms, and a prompt of 100 tokens about 15 ms."""
    ceilings = {
        "memory_bytes": 1e7,
        "memory_bandwidth": 3e8,
        "matmul_flops": 2e9,
        "vector_flops": 5e8,
        "host_to_device_bandwidth": 2e7,
        "link_bandwidth": 4e7,
    }
    software = dict.fromkeys(("pytorch", "vllm", "peft", "jax"), EFFICIENCY)
    return DeviceModel("small", **(ceilings | changes), efficiency=software)


def random_workload(
    seed: int, requests: int = 60, rate: float = 150.0, adapters: int = 6, longest: int = 40
) -> list[SimulatedRequest]:
    """Requests of 1 to `longest` tokens either way; one in eight without an adapter; half of them begin with one of two
    texts. The rate overloads the device most of the time."""
    random = np.random.default_rng(seed)
    arrival = np.cumsum(random.gamma(0.5, 2 / rate, requests))
    sizes = random.integers(1, longest + 1, (requests, 2))
    chosen = random.integers(0, adapters, requests)
    none = random.random(requests) < 1 / 8
    shared = random.integers(0, sizes[:, 0])
    text = random.integers(0, 4, requests)
    return [
        SimulatedRequest(
            float(t), None if n else int(a), int(p), int(o), prefix=(int(x), int(s)) if s and x < 2 else None
        )
        for t, n, a, (p, o), s, x in zip(arrival, none, chosen, sizes, shared, text, strict=True)
    ]
