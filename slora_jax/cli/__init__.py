"""The console script `slora`: one module for each command.

What parses the command line imports neither NumPy nor JAX, so that help and mistakes are answered at once; a command
imports what it needs when it runs.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence

from slora_jax.cli.parser import make_parser, with_options
from slora_jax.errors import ProcessLostError, SloraError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0, 1 (the demo's check failed, or a compile report has a spill or a
    copy of the pool), 2 (an error of the user's making, one line on stderr), 3 (another process of those that serve
    together is lost, one line on stderr), 130 (Ctrl-C)."""
    args = None
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found": it is not needed
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # in a pipe too, text and progress bars come in order
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
    except BrokenPipeError:  # the reader of stdout has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
