"""`slora serve`: the HTTP service."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path

from slora_jax.cli.processes import add_parallel_options, check_processes, join
from slora_jax.cli.values import MODEL_HELP, count, model_path
from slora_jax.cli.verbose import add_verbose_option, observe_phases
from slora_jax.engine.config import DTYPES, EngineConfig
from slora_jax.errors import ConfigError
from slora_jax.phases import report, seconds_since_start
from slora_jax.scheduling.config import KV_DTYPES, WEIGHTS


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "serve",
        help="serve the model and its adapters over HTTP with OpenAI's API",
        description="Serves the model and its adapters over HTTP with OpenAI's API until SIGTERM or Ctrl-C. The config "
        "file can set everything in slora_jax/serving/settings.py; options take precedence over it.",
    )
    option = parser.add_argument
    option("model_dir", metavar="MODEL", type=model_path, help=MODEL_HELP)
    option("--adapters", metavar="DIR", type=Path, help="folder of PEFT directories, watched for new ones")
    option("--config", metavar="FILE", type=Path, help="YAML file with settings")
    option("--name", metavar="NAME", help="base model's name for clients (default: the directory's)")
    option("--host", metavar="ADDRESS", help="address to listen on (default: 127.0.0.1, this machine only)")
    option("--port", metavar="N", type=int, help="port to listen on (default: 8000; 0: any free port)")
    option("--cors-origin", metavar="URL", action="append", help="origin of web pages with access; *: any")
    option("--dtype", choices=DTYPES, help="weight dtype (default: float32 on a CPU, else bfloat16)")
    option("--weights", choices=WEIGHTS, help="format of the layers' weights (default: the checkpoint's own)")
    option("--kv-dtype", choices=KV_DTYPES, help="keys and values: one byte an element, or the dtype (default: auto)")
    option(
        "--max-num-seqs",
        metavar="N",
        type=count,
        help=f"sequences running at once (default: {EngineConfig.max_num_seqs})",
    )
    option("--num-pages", metavar="N", type=count, help="pages of the pool (default: as many as fit)")
    option(
        "--adapter-extras",
        action="store_const",
        const=True,
        help="serve DoRA, biases, LoRA on experts, and changes of head and embedding too (docs/adapters.md); takes "
        "longer to start",
    )
    option("--embeddings", action="store_true", default=None, help="serve /v1/embeddings too, with programs of its own")
    option("--train", action="store_true", help="let clients train adapters with Tinker's API (docs/tinker.md)")
    option("--train-dir", metavar="DIR", type=Path, help="directory of the states that they save; implies --train")
    option("--replicas", metavar="N", type=count, help="number of engines, behind Ray Serve if above 1 (default: 1)")
    option("--http-processes", metavar="N", type=int, help="processes for HTTP; 0 (default): the engine's serves it")
    add_verbose_option(parser)
    add_parallel_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Checks the settings, then serves."""
    observe_phases(args)
    try:
        from slora_jax.serving.settings import ServerSettings
    except ImportError as error:
        raise _extra_missing(error) from error
    names = (
        *("dtype", "weights", "kv_dtype", "max_num_seqs", "num_pages", "embeddings", "tensor_parallel_size"),
        "adapter_extras",
    )
    given = {
        "model_dir": args.model_dir,
        "adapters": args.adapters,
        "name": args.name,
        "host": args.host,
        "port": args.port,
        "replicas": args.replicas,
        "http_processes": args.http_processes,
        "train": _train(args),
        "cors_origins": args.cors_origin and tuple(args.cors_origin),
        "engine": {name: value for name in names if (value := getattr(args, name)) is not None},
    }
    settings = ServerSettings.from_file(args.config, **given)
    if settings.replicas > 1 and args.coordinator is not None:
        raise ConfigError(f"--replicas={settings.replicas}: must be 1 with --coordinator; leave one of the two out")
    if settings.http_processes and args.coordinator is not None:
        count = settings.http_processes
        raise ConfigError(f"http_processes={count}: must be 0 with --coordinator; leave one of the two out")
    check_processes(args, settings.engine.tensor_parallel_size)
    from slora_jax.models.config import ModelConfig

    model = ModelConfig.from_directory(settings.model_dir)  # raises before the server listens
    try:
        from slora_jax.serving.serve import serve
    except ImportError as error:
        raise _extra_missing(error) from error
    from slora_jax.distributed.follower import Follower
    from slora_jax.engine.sizing import longest_sequence

    longest_sequence(model, settings.engine)
    report("imports", seconds_since_start())
    with join(args) or nullcontext() as processes:
        if processes is None or processes.is_leader:
            return serve(settings, lambda: settings.build_engine(processes))
        Follower.from_pretrained(settings.model_dir, settings.engine, processes).run()
    return 0


def _train(args: argparse.Namespace) -> dict[str, Path] | None:
    if args.train_dir is not None:
        return {"state_dir": args.train_dir}
    return {} if args.train else None


def _extra_missing(error: ImportError) -> ConfigError:
    return ConfigError(f"slora serve needs {error.name}: make install EXTRAS=serve")
