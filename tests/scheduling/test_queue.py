"""The waiting queue compared with a sorted list."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from make_request import make_request

from slora_jax.scheduling import RequestQueue


@given(
    st.lists(st.tuples(st.sampled_from(["arrive", "leave", "return"]), st.integers(0, 50)), max_size=60),
    st.lists(st.tuples(st.sampled_from("xyz"), st.sampled_from([None, "a", "b"])), min_size=60, max_size=60),
)
def test_queue_stays_sorted_by_arrival(events, kinds) -> None:
    queue, model, gone = RequestQueue(), [], []
    arrived = 0
    for event, pick in events:
        if event == "arrive":
            tenant, adapter = kinds[arrived]
            request = make_request(arrived, adapter=adapter, tenant=tenant)
            arrived += 1
            model.append(request)
            queue.add(request)
        elif event == "leave" and model:
            gone.append(model.pop(pick % len(model)))
            queue.remove(gone[-1])
        elif event == "return" and gone:
            request = gone.pop(pick % len(gone))
            model = sorted([*model, request], key=lambda r: r.number)
            queue.add(request)
        assert list(queue) == model and list(reversed(queue)) == model[::-1] and len(queue) == len(model)
        for index in range(-len(model), len(model)):
            assert queue[index] is model[index]
        assert queue[1:] == model[1:] and all(r in queue for r in model) and not any(r in queue for r in gone)
        for groups, key in ((queue.by_tenant, "tenant"), (queue.by_adapter, "digest")):
            assert set(groups) == {getattr(r, key) for r in model}
            for name, group in groups.items():
                assert list(group) == [r for r in model if getattr(r, key) == name]


def test_removing_a_missing_request_is_an_error() -> None:
    queue = RequestQueue([make_request(0)])
    with pytest.raises(KeyError, match="7"):
        queue.remove(make_request(7))
    with pytest.raises(IndexError, match="request 1 of 1"):
        queue[1]
