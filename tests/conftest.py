"""Setup of all tests: CPU devices, one compilation cache, one thread for torch, hypothesis profiles, printed seeds."""

import gc
import os
import signal
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # compiling for GPUs that are not there
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch, when a test imports it
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The interpreter of Mosaic GPU kernels blocks a thread of XLA's for every warpgroup: two cores give too few.
os.environ.setdefault("PJRT_NPROC", "8")
# Most of a test's time is compilation. XLA's newer emitters take three quarters of a small CPU program's, LLVM's
# optimisations a third of what is left, and the candidates of autotuning half of an absent GPU's. A flag that is set
# already comes last and holds.
os.environ["XLA_FLAGS"] = " ".join(
    (
        "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters=true",
        "--xla_backend_optimization_level=0",
        "--xla_gpu_autotune_level=0",
        os.environ.get("XLA_FLAGS", ""),
    )
).strip()
# The Python stack of every operation of a program is a fifth of its tracing and lowering, and no test reads it.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # reloading a cached CPU program logs its machine features

import hypothesis
import jax
import numpy as np
import pytest

COMPILATION_CACHE = Path(__file__).parents[1] / ".cache" / "jax"
SLOW_FILES = (
    "test_notebooks", "test_family_parity", "test_sharded_engine", "test_lora_product",
    "test_paged_attention_compiled", "test_bench", "test_no_pool_copy", "test_processes", "test_replicas",
    "test_lora_gradients_compiled", "test_gradients", "test_expert_adapters", "test_lora_compiled", "test_smollm2",
    "test_systems", "test_rounds", "test_adapter_extras", "test_lora_baselines", "test_step_memory",
    "test_kill_and_restart", "test_report", "test_paged_attention_mosaic_gpu", "test_serving_load",
    "test_paged_attention_triton", "test_real_runner", "test_demo", "test_documents", "test_bfloat16",
    "test_lora_gradients", "test_training_bench", "test_compiled_collectives", "test_slow_clients", "test_live_page",
)  # fmt: skip
"""Files of more than a minute, slowest first. They start first, so that no core idles at the end."""
SHARED = ("peft_servers", "observed_engine")
"""What takes long to make and several files use: models with PEFT adapters, and the recording of a tiny engine."""

hypothesis.settings.register_profile("quick", deadline=None, print_blob=True, max_examples=30, stateful_step_count=30)
hypothesis.settings.register_profile("thorough", hypothesis.settings.get_profile("quick"), max_examples=500)
hypothesis.settings.load_profile("quick")  # pytest --hypothesis-profile=thorough


def pytest_configure(config: pytest.Config) -> None:
    """Sets up eight CPU devices (tests of tensor parallelism use several, the others one) and the compilation cache,
    from which engines of the same shape share their programs."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background, where shells ignore Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_compilation_cache_dir", str(COMPILATION_CACHE))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    for line in (
        r"error:::slora_jax\.",
        r"error:::pallas_kernels\.",
        "ignore:.*torch.jit.*:DeprecationWarning",
        "ignore::DeprecationWarning:peft",
        "ignore::FutureWarning:transformers",
    ):
        config.addinivalue_line("filterwarnings", line)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts slow files first. Raises UsageError if two tests have the same id: xdist would run one of them."""
    order = {name: number for number, name in enumerate(SLOW_FILES)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))  # stable
    repeated = [nodeid for nodeid, count in Counter(item.nodeid for item in items).items() if count > 1]
    if repeated:
        raise pytest.UsageError(f"several tests have the id {repeated[0]}; give each its own")


def pytest_collection_finish() -> None:
    """Takes what is imported by now out of garbage collection: a million objects, looked at again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_report_header() -> list[str]:
    return [f"jax {jax.__version__} on {jax.default_backend()}, compilation cache {COMPILATION_CACHE.name}"]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keeps each file on one worker, and files that use one of `SHARED` on the same one, which then makes it once."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            text = (config.rootpath / file).read_text()
            return next((name for name in SHARED if name in text), file)

    return Scheduling(config, log)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed derived from the test's name, or SLORA_TEST_SEED; pytest shows it when the test fails."""
    value = int(os.environ.get("SLORA_TEST_SEED", zlib.crc32(request.node.nodeid.encode())))
    print(f"seed {value} (set SLORA_TEST_SEED to choose another)")
    return value


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """Events of every compilation, or load from the persistent cache, from here on."""
    events: list[str] = []

    def listen(event: str, duration: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="session")
def peft_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """`PeftServers`: models with PEFT adapters, and their engines on one or several devices."""
    from peft_families import PeftServers

    servers = PeftServers(tmp_path_factory.mktemp("peft"))
    yield servers
    servers.close()
