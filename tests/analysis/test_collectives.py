"""Collectives read from programs compiled for absent GPUs, with exact bytes."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.targets import TARGETS, compile_for, deviceless_mesh
from slora_jax.analysis import Collective, collectives_in
from slora_jax.analysis.hlo import array_bytes

WHOLE, ROWS = PartitionSpec(), PartitionSpec("tp")


def compiled(function, *shapes, devices=2, out=WHOLE):
    """`function` of row-sharded arguments, by shard_map over absent H200s."""
    mesh = deviceless_mesh(TARGETS["h200"], devices)
    placed = [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=NamedSharding(mesh, ROWS)) for s in shapes]
    mapped = jax.shard_map(function, mesh=mesh, in_specs=ROWS, out_specs=out, check_vma=False)
    return compile_for(TARGETS["h200"], jax.jit(mapped), *placed)


class CompiledText:
    def __init__(self, text: str) -> None:
        self.as_text = lambda: text


X = jax.ShapeDtypeStruct((64, 128), jnp.bfloat16)  # [32, 128] on each of two devices
Y = jax.ShapeDtypeStruct((64, 256), jnp.float32)


def test_a_sum_and_a_gather_are_read_with_their_bytes() -> None:
    program = compiled(lambda x, y: (jax.lax.psum(x, "tp"), jax.lax.all_gather(y, "tp")), X, Y)
    assert collectives_in(program) == [
        Collective("all-reduce", 1, 32 * 128 * 2),
        Collective("all-gather", 1, 64 * 256 * 4),
    ]


def test_a_scope_names_the_purpose_of_a_collective() -> None:
    def summed(x, y):
        with jax.named_scope("layer0/all_reduce_base"):
            x = jax.lax.psum(x, "tp")
        with jax.named_scope("all_gather_lora"):
            return x, jax.lax.all_gather(y, "tp")

    assert collectives_in(compiled(summed, X, Y)) == [
        Collective("all-reduce", 1, 32 * 128 * 2, "base"),
        Collective("all-gather", 1, 64 * 256 * 4, "lora"),
    ]


def test_a_scatters_bytes_are_those_of_its_input() -> None:
    program = compiled(lambda y: jax.lax.psum_scatter(y, "tp", tiled=True), Y, out=ROWS)
    assert collectives_in(program) == [Collective("reduce-scatter", 1, 32 * 256 * 4)]


def test_exchanges() -> None:
    def exchange(y):
        turned = jax.lax.ppermute(y, "tp", [(i, (i + 1) % 4) for i in range(4)])
        return jax.lax.all_to_all(turned, "tp", split_axis=1, concat_axis=0, tiled=True)

    program = compiled(exchange, Y, devices=4, out=PartitionSpec(None, "tp"))
    assert collectives_in(program) == [
        Collective("all-to-all", 1, 16 * 256 * 4),
        Collective("collective-permute", 1, 16 * 256 * 4),
    ]


def test_a_collective_in_a_loop_counts_once_per_iteration() -> None:
    def looped(x):
        return jax.lax.fori_loop(0, 7, lambda _, x: jax.lax.psum(x * 2, "tp"), x)

    assert collectives_in(compiled(looped, Y)) == [Collective("all-reduce", 7, 32 * 256 * 4)]


def test_bytes_of_a_sum_of_several_arrays_add_up() -> None:
    program = compiled(lambda x, y: jax.lax.psum((x, x * 2, y.astype(jnp.bfloat16)), "tp"), X, Y)
    assert sum(c.count * c.bytes for c in collectives_in(program)) == 2 * 32 * 128 * 2 + 32 * 256 * 2


def test_one_device_has_no_collectives() -> None:
    assert collectives_in(jax.jit(lambda x: x + 1).lower(X).compile()) == []


def test_asynchronous_forms() -> None:
    text = """HloModule m

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%wrapped (p: f32[8,4]) -> f32[4,4] {
  %p = f32[8,4]{1,0} parameter(0)
  ROOT %rs = f32[4,4]{1,0} reduce-scatter(%p), replica_groups={{0,1}}, dimensions={0}, to_apply=%add
}

ENTRY %main (x: f32[8,4], y: bf16[6]) -> f32[8,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %y = bf16[6]{0} parameter(1)
  %ar = ((f32[8,4]{1,0}, bf16[6]{0}), (f32[8,4]{1,0}, /*index=1*/bf16[6]{0})) all-reduce-start(%x, %y), to_apply=%add
  %ar.done = (f32[8,4]{1,0}, bf16[6]{0}) all-reduce-done(%ar)
  %sum = f32[8,4]{1,0} all-reduce-start(%x), to_apply=%add
  %sum.done = f32[8,4]{1,0} all-reduce-done(%sum)
  %ag = ((f32[8,4]{1,0}, bf16[6]{0}), (f32[16,4]{1,0}, bf16[12]{0})) all-gather-start(%x, %y), dimensions={0}
  %ag.done = (f32[16,4]{1,0}, bf16[12]{0}) all-gather-done(%ag)
  %cp = (bf16[6]{0}, bf16[6]{0}, u32[], u32[]) collective-permute-start(%y), source_target_pairs={{0,1}}
  %cp.done = bf16[6]{0} collective-permute-done(%cp)
  %rs.start = ((f32[8,4]{1,0}), f32[4,4]{1,0}) async-start(%x), calls=%wrapped
  %rs.done = f32[4,4]{1,0} async-done(%rs.start)
  ROOT %done = f32[8,4]{1,0} copy(%x)
}
"""
    assert collectives_in(CompiledText(text)) == [
        Collective("all-reduce", 1, 128 + 12),
        Collective("all-reduce", 1, 128),
        Collective("all-gather", 1, 256 + 24),
        Collective("reduce-scatter", 1, 128),
        Collective("collective-permute", 1, 12),
    ]


@pytest.mark.parametrize(
    ("type_", "expected"),
    [
        ("f32[]", 4),
        ("bf16[3,5]{1,0:T(8,128)S(1)}", 30),
        ("pred[7]", 7),
        ("s4[6]{0:E(4)}", 3),
        ("(f32[2], (u8[3], token[]))", 11),
        ("f32[0,4]", 0),
    ],
)
def test_bytes_of_a_type(type_, expected) -> None:
    assert array_bytes(type_) == expected
