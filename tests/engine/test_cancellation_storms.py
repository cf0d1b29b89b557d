"""Hundreds of requests that are cancelled at any moment, while adapters come from disk, go, and Ctrl-C is pressed."""

import itertools
import signal
from collections import Counter
from functools import partial

import numpy as np
import pytest

from experiments.slow_disk import slow_disk
from slora_jax import AdapterError, SamplingParams
from slora_jax.adapters.spill import SpillFiles
from slora_jax.memory import PageKind

REQUESTS = 600
PROMPTS = [[7], list(range(40, 47)), list(range(50, 58)), list(range(60, 80)), list(range(30, 60))]
INTERRUPTED = [
    ("scheduler", "schedule"),
    ("scheduler", "add"),
    ("scheduler", "finish"),
    ("store", "acquire"),
    ("store", "release"),
    ("store", "request"),
    ("store", "remove"),
    ("executor", "upload"),
    ("executor", "dispatch"),
]


class Storm:
    """Calls the engine at random and keeps its own books of what must come of it."""

    def __init__(self, six, rng: np.random.Generator, patch: pytest.MonkeyPatch) -> None:
        self.six, self.engine, self.rng = six, six.engine, rng
        self.unloaded: list[str] = []
        self.requests: dict[str, tuple[str | None, int, int]] = {}  # id -> adapter, prompt, max_tokens
        self.cancelled: set[str] = set()  # `cancel` was called while they were unfinished
        self.outputs: dict = {}
        self.moments: Counter[str] = Counter()
        self.interrupts = 0
        self._fuse: int | None = None  # calls within the engine until Ctrl-C
        for owner, name in INTERRUPTED:
            patch.setattr(
                getattr(self.engine, owner), name, partial(self._burn, getattr(getattr(six.engine, owner), name))
            )

    def _burn(self, method, *args):
        if self._fuse is not None:
            self._fuse -= 1
            if self._fuse < 0:
                self._fuse = None
                signal.raise_signal(signal.SIGINT)
        return method(*args)

    def call(self, method, *args, **kwargs):
        """A call, one in eight with a Ctrl-C in the middle, after which it is done nevertheless."""
        self._fuse = int(self.rng.integers(4)) if self.rng.random() < 0.12 else None
        try:
            return method(*args, **kwargs)
        except KeyboardInterrupt:
            self.interrupts += 1
        finally:
            self._fuse = None

    def arrive(self) -> None:
        rng, request = self.rng, str(len(self.requests))
        names = [None, *(name for name in self.six.names if name not in self.unloaded)]
        name, prompt, count = (
            names[rng.integers(len(names))],
            int(rng.integers(len(PROMPTS))),
            int(rng.choice([1, 3, 12])),
        )
        params = SamplingParams(max_tokens=count, ignore_eos=True)
        self.requests[request] = name, prompt, count
        self.call(self.engine.add_request, PROMPTS[prompt], params, name, request_id=request)

    def cancel(self) -> None:
        """One of the newest, of those that run, or of all; now and then one that has ended."""
        running = [request.id for request in self.engine.scheduler.running]
        unfinished = [r for r in self.requests if r not in self.outputs and r not in self.cancelled]
        if self.outputs and self.rng.random() < 0.05:
            assert not self.engine.cancel(str(self.rng.choice(list(self.outputs))))
        elif unfinished:
            request = str(self.rng.choice([unfinished[-2:], running or unfinished, unfinished][self.rng.integers(3)]))
            self.moments[self.moment(request)] += 1
            if self.call(self.engine.cancel, request) is not False:
                self.cancelled.add(request)

    def moment(self, request: str) -> str:
        r = self.engine.core.requests.get(request)
        if r is None:
            return "ended, its output not returned yet"
        if r.status == "waiting":
            spilled = self.engine.store.tiers().get(r.digest) == "disk"
            return "waiting for the disk" if spilled else "waiting"
        if r.num_computed < len(r.prompt):
            return "in prefill"
        return "its last token in flight" if r.all_sampled else "decoding"

    def reload(self) -> None:
        if self.unloaded and self.rng.random() < 0.5:
            name = self.unloaded.pop(0)
            self.call(self.engine.load_adapter, name, self.six.weights(name))
        elif len(self.unloaded) < 4:
            name = str(self.rng.choice([n for n in self.six.names if n not in self.unloaded]))
            self.unloaded.append(name)
            self.call(self.engine.unload_adapter, name)

    def step(self) -> None:
        for delta in self.call(self.engine.step) or ():
            if delta.output is not None:
                assert delta.request_id not in self.outputs, "reported twice"
                self.outputs[delta.request_id] = delta.output
        self.engine.check()

    def run(self) -> None:
        rng = self.rng
        while len(self.requests) < REQUESTS:
            for _ in range(rng.poisson(1.2)):
                self.arrive()
            for _ in range(rng.poisson(0.5)):
                self.cancel()
            if rng.random() < 0.05:
                self.reload()
            if rng.random() < 0.05:
                engine = self.engine
                engine.residency.evictor.make_room(engine.allocator.capacity, PageKind.KV)  # idle ones are read again
            self.step()
        while self.engine.has_work():
            self.step()


def test_storm_of_cancellations_leaves_the_survivors_tokens_and_no_page(six, rng, monkeypatch) -> None:
    six.load(six.names)
    names = [*six.names, None]
    every = [(name, prompt) for name in names for prompt in range(len(PROMPTS))]
    outputs = six.engine.generate([PROMPTS[p] for _, p in every], six.params, [name for name, _ in every])
    expected = {key: output.token_ids for key, output in zip(every, outputs, strict=True)}
    six.engine.residency.evictor.make_room(six.engine.allocator.capacity, PageKind.KV)
    before = six.engine.stats().tokens_generated
    reads = six.engine.store.stats().spill_reads

    with slow_disk(0.002), monkeypatch.context() as patch:
        storm = Storm(six, rng, patch)
        storm.run()

    reads = six.engine.store.stats().spill_reads - reads
    print(storm.interrupts, "interrupts;", reads, "reads; cancelled:", storm.moments)
    assert storm.interrupts > 50 and reads > 50
    moments = {"waiting", "waiting for the disk", "in prefill", "decoding", "its last token in flight"}
    assert all(storm.moments[moment] for moment in moments)
    assert storm.outputs.keys() == storm.requests.keys()
    for request, output in storm.outputs.items():
        name, prompt, count = storm.requests[request]
        assert output.finish_reason == ("cancelled" if request in storm.cancelled else "length"), request
        assert output.token_ids == expected[name, prompt][: len(output.token_ids)], request
        assert len(output.token_ids) == count or request in storm.cancelled
    assert 100 < len(storm.cancelled) < 400
    assert six.engine.stats().tokens_generated - before == sum(len(o.token_ids) for o in storm.outputs.values())


@pytest.mark.parametrize("call", [0, 1, 5])
def test_ctrl_c_while_adapters_come_from_disk(six, monkeypatch, call) -> None:
    six.load(six.names)
    calls, request = itertools.count(), six.engine.store.request

    def interrupt(digest):
        if next(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return request(digest)

    with slow_disk(0.002), monkeypatch.context() as patch:
        patch.setattr(six.engine.store, "request", interrupt)
        with pytest.raises(KeyboardInterrupt):
            six.engine.generate([six.prompt] * 6, six.params, list(six.names))
    assert not six.engine.has_work()
    six.engine.check()
    six.assert_right(six.serve([*six.names, None]), six.expected)


@pytest.mark.parametrize("held", [True, False])
def test_ctrl_c_while_an_adapter_is_spilled_for_another(six, monkeypatch, held) -> None:
    """It waits until the adapter is loaded; a second one, which does not, ends the load, which then changes nothing."""
    six.load("ab")
    write = SpillFiles.write

    def interrupt(files, tiles):
        if not held:
            raise KeyboardInterrupt
        signal.raise_signal(signal.SIGINT)
        return write(files, tiles)

    with monkeypatch.context() as patch:
        patch.setattr(SpillFiles, "write", interrupt)
        with pytest.raises(KeyboardInterrupt):
            six.load("c")
    loaded = "abc" if held else "ab"
    assert [info.name for info in six.engine.adapters()] == list(loaded)
    six.load("d")
    assert six.engine.store.stats().resident_bytes == six.nbytes
    six.assert_right(six.serve(loaded + "d"), loaded + "d")


def test_cancelling_the_last_request_of_an_unloaded_adapter_during_its_read(six, caplog) -> None:
    """Its content goes at once; the read that is under way ends unnoticed."""
    six.load(six.names)
    with slow_disk(0.05):
        request = six.engine.add_request(six.prompt, six.params, "b")
        six.engine.step()  # asks for the read
        assert not six.engine.unload_adapter("b"), "its request waits"
        six.engine.cancel(request)
        assert [delta.finish_reason for delta in six.engine.step()] == ["cancelled"]
        with pytest.raises(AdapterError, match="no adapter with digest"):
            six.engine.store.request(six.digest("b"))
        six.assert_right(six.serve("ac"), "ac")
    assert caplog.messages == []
