"""The leader's device: sends every call to the followers, then executes it locally."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from typing import NamedTuple

import jax
import numpy as np

from slora_jax.distributed.channel import encode
from slora_jax.distributed.group import ProcessGroup
from slora_jax.engine.config import EngineConfig
from slora_jax.engine.device import Copy, Device, TableRows
from slora_jax.engine.programs import StepKey
from slora_jax.engine.sampling import Sampled
from slora_jax.engine.step import StepOutput
from slora_jax.engine.step_spec import StepSpec
from slora_jax.errors import ProcessLostError
from slora_jax.memory.pool import pieces
from slora_jax.models import Params


class BroadcastDevice(Device):
    """The `Device` of process 0, which alone has the scheduler, the store and the clock.

    Followers receive its calls in order, with the adapter columns that their devices hold. Adapter contents are sent by
    background threads, one layer of a few pages at a time, so that steps do not wait for them. A copy has landed when
    it is on the local device and sent to all followers.

    If a call fails here after a follower received it, or a process is lost, all processes end: this call and every
    later one raise `ProcessLostError`.
    """

    def __init__(self, spec: StepSpec, params: Params, config: EngineConfig, group: ProcessGroup) -> None:
        assert spec.parallel is not None
        self._group = group
        self._columns_of = {peer: spec.parallel.columns(spec.pool.width, peer) for peer in group.peers}
        self._feeds = [_Feed(group, peer, columns) for peer, columns in self._columns_of.items()]
        super().__init__(spec, params, config)
        for peer in group.peers:
            group.next(peer)  # wait until it has compiled: the first collective could time out otherwise

    def step(
        self, key: StepKey, metadata: np.ndarray, rows: Sequence[TableRows], after: Sequence[str] | None
    ) -> tuple[Sampled, StepOutput]:
        arrays = [metadata, *(array for row in rows for array in row)]
        self._group.tell("step", {"key": key, "after": after}, arrays)
        with self._explained():
            return super().step(key, metadata, rows, after)

    def sample(self, after: Sequence[str], edits: Sequence[np.ndarray]) -> Sampled:
        self._group.tell("sample", {"after": after}, edits)
        with self._explained():
            return super().sample(after, edits)

    def read(self, array: jax.Array) -> np.ndarray:
        self._group.check()
        with self._explained():
            return super().read(array)

    def upload(self, slot: int, pages: np.ndarray, ranks: np.ndarray, contents: np.ndarray) -> None:
        for peer, columns in self._columns_of.items():
            self._group.tell("upload", {"slot": slot}, (pages, ranks, contents[..., columns]), to=peer)
        with self._explained():
            super().upload(slot, pages, ranks, contents[..., self._columns])

    def begin_copy(self, contents: np.ndarray) -> Copy:
        self._group.check()
        local = super().begin_copy(contents[..., self._columns])
        return _BroadcastCopy(local.arrays, self._group, [feed.put(contents) for feed in self._feeds])

    def move(self, copy: Copy, pages: np.ndarray) -> None:
        self._group.tell("move", {}, (pages,))
        with self._explained():
            super().move(copy, pages)

    def discard(self, copy: Copy) -> None:
        assert isinstance(copy, _BroadcastCopy)
        copy.wait_until_sent()
        self._group.tell("discard", {})

    def describe(self, slot: int, pages: np.ndarray, ranks: np.ndarray) -> None:
        self._group.tell("describe", {"slot": slot}, (pages, ranks))
        with self._explained():
            super().describe(slot, pages, ranks)

    @property
    def is_lost(self) -> bool:
        return self._group.lost is not None

    def close(self) -> None:
        """Makes the followers return from `Follower.run`."""
        for feed in self._feeds:
            feed.close()
        self._group.leave()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Wraps errors from the local half of a broadcast call."""
        try:
            yield
        except BaseException as error:
            raise self._group.explained(error) from error


class _BroadcastCopy(Copy):
    """A copy on all processes. `sent` has an event per follower, set when the contents are sent; the follower receives
    them before any later call."""

    def __init__(self, arrays: list[jax.Array], group: ProcessGroup, sent: list[threading.Event]) -> None:
        super().__init__(arrays)
        self._group, self._sent = group, sent

    def is_there(self) -> bool:
        return all(event.is_set() for event in self._sent) and super().is_there()

    def wait(self) -> None:
        self.wait_until_sent()
        super().wait()

    def wait_until_sent(self) -> None:
        """Raises `ProcessLostError` if a process is lost before all contents are sent."""
        while not all(event.is_set() for event in self._sent):
            self._group.check()
            time.sleep(0.0005)


class _Sending(NamedTuple):
    contents: np.ndarray
    sent: threading.Event


class _Feed:
    """Sends the contents of copies to one follower from a background thread."""

    def __init__(self, group: ProcessGroup, process: int, columns: slice) -> None:
        self._group, self._process, self._columns = group, process, columns
        self._queue: SimpleQueue[_Sending | None] = SimpleQueue()
        threading.Thread(target=self._run, name=f"feed process {process}", daemon=True).start()

    def put(self, contents: np.ndarray) -> threading.Event:
        """Queues `contents [num_layers, n, 2, page_size, W]`, which must not change afterwards. The returned event is
        set when they are sent."""
        sending = _Sending(contents, threading.Event())
        self._queue.put(sending)
        return sending.sent

    def close(self) -> None:
        self._queue.put(None)

    def _run(self) -> None:
        try:
            while (sending := self._queue.get()) is not None:
                contents = sending.contents
                for piece in pieces(0, contents.shape[1]):
                    for layer in range(contents.shape[0]):
                        about = {"layer": layer, "first": piece.start, "pages": contents.shape[1]}
                        part = contents[layer, piece][..., self._columns]
                        self._group.send(self._process, encode("part", about, (part,)))
                sending.sent.set()
        except ProcessLostError:  # the main thread raises it too
            pass
