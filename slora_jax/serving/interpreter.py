"""Settings of Python's interpreter in a process that serves."""

from __future__ import annotations

import gc
import sys

SWITCH_SECONDS = 0.0005
"""Argument of `sys.setswitchinterval`; the default of 5 ms would delay the next step's launch."""
COLLECTION_OBJECTS = 20_000
"""New objects after which garbage is collected. With the default of 700, collections took a sixth of a server's time: a
step of 64 streams makes about 200."""


def prepare_interpreter() -> None:
    """Sets the interpreter's intervals for a process that serves, at its start."""
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.set_threshold(COLLECTION_OBJECTS, *gc.get_threshold()[1:])


def freeze_objects() -> None:
    """Excludes all present objects from collections, when the process is ready: a collection of JAX's and the model's
    objects would delay a step by a tenth of a second."""
    gc.collect()
    gc.freeze()
