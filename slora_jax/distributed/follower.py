"""A follower: any process but process 0. It repeats the leader's calls on its own devices."""

from __future__ import annotations

from collections import deque
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from slora_jax.distributed.channel import Call, FrameError
from slora_jax.distributed.group import LEADER, ProcessGroup
from slora_jax.engine.config import EngineConfig
from slora_jax.engine.device import Copy, Device
from slora_jax.engine.placement import load, place
from slora_jax.engine.programs import keep_compiled_programs
from slora_jax.errors import ProcessLostError
from slora_jax.models import ModelConfig, Params


class Follower:
    """Holds one process's part of a model that several processes serve (`join_processes`).

    It is made from the same model and settings as the leader's `Engine`. Only the leader has requests, adapters,
    policies and clocks. Settings of scheduling and of the adapter store are ignored, as is `num_pages` if the leader
    sets it.
    """

    def __init__(
        self, model: ModelConfig, graphdef: nnx.GraphDef, params: Params, config: EngineConfig, processes: ProcessGroup
    ) -> None:
        """Compiles every step program and allocates this process's part of the pool, in parallel with the leader.

        Raises:
          ConfigError: the settings do not fit the model, or differ from the leader's.
        """
        config = config.with_dtype()
        keep_compiled_programs(config.compilation_cache_dir)
        self._group = processes
        spec, params = place(model, graphdef, params, config, processes)
        try:
            self._device = Device(spec, params, config)
        except BaseException as error:
            processes.fail(error)
            raise
        processes.tell("ready", {})
        self._staged: np.ndarray | None = None  # pages being received, [num_layers, n, 2, page_size, W]
        self._missing = 0  # elements of `_staged` not received yet
        self._previous: jax.Array | None = None  # tokens of the previous step
        self._copies: deque[Copy] = deque()

    @classmethod
    def from_pretrained(cls, model_dir: str | Path, config: EngineConfig, processes: ProcessGroup) -> Follower:
        """Loads this process's part of a Hugging Face directory. Raises the errors of `Engine.from_pretrained`."""
        config = config.with_dtype()
        model, graphdef, params = load(model_dir, config)
        return cls(model, graphdef, params, config, processes)

    def run(self) -> None:
        """Repeats the leader's calls until its engine is closed.

        Raises:
          ProcessLostError: a process was lost, or a call failed here. Then the leader receives the error and all
            processes end.
        """
        try:
            while (call := self._group.next(LEADER)).name != "stop":
                self._execute(call)
        except ProcessLostError:
            raise
        except BaseException as error:
            raise self._group.explained(error) from error

    def _execute(self, call: Call) -> None:
        device, arguments = self._device, call.arguments
        match call.name, call.arrays:
            case "step", (metadata, *rows):
                step, _ = device.step(
                    tuple(arguments["key"]),
                    metadata,
                    list(zip(rows[::2], rows[1::2], strict=True)),
                    arguments["after"],
                )
                if self._previous is not None:
                    self._previous.block_until_ready()  # raises the previous step's error
                self._previous = step.token
            case "sample", edits:
                self._previous = device.sample(arguments["after"], edits).token
            case "part", (part,):
                self._take_part(part, **arguments)
            case "move", (pages,):
                device.move(self._copies.popleft(), pages)
            case "discard", ():
                device.discard(self._copies.popleft())
            case "describe", (pages, ranks):
                device.describe(arguments["slot"], pages, ranks)
            case "upload", (pages, ranks, contents):
                device.upload(arguments["slot"], pages, ranks, contents)
            case name, arrays:
                raise FrameError(f"unknown call {name!r} with {len(arrays)} arrays")

    def _take_part(self, part: np.ndarray, layer: int, first: int, pages: int) -> None:
        """Stores one part of an upload, and starts its copy to the device with the last part.

        Args:
          part: `[n, 2, page_size, W]`, pages `first .. first + n` of the upload in one layer.
          pages: number of pages of the upload.
        """
        if self._staged is None:
            self._staged = np.empty((self._device.spec.pool.num_layers, pages, *part.shape[1:]), part.dtype)
            self._missing = self._staged.size
        self._staged[layer, first : first + part.shape[0]] = part
        self._missing -= part.size
        if self._missing == 0:
            self._copies.append(self._device.begin_copy(self._staged))
            self._staged = None
