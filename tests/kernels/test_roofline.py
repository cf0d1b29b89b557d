"""Rooflines against counts made element by element."""

import numpy as np
import pytest

from pallas_kernels.bench.models import decoder_layout
from pallas_kernels.experts.roofline import expert_work
from pallas_kernels.lora.roofline import backward_work, expand_work, layer_work, shrink_work
from pallas_kernels.paged_attention.roofline import attention_work
from pallas_kernels.pool_write.roofline import write_kv_work, write_pages_work
from pallas_kernels.roofline import Work

LAYOUT = decoder_layout(hidden_size=6, q_width=8, kv_width=4, intermediate_size=10, page_size=8)


def test_the_floor_is_the_larger_of_the_two():
    assert Work(bytes=100, flops=30).seconds(bandwidth=10, matmul_flops=10) == 10
    assert Work(bytes=100, flops=300).seconds(bandwidth=10, matmul_flops=10) == 30


def test_work_adds_up():
    works = [Work(1, 10), Work(2, 20)]
    assert sum(works, Work()) == works[0] + works[1] == Work(3, 30)
    assert Work(3, 30) * 4 == Work(12, 120)


def random_adapters(rng):
    """Ranks, some 0, and rows, some 0."""
    n = int(rng.integers(1, 6))
    ranks = rng.integers(0, 5, (n, 7)) * (rng.random((n, 7)) < 0.7)
    return ranks, rng.integers(0, 4, n)


@pytest.mark.parametrize("itemsize", [2, 4])
def test_lora_work_counts_every_touched_element_once(rng, itemsize):
    for _ in range(6):
        ranks, rows = random_adapters(rng)
        for stack in LAYOUT.stacks:
            a, b, x, h, y, shrink, expand = set(), set(), set(), set(), set(), 0, 0
            for adapter, count in enumerate(rows):
                for row in range(count):
                    for projection, (index, d_out) in enumerate(zip(stack.rank_index, stack.d_outs, strict=True)):
                        for j in range(ranks[adapter, index]):
                            a |= {(adapter, projection, j, k) for k in range(stack.d_in)}
                            b |= {(adapter, projection, j, k) for k in range(d_out)}
                            x |= {(adapter, row, k) for k in range(stack.d_in)}
                            y |= {(adapter, row, projection, k) for k in range(d_out)}
                            h.add((adapter, row, projection, j))
                            shrink += 2 * stack.d_in
                            expand += 2 * d_out
            hidden = 4 * len(h)
            assert shrink_work(ranks, rows, stack, itemsize) == Work(itemsize * (len(a) + len(x)) + hidden, shrink)
            assert expand_work(ranks, rows, stack, itemsize) == Work(itemsize * (len(b) + 2 * len(y)) + hidden, expand)


def test_a_layers_lora_work_is_the_sum_of_its_stacks(rng):
    ranks, rows = random_adapters(rng)
    parts = [op(ranks, rows, stack, 2) for stack in LAYOUT.stacks for op in (shrink_work, expand_work)]
    assert layer_work(ranks, rows, LAYOUT, 2) == sum(parts, Work())


def test_the_backward_pass_moves_the_forward_pass_and_the_gradients(rng):
    """Each part is a product of the forward pass, turned round, with other results; A has B's place in dx."""
    ranks, rows = random_adapters(rng)
    for stack in LAYOUT.stacks:
        shrink, expand = (op(ranks, rows, stack, 0) for op in (shrink_work, expand_work))  # their h alone
        used = ranks[:, stack.rank_index] * (rows > 0)[:, None]
        a, b, h = used.sum() * stack.d_in, (used * stack.d_outs).sum(), shrink.bytes // 4
        x = rows[ranks[:, stack.rank_index].any(1)].sum() * stack.d_in
        dy = (expand_work(ranks, rows, stack, 2).bytes - expand.bytes - 2 * b) // 4
        assert backward_work(ranks, rows, stack, 2) == {
            "gradient_b": Work(2 * (dy + b + h) + 4 * h + 8 * b, 2 * expand.flops),
            "gradient_a": Work(2 * (x + h) + 8 * a, shrink.flops),
            "dx": Work(2 * (a + 2 * x) + 4 * h, shrink.flops),
        }


def test_large_counts_do_not_overflow():
    layout = decoder_layout(4096, 4096, 1024, 14336, page_size=16)
    a, b = 3 * 4096 + 4096 + 2 * 4096 + 14336, 4096 + 2 * 1024 + 4096 + 2 * 14336 + 4096
    work = layer_work(np.full((256, 7), 128, np.int32), np.full(256, 10_000, np.int32), layout, 2)
    assert work.flops == 2 * 256 * 10_000 * 128 * (a + b) > 2**31
    weights = 2 * 256 * 128 * (a + b)
    x, y, h = 2 * (3 * 4096 + 14336), 2 * 2 * b, 2 * 4 * 7 * 128
    assert work.bytes == weights + 256 * 10_000 * (x + y + h)


@pytest.mark.parametrize("window", [None, 1, 3, 7, 100])
def test_attention_work_counts_the_keys_of_every_query(rng, window):
    heads, kv_heads, dim, itemsize = 6, 2, 8, 2
    for _ in range(10):
        seqs = int(rng.integers(1, 5))
        rows, context = rng.integers(0, 9, seqs), rng.integers(0, 12, seqs)
        keys, seen = set(), 0
        for seq in range(seqs):
            for position in range(context[seq], context[seq] + rows[seq]):
                visible = range(0 if window is None else max(0, position + 1 - window), position + 1)
                keys |= {(seq, key) for key in visible}
                seen += len(visible)
        work = attention_work(
            rows, context, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, itemsize=itemsize, window=window
        )
        q = rows.sum() * heads * dim
        assert work == Work(itemsize * (2 * len(keys) * kv_heads * dim + 2 * q), 4 * dim * heads * seen)


def test_a_step_without_rows_has_no_work():
    none = np.zeros(0, np.int32)
    assert attention_work(none, none, num_heads=2, num_kv_heads=1, head_dim=8, itemsize=2) == Work()
    assert layer_work(np.zeros((0, 7), np.int32), none, LAYOUT, 2) == Work()


def test_writes_read_and_write_every_byte():
    assert write_kv_work(tokens=5, width=12, itemsize=2) == Work(bytes=2 * (5 * 2 * 12 * 2))
    assert write_pages_work(pages=3, page_size=8, width=12, itemsize=4) == Work(bytes=2 * (3 * 2 * 8 * 12 * 4))


def test_expert_work_counts_the_weights_of_used_experts_once():
    chosen = [(0, 3), (3, 5), (3, 0)]  # of three tokens
    weights = {(e, i, j) for pair in chosen for e in pair for i in range(3) for j in range(6 * 4)}
    activations = {(side, token, i) for side in ("x", "y") for token in range(3) for i in range(6)}
    flops = sum(2 * 3 * 6 * 4 for pair in chosen for _ in pair)
    found = expert_work(3, 2, used=3, hidden=6, ffn=4, itemsize=2)
    assert found == Work(bytes=2 * (len(weights) + len(activations)), flops=flops)
