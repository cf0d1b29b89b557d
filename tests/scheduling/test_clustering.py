"""Adapter clustering compared with its rule written out."""

from hypothesis import given
from hypothesis import strategies as st
from make_request import make_request

from slora_jax.scheduling import Batch, Clustering, FinishReason, RequestQueue, Status

names = st.sampled_from([None, "a", "b", "c", "d", "e"])


def admitted(policy: Clustering, waiting, running) -> list[int]:
    """Returns the numbers of all requests in the order of admission, if all fit."""
    adapters = {r.digest: 1 for r in running if r.digest}
    order = []
    for request in policy.select(RequestQueue(waiting), Batch(running, adapters), 0.0):
        if request.status is Status.WAITING:
            request.status = Status.RUNNING
            order.append(request.number)
            if request.digest:
                adapters[request.digest] = 1
    return order


def soft(most, waiting, adapters) -> list[int]:
    """The rule of the paper's code: once the batch has `most` adapters, their requests come first."""
    if len(adapters) < most:
        return [r.number for r in waiting]
    first = [r.number for r in waiting if r.digest is None or r.digest in adapters]
    return first + [r.number for r in waiting if r.number not in first]


def hard(most, waiting, adapters) -> list[int]:
    """Repeatedly admits the earliest request that may join."""
    order, waiting, adapters = [], list(waiting), set(adapters)
    while True:
        allowed = (r for r in waiting if r.digest is None or r.digest in adapters or len(adapters) < most)
        request = next(allowed, None)
        if request is None:
            return order
        order.append(request.number)
        waiting.remove(request)
        adapters |= {request.digest} - {None}


@given(st.lists(names, max_size=12), st.lists(names, max_size=6), st.integers(1, 5), st.booleans())
def test_clustering_admits_in_the_order_of_its_rule(queue, batch, most, is_hard) -> None:
    running = [make_request(i, adapter=name) for i, name in enumerate(batch)]
    waiting = [make_request(len(batch) + i, adapter=name) for i, name in enumerate(queue)]
    expected = (hard if is_hard else soft)(most, waiting, {name for name in batch if name})
    assert admitted(Clustering(most, hard=is_hard), waiting, running) == expected


@given(
    st.lists(st.tuples(names, st.integers(1, 12), st.integers(1, 9)), min_size=1, max_size=25),
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(0, 15),
)
def test_hard_clustering_bounds_the_adapters_of_a_batch_and_all_finish(
    simulate, requests, most, max_num_seqs, spare
) -> None:
    """The bound holds for readmissions after a preemption too."""
    pages = max(-(-(prompt + new - 1) // 4) for _, prompt, new in requests) + 1 + spare
    sim = simulate(pages, max_num_seqs, max_num_batched_tokens=32, policy=Clustering(most, hard=True))
    for name, prompt, new in requests:
        sim.add(prompt, new, name, adapter_pages=1)
    for _ in range(2000):
        if not sim.scheduler.has_work():
            break
        sim.step()
        assert len({r.digest for r in sim.scheduler.running} - {None}) <= most
    sim.step()
    sim.assert_idle()
    assert all(r.finish_reason is FinishReason.LENGTH for r in sim.requests)


def test_soft_clustering_exceeds_its_number_before_it_leaves_a_slot_idle(simulate) -> None:
    running = {}
    for is_hard in (False, True):
        sim = simulate(num_pages=60, max_num_seqs=4, max_num_batched_tokens=32, policy=Clustering(1, hard=is_hard))
        sim.add(4, 20, "a")
        sim.step()
        for name in "bcab":
            sim.add(4, 20, name)
        sim.step()
        running[is_hard] = [r.digest for r in sim.scheduler.running]
    assert running == {False: ["a", "b", "c", "a"], True: ["a", "a"]}
