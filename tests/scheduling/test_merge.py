"""One adapter at a time, compared with its rule written out."""

from hypothesis import given
from hypothesis import strategies as st
from make_request import make_request

from slora_jax.scheduling import Batch, FinishReason, OneAdapter, RequestQueue

names = st.sampled_from([None, "a", "b", "c"])


def brute_force(queue, current, most) -> list[int]:
    """Returns the indices of requests that may join a batch of adapter `current`."""
    same = [i for i, name in enumerate(queue) if name == current]
    return same if same and same[0] <= most else []


@given(st.lists(names, max_size=12), names, st.booleans(), st.integers(0, 5))
def test_one_adapter_admits_by_its_rule(queue, current, runs, most) -> None:
    running = [make_request(0, adapter=current)] if runs else []
    waiting = [make_request(1 + i, adapter=name) for i, name in enumerate(queue)]
    if not runs and queue:
        current = queue[0]
    chosen = OneAdapter(most).select(RequestQueue(waiting), Batch(running, {}), 0.0)
    assert [r.number - 1 for r in chosen] == brute_force(queue, current, most)


@given(
    st.lists(st.tuples(names, st.integers(1, 12), st.integers(1, 9)), min_size=1, max_size=25),
    st.integers(1, 6),
    st.integers(0, 5),
    st.integers(0, 15),
)
def test_a_batch_has_one_adapter_and_all_finish(simulate, requests, max_num_seqs, most, spare) -> None:
    pages = max(-(-(prompt + new - 1) // 4) for _, prompt, new in requests) + 1 + spare
    sim = simulate(pages, max_num_seqs, max_num_batched_tokens=32, policy=OneAdapter(most))
    for name, prompt, new in requests:
        sim.add(prompt, new, name, adapter_pages=1)
    for _ in range(2000):
        if not sim.scheduler.has_work():
            break
        sim.step()
        assert len({r.digest for r in sim.scheduler.running}) <= 1
    sim.step()
    sim.assert_idle()
    assert all(r.finish_reason is FinishReason.LENGTH for r in sim.requests)


def test_batch_drains_after_too_many_requests_were_overtaken(simulate) -> None:
    sim = simulate(100, max_num_seqs=8, max_num_batched_tokens=32, policy=OneAdapter(max_overtaken=1))
    first = sim.add(1, 20, "a", 1)
    others = [sim.add(1, 2, "b", 1) for _ in range(2)]
    sim.step()
    late = sim.add(1, 2, "a", 1)
    while first.finish_reason is None:
        sim.step()
        assert late.metrics.admitted is None and all(r.metrics.admitted is None for r in others)
    sim.run(100)
    assert others[0].metrics.admitted < late.metrics.admitted
