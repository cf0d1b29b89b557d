"""The console script `slora`, with one module for each command.

Parsing imports neither NumPy nor JAX, so help and usage errors appear at once; a command imports the rest when it runs.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence

from slora_jax.cli.parser import make_parser, with_options
from slora_jax.errors import ProcessLostError, SloraError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
      The exit status. 0: success; 1: the demo's check failed, an adapter's training was stopped, or a compile report
      shows a spill or a copy of the pool; 2: a `SloraError`, shown as one line on stderr; 3: another process of the
      group was lost, likewise; 130: Ctrl-C; 141: stdout was closed.
    """
    args = None
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # hides "PyTorch was not found"
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # keeps text and progress bars in order in a pipe
    try:
        args = make_parser().parse_args(argv)
        return args.run(args)
    except SloraError as error:
        print("slora: error:", " ".join(with_options(str(error), args).split()), file=sys.stderr)
        if isinstance(error, ProcessLostError):
            from slora_jax.distributed.group import EXIT_LOST

            return EXIT_LOST
        return 2
    except KeyboardInterrupt:
        print("slora: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader closed stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
