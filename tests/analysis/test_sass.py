"""Counts of executed instructions, from machine code."""

import pytest

from slora_jax.analysis import sass

NESTED = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0020*/              @!P0 LDG.E.128 R4, desc[UR6][R12.64] ;
.L_x_0:
        /*0030*/                   HMMA.16816.F32.BF16 R56, R48, R82, RZ ;
        /*0040*/               @P1 BRA `(.L_x_0) ;
        /*0050*/               @P2 EXIT ;
        /*0060*/                   BRA.U UP0, `(.L_x_1) ;
        /*0070*/                   EXIT ;
.L_x_2:
        /*0080*/                   BRA `(.L_x_2);
        /*0090*/                   NOP;
"""


@pytest.fixture
def ptx(monkeypatch) -> str:
    sass._blocks.cache_clear()
    monkeypatch.setattr(sass, "disassemble", lambda ptx: NESTED)
    yield "nested loops"
    sass._blocks.cache_clear()


def test_instructions_count_as_often_as_their_loops_run(ptx) -> None:
    outer, inner = sass.loops(ptx)
    assert inner.blocks < outer.blocks
    counts = sass.executed(ptx, [3, 5])
    assert (counts["MOV"], counts["LDG.E.128"], counts["HMMA.16816.F32.BF16"], counts["BRA"]) == (1, 3, 15, 15)
    assert (counts["BRA.U"], counts["EXIT"]) == (3, 3 + 1)
    assert counts["NOP"] == 0  # the padding after the last instruction is never reached


def test_another_number_of_loops_is_refused(ptx) -> None:
    with pytest.raises(ValueError, match=r"iterations=\(3,\): the kernel has 2 loops; give one number for each"):
        sass.executed(ptx, [3])
