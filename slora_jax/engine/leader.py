"""The worker of process 0 of several: every call is sent to the others, then made here."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue

import jax
import numpy as np

from slora_jax.engine.config import EngineConfig
from slora_jax.engine.programs import StepKey
from slora_jax.engine.sampling import Sampled
from slora_jax.engine.step import StepSpec
from slora_jax.engine.worker import TableRows, Worker
from slora_jax.errors import ProcessLostError
from slora_jax.memory.pool import pieces
from slora_jax.models import Params
from slora_jax.parallel.channel import encode
from slora_jax.parallel.processes import ProcessGroup


class Leader(Worker):
    """Scheduler, store and clock are here alone; the followers hear of calls in the order in which they are made here,
    with the columns of adapters that their devices hold.

    Staged pages go beside the calls, a layer of a piece at a time, so that no step waits behind them; they count as
    arrived when they are here and with the network. A call that fails here after others were told of it ends them all,
    as does the loss of a process: `ProcessLostError`, from every later call too.
    """

    def __init__(self, spec: StepSpec, params: Params, config: EngineConfig, group: ProcessGroup) -> None:
        assert spec.parallel is not None
        self._group = group
        self._columns_of = {peer: spec.parallel.columns(spec.pool.width, peer) for peer in group.peers}
        self._feeds = [_Feed(group, peer, columns) for peer, columns in self._columns_of.items()]
        self._taken = 0  # staged copies that were moved or discarded
        super().__init__(spec, params, config)
        for peer in group.peers:
            group.next(peer)  # has compiled all, too: a collective waits only so long for the others

    def step(
        self, key: StepKey, metadata: np.ndarray, rows: Sequence[TableRows], logprobs: bool | None
    ) -> tuple[Sampled, jax.Array]:
        arrays = [metadata, *(array for row in rows for array in row)]
        self._group.tell("step", {"key": key, "logprobs": logprobs}, arrays)
        with self._explained():
            return super().step(key, metadata, rows, logprobs)

    def read(self, array: jax.Array) -> np.ndarray:
        self._group.check()
        with self._explained():
            return super().read(array)

    def upload(self, slot: int, pages: np.ndarray, ranks: np.ndarray, contents: np.ndarray) -> None:
        for peer, columns in self._columns_of.items():
            self._group.tell("upload", {"slot": slot}, (pages, ranks, contents[..., columns]), to=peer)
        with self._explained():
            super().upload(slot, pages, ranks, contents[..., self._columns])

    def stage(self, contents: np.ndarray) -> None:
        self._group.check()
        super().stage(contents[..., self._columns])
        for feed in self._feeds:
            feed.put(contents)

    def has_arrived(self) -> bool:
        return self._is_sent() and super().has_arrived()

    def wait(self) -> None:
        self._wait_until_sent()
        super().wait()

    def move(self, pages: np.ndarray) -> None:
        self._group.tell("move", {}, (pages,))
        self._taken += 1
        with self._explained():
            super().move(pages)

    def discard(self) -> None:
        self._wait_until_sent()
        self._group.tell("discard", {})
        self._taken += 1
        super().discard()

    def describe(self, slot: int, pages: np.ndarray, ranks: np.ndarray) -> None:
        self._group.tell("describe", {"slot": slot}, (pages, ranks))
        with self._explained():
            super().describe(slot, pages, ranks)

    @property
    def is_lost(self) -> bool:
        return self._group.lost is not None

    def close(self) -> None:
        """The followers return from `Follower.run`."""
        for feed in self._feeds:
            feed.close()
        self._group.leave()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Of this process's part of a call that the others were told of."""
        try:
            yield
        except BaseException as error:
            raise self._group.explained(error) from error

    def _is_sent(self) -> bool:
        """Whether the oldest staged copy is on its way to every follower, so that they have it before what is told
        next."""
        return all(feed.sent > self._taken for feed in self._feeds)

    def _wait_until_sent(self) -> None:
        while not self._is_sent():
            self._group.check()
            time.sleep(0.0005)


class _Feed:
    """Sends staged pages to one follower, on a thread of its own. sent: copies that are with the network."""

    def __init__(self, group: ProcessGroup, process: int, columns: slice) -> None:
        self.sent = 0
        self._group, self._process, self._columns = group, process, columns
        self._queue: SimpleQueue[np.ndarray | None] = SimpleQueue()
        threading.Thread(target=self._run, name=f"feed process {process}", daemon=True).start()

    def put(self, contents: np.ndarray) -> None:
        """Sends `contents [num_layers, n, 2, page_size, W]`, which nobody changes any more."""
        self._queue.put(contents)

    @property
    def is_lost(self) -> bool:
        return self._group.lost is not None

    def close(self) -> None:
        self._queue.put(None)

    def _run(self) -> None:
        try:
            while (contents := self._queue.get()) is not None:
                for piece in pieces(0, contents.shape[1]):
                    for layer in range(contents.shape[0]):
                        about = {"layer": layer, "first": piece.start, "pages": contents.shape[1]}
                        part = contents[layer, piece][..., self._columns]
                        self._group.send(self._process, encode("part", about, (part,)))
                self.sent += 1
        except ProcessLostError:  # which the main thread finds too
            pass
