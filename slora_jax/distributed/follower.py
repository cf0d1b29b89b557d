"""The processes beside process 0: each makes the leader's calls on its own devices."""

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
    """One process's part of a model that several processes serve (`join_processes`): made as the leader's `Engine` is,
    from the same model and settings. Requests, adapters, policies and clocks are the leader's.

    Settings that only scheduling or the store read are ignored, and so is `num_pages` where the leader gives a number.
    """

    def __init__(
        self, model: ModelConfig, graphdef: nnx.GraphDef, params: Params, config: EngineConfig, processes: ProcessGroup
    ) -> None:
        """Compiles every step program and allocates this process's part of the pool, as the leader does meanwhile.

        Raises:
          ConfigError: settings and model do not fit together, or differ from the leader's.
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
        self._filling: np.ndarray | None = None  # staged pages of which parts are missing
        self._missing = 0  # of its elements
        self._before: jax.Array | None = None
        self._copies: deque[Copy] = deque()

    @classmethod
    def from_pretrained(cls, model_dir: str | Path, config: EngineConfig, processes: ProcessGroup) -> Follower:
        """Loads its devices' part of a Hugging Face directory. Raises as `Engine.from_pretrained`."""
        config = config.with_dtype()
        model, graphdef, params = load(model_dir, config)
        return cls(model, graphdef, params, config, processes)

    def run(self) -> None:
        """Makes the leader's calls until its engine is closed.

        Raises:
          ProcessLostError: the leader left before that; or a call failed here, of which the leader is told, and all
            processes end.
        """
        try:
            while (call := self._group.next(LEADER)).name != "stop":
                self._make(call)
        except ProcessLostError:
            raise
        except BaseException as error:
            raise self._group.explained(error) from error

    def _make(self, call: Call) -> None:
        device, arguments = self._device, call.arguments
        match call.name, call.arrays:
            case "step", (metadata, *rows):
                step, _ = device.step(
                    tuple(arguments["key"]),
                    metadata,
                    list(zip(rows[::2], rows[1::2], strict=True)),
                    arguments["logprobs"],
                )
                if self._before is not None:
                    self._before.block_until_ready()  # raises the error of the step before
                self._before = step.token
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
        """Takes `part [n, 2, page_size, W]` of a layer of staged pages; the last one begins their copy."""
        if self._filling is None:
            self._filling = np.empty((self._device.spec.pool.num_layers, pages, *part.shape[1:]), part.dtype)
            self._missing = self._filling.size
        self._filling[layer, first : first + part.shape[0]] = part
        self._missing -= part.size
        if self._missing == 0:
            self._copies.append(self._device.begin_copy(self._filling))
            self._filling = None
