"""`slora generate`: answers one prompt with the base model or with each of several adapters."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from slora_jax.cli.processes import add_parallel_options, check_processes, join
from slora_jax.cli.values import MODEL_HELP, count, model_path, named_directory
from slora_jax.cli.verbose import add_verbose_option, observe_phases
from slora_jax.engine.config import DTYPES, EngineConfig
from slora_jax.errors import ConfigError, RequestError
from slora_jax.phases import phase, report, seconds_since_start
from slora_jax.scheduling.config import WEIGHTS
from slora_jax.scheduling.sampling_params import SamplingParams

if TYPE_CHECKING:
    from slora_jax.distributed.group import ProcessGroup
    from slora_jax.engine.engine import Engine
    from slora_jax.models.config import ModelConfig

_ROWS = 64
"""The prefill program's rows are a multiple of this."""


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "generate",
        help="answer a prompt",
        description="Answers a prompt and prints the text as it is generated. With several adapters, each answers in "
        "turn, after a line with its name.",
    )
    option = parser.add_argument
    option("model_dir", metavar="MODEL", type=model_path, help=MODEL_HELP)
    option("--prompt", metavar="TEXT", required=True, help="text to continue")
    option("--chat", action="store_true", help="send the prompt as a user message, in the model's chat template")
    add_sampling_options(parser, max_tokens=128)
    add_verbose_option(parser)
    add_parallel_options(parser)
    parser.set_defaults(run=run, tensor_parallel_size=1)


def add_sampling_options(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    """Adds the options shared by `slora generate` and `slora chat`; `max_tokens` is a default."""
    option = parser.add_argument
    option(
        "--adapter",
        metavar="NAME=DIR",
        type=named_directory,
        action="append",
        default=[],
        help="name and directory of a PEFT adapter; may be repeated",
    )
    option("--max-tokens", metavar="N", type=count, default=max_tokens, help="longest answer (default: %(default)s)")
    option("--max-model-len", metavar="N", type=count, default=4096, help="longest sequence (default: %(default)s)")
    option("--temperature", metavar="T", type=float, default=0.0, help="sampling temperature (default: 0, greedy)")
    option("--seed", metavar="N", type=int, default=0, help="sampling seed (default: %(default)s)")
    option("--dtype", default="auto", choices=DTYPES, help="weight dtype (default: float32 on a CPU, else bfloat16)")
    option(
        "--weights",
        default="auto",
        choices=WEIGHTS,
        help="format of the layers' weights (default: the checkpoint's own)",
    )


def run(args: argparse.Namespace) -> int:
    """Checks settings, model, adapters and prompt, the cheapest first, then loads the engine and answers."""
    observe_phases(args)
    params = SamplingParams(max_tokens=args.max_tokens, temperature=args.temperature, seed=args.seed)
    check_processes(args, args.tensor_parallel_size)
    check_adapters(args)
    if not args.prompt:
        raise ConfigError("--prompt='': must not be empty")
    from slora_jax.models.config import ModelConfig

    model = ModelConfig.from_directory(args.model_dir)
    config = _engine_config(args, model)
    before = seconds_since_start()
    with phase("tokenizer"):
        tokenizer, prompt = _prompt(args, model, config)
    config = _sized_for(prompt, config)
    import_engine(before)
    with join(args) or nullcontext() as processes:
        if processes is None or processes.is_leader:
            return _answer(args, prompt, params, model, config, tokenizer, processes)
        from slora_jax.distributed.follower import Follower

        Follower.from_pretrained(args.model_dir, config, processes).run()
    return 0


def check_adapters(args: argparse.Namespace) -> None:
    """Checks the adapters' names and, in process 0, which alone reads them, their directories.

    Raises:
      ConfigError: a name is given twice, or a directory does not exist.
      AdapterError: a directory has no usable config.
    """
    names = [name for name, _ in args.adapter]
    for name, directory in args.adapter:
        if names.count(name) > 1:
            raise ConfigError(f"--adapter={name}={directory}: the name {name!r} is given twice; names must differ")
        if not args.process_id and not directory.is_dir():
            raise ConfigError(f"--adapter={name}={directory}: no such directory; give that of a PEFT adapter")
    if args.adapter and not args.process_id:
        from slora_jax.adapters.config import LoraConfig
        from slora_jax.adapters.peft_format import CONFIG_FILE

        for _, directory in args.adapter:
            LoraConfig.from_file(directory / CONFIG_FILE)


def _engine_config(args: argparse.Namespace, model: ModelConfig) -> EngineConfig:
    """The engine's settings, except the number of pages and the rows of the prefill program."""
    return EngineConfig(
        dtype=args.dtype,
        weights=args.weights,
        max_num_seqs=1,
        max_model_len=min(args.max_model_len, model.max_position_embeddings),
        mixed_buckets=(EngineConfig.max_num_batched_tokens,),
        tensor_parallel_size=args.tensor_parallel_size,
        lora="paged" if args.adapter else "off",
        compile_ahead=False,
    )


def _prompt(args: argparse.Namespace, model: ModelConfig, config: EngineConfig) -> tuple[Any, list[int]]:
    """Returns the tokenizer and the prompt's token ids.

    Raises:
      RequestError: the model has no tokenizer, or no chat template for `--chat`, or the prompt is too long.
    """
    from slora_jax.engine.arrival import chat_ids, prompt_ids
    from slora_jax.engine.text import load_tokenizer

    tokenizer = load_tokenizer(args.model_dir)
    longest = config.max_model_len
    assert longest is not None
    if tokenizer is None:
        raise RequestError(f"--prompt: {args.model_dir} has no tokenizer; slora generate needs one")
    prompt: str | list[int] = args.prompt
    if args.chat:
        if tokenizer.chat_template is None:
            raise RequestError(f"--chat: {args.model_dir} has no chat template; leave it out")
        prompt = chat_ids([{"role": "user", "content": args.prompt}], tokenizer, longest)
    return tokenizer, prompt_ids(prompt, tokenizer, model.vocab_size, longest)


def _sized_for(prompt: list[int], config: EngineConfig) -> EngineConfig:
    """Returns the config with one prefill program, no larger than the prompt needs."""
    rows = min(EngineConfig.max_num_batched_tokens, -(-len(prompt) // _ROWS) * _ROWS)
    return replace(config, max_num_batched_tokens=rows, mixed_buckets=(rows,))


def import_engine(before: float) -> None:
    """Imports the engine and reports the phase "imports"; `before` is the seconds of the earlier imports."""
    start = time.monotonic()
    import slora_jax.distributed.follower
    import slora_jax.engine.engine  # noqa: F401

    report("imports", before + time.monotonic() - start)


@contextmanager
def loaded_engine(
    args: argparse.Namespace,
    model: ModelConfig,
    config: EngineConfig,
    tokenizer: Any,
    processes: ProcessGroup | None = None,
) -> Iterator[Engine]:
    """An engine with the command line's adapters loaded; its pool holds one sequence and the largest adapter."""
    from pallas_kernels.lora.layout import ceil_div
    from slora_jax.adapters import read_peft
    from slora_jax.engine.engine import Engine
    from slora_jax.engine.sizing import engine_geometry

    geometry = engine_geometry(model, config)
    adapters = {name: read_peft(directory, geometry) for name, directory in args.adapter}
    assert config.max_model_len is not None
    adapter_pages = [int(geometry.layout.num_pages(adapter.layout_ranks.max(0))) for adapter in adapters.values()]
    num_pages = 1 + ceil_div(config.max_model_len, config.page_size) + max(adapter_pages, default=0)
    extras = any(adapter.extras for adapter in adapters.values())
    config = replace(config, num_pages=num_pages, adapter_extras=extras)
    with Engine.from_pretrained(args.model_dir, config, tokenizer=tokenizer, processes=processes) as engine:
        for name, adapter in adapters.items():
            engine.load_adapter(name, adapter)
        yield engine


def _answer(
    args: argparse.Namespace,
    prompt: list[int],
    params: SamplingParams,
    model: ModelConfig,
    config: EngineConfig,
    tokenizer: Any,
    processes: ProcessGroup | None,
) -> int:
    with loaded_engine(args, model, config, tokenizer, processes) as engine:
        names = [name for name, _ in args.adapter]
        for name in names or [None]:
            if len(names) > 1:
                print(f"[{name}]")
            start = time.monotonic()
            for number, delta in enumerate(engine.stream(prompt, params, name)):
                if number == 0:
                    report("first token", time.monotonic() - start)
                print(delta.text, end="", flush=True)
                if delta.output is not None and delta.output.error is not None:
                    raise RequestError(delta.output.error)
            print(flush=True)
    report("total", seconds_since_start())
    return 0
