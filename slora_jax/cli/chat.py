"""`slora chat`: a conversation with a model in the terminal."""

from __future__ import annotations

import argparse
import sys
from contextlib import closing, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from slora_jax.cli.generate import add_sampling_options, check_adapters, import_engine, loaded_engine
from slora_jax.cli.values import MODEL_HELP, model_path
from slora_jax.cli.verbose import add_verbose_option, observe_phases
from slora_jax.engine.config import EngineConfig
from slora_jax.errors import RequestError
from slora_jax.phases import phase, report, seconds_since_start
from slora_jax.scheduling.sampling_params import SamplingParams

if TYPE_CHECKING:
    from slora_jax.engine.engine import Engine

COMMANDS = "/reset starts a new conversation, /adapter NAME selects an adapter (without NAME: the base model)"


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "chat",
        help="chat with a model in the terminal",
        description="Holds a conversation with a chat model or one of its adapters and prints each answer as it is "
        f"generated. Ctrl-C stops an answer, Ctrl-D exits; {COMMANDS}.",
    )
    option = parser.add_argument
    option("model_dir", metavar="MODEL", type=model_path, help=MODEL_HELP)
    option("--system", metavar="TEXT", help="system message that begins every conversation")
    add_sampling_options(parser, max_tokens=512)
    add_verbose_option(parser)
    parser.set_defaults(run=run, tensor_parallel_size=1, process_id=None)


def run(args: argparse.Namespace) -> int:
    """Checks settings, model and adapters, then loads them and chats."""
    observe_phases(args)
    params = SamplingParams(max_tokens=args.max_tokens, temperature=args.temperature, seed=args.seed)
    check_adapters(args)
    from slora_jax.engine.text import load_tokenizer
    from slora_jax.models.config import ModelConfig

    model = ModelConfig.from_directory(args.model_dir)
    config = EngineConfig(
        dtype=args.dtype,
        weights=args.weights,
        max_num_seqs=1,
        max_model_len=min(args.max_model_len, model.max_position_embeddings),
        mixed_buckets=(64, EngineConfig.max_num_batched_tokens),
        lora="paged" if args.adapter else "off",
        compile_ahead=False,
    )
    before = seconds_since_start()
    with phase("tokenizer"):
        tokenizer = load_tokenizer(args.model_dir)
    if tokenizer is None or tokenizer.chat_template is None:
        raise RequestError(f"{args.model_dir} has no chat template; slora chat needs one: use slora generate")
    import_engine(before)
    with loaded_engine(args, model, config, tokenizer) as engine:
        report("total", seconds_since_start())
        print(f"Ctrl-C stops an answer, Ctrl-D exits; {COMMANDS}.")
        talk(engine, params, args.system, next((name for name, _ in args.adapter), None))
    return 0


def talk(engine: Engine, params: SamplingParams, system: str | None, adapter: str | None) -> None:
    """Reads messages from stdin to its end and answers them.

    Args:
      engine: an engine with the adapters loaded.
      params: sampling parameters of each answer.
      system: first message of every conversation, or None.
      adapter: the adapter to start with; None: the base model.
    """
    from slora_jax.engine.arrival import chat_ids

    with suppress(ImportError):
        import readline  # noqa: F401  gives input() line editing
    first = [] if system is None else [{"role": "system", "content": system}]
    messages = list(first)
    while True:
        try:
            text = input(f"{adapter or ''}> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D exits)")
            continue
        command, _, rest = text.partition(" ")
        if command == "/reset":
            messages = list(first)
        elif command == "/adapter":
            names = [info.name for info in engine.adapters()]
            if rest and rest not in names:
                print(f"there is no adapter {rest!r}; there are {', '.join(names) or 'none'}")
            else:
                adapter = rest or None
        elif command.startswith("/"):
            print(f"there is no command {command}; {COMMANDS}")
        elif text:
            messages.append({"role": "user", "content": text})
            try:
                prompt = chat_ids(messages, engine.tokenizer, engine.max_model_len)
                answer = _answer(engine, prompt, params, adapter)
            except RequestError as error:
                messages.pop()
                print(f"slora: {error} (/reset begins a new conversation)", file=sys.stderr)
            else:
                messages.append({"role": "assistant", "content": answer})


def _answer(engine: Engine, prompt: list[int], params: SamplingParams, adapter: str | None) -> str:
    """Prints an answer as it is generated and returns it. Ctrl-C stops the answer; its text so far is returned."""
    assert params.max_tokens is not None
    room = max(1, engine.max_model_len - len(prompt))
    answer = ""
    try:
        stream = engine.stream(prompt, replace(params, max_tokens=min(params.max_tokens, room)), adapter)
        with closing(stream):  # type: ignore[type-var]
            for delta in stream:
                print(delta.text, end="", flush=True)
                answer += delta.text
        print(" [cut: max_tokens]" if delta.finish_reason == "length" else "")
    except KeyboardInterrupt:
        print(" [stopped]")
    return answer
