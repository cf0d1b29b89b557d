"""The table of large models over several GPUs: its entry for a program, and the consistency of the committed one."""

import json
from dataclasses import replace

import pytest

from experiments.paper.settings import MODELS
from experiments.tp_compile_table import CONFIG, DEGREES, OUT, SHAPES, Program, Row, _program, table
from slora_jax.analysis.collectives import Collective
from slora_jax.analysis.report import CompileReport, PoolReport, ProgramReport
from slora_jax.models import ModelConfig
from slora_jax.models.config import read_json

TP, LAYERS, ROWS, RANK = 4, 2, 256, 64


def model(name: str) -> ModelConfig:
    return ModelConfig.from_dict(read_json(MODELS / f"{name}.json"))


@pytest.fixture
def compiled() -> ProgramReport:
    """A step of the 30B model with the published collectives, written out."""
    hidden, itemsize = 7168, 2
    collectives = (
        Collective("all-reduce", 2 * LAYERS, ROWS * hidden * itemsize, "base"),
        Collective("all-reduce", 1, ROWS * hidden * itemsize, "embedding"),
        Collective("all-reduce", 2 * LAYERS, ROWS * RANK * itemsize, "lora"),
        Collective("all-gather", LAYERS, 3 * ROWS * RANK * itemsize, "lora"),
        Collective("all-gather", LAYERS, 2 * ROWS * RANK * itemsize, "lora"),
        Collective("all-gather", 1, TP * ROWS * 8, "greedy"),
    )
    return ProgramReport("decode_256_lora", ROWS, ROWS, True, 1.0, 0, 0, 0, 5, 5, 0, (), (), collectives)


def read(program: ProgramReport) -> Program:
    pool = PoolReport(9, 16, 1, 9, True, 128, 16, 1, 8, 1, 0.75, 0.9, 1, 1, 1)
    report = CompileReport("h200", TP, "bfloat16", 48, LAYERS, RANK, pool, (program,))
    return _program(program, model("llama-30b"), replace(CONFIG, tensor_parallel_size=TP), report)


def test_published_collectives_are_known_and_counted_by_layer(compiled) -> None:
    program = read(compiled)
    assert program.as_published
    assert [(kind, count) for kind, _, count in program.layer_collectives] == [
        ("base all-reduce", 2),
        ("lora all-reduce", 2),
        ("lora all-gather", 1),
        ("lora all-gather", 1),
    ]
    per_row = 2 * (2 * 2 * (TP - 1) * 7168 + 9 * (TP - 1) * RANK) // TP  # the formulas of `parallel.cost`, 2 bytes
    assert program.sent_bytes == ROWS * per_row


@pytest.mark.parametrize("change", [{"bytes": 17}, {"count": 3}, {"kind": "all-to-all"}])
def test_any_other_collective_is_reported(compiled, change) -> None:
    others = (replace(compiled.collectives[3], **change), *compiled.collectives[:3], *compiled.collectives[4:])
    assert not read(replace(compiled, collectives=others)).as_published
    assert not read(replace(compiled, collectives=compiled.collectives[:-1])).as_published
    assert read(replace(compiled, aliased_bytes=4)).pool_copies == 1


def test_the_committed_table_has_every_shape_sound_and_with_room() -> None:
    content = json.loads(OUT.read_text())
    rows = [
        Row(**{**row, "programs": tuple(Program(**program) for program in row["programs"])}) for row in content["rows"]
    ]
    assert [(row.model, row.tensor_parallel_size) for row in rows] == [(name, tp) for name in SHAPES for tp in DEGREES]
    for row in rows:
        shape = model(row.model)
        assert row.is_sound and row.layers == shape.num_layers
        attention = shape.hidden_size * (2 * shape.q_width + 2 * shape.kv_width)
        params = shape.num_layers * (attention + 3 * shape.hidden_size * shape.intermediate_size)
        params += 2 * shape.vocab_size * shape.hidden_size
        assert row.weight_bytes * row.tensor_parallel_size / 2 == pytest.approx(params, rel=1e-3)
        assert row.page_bytes * row.tensor_parallel_size == 2 * 16 * shape.kv_width * 2 * shape.num_layers
        left = 0.75 * 150_754_820_096 - row.weight_bytes - row.temp_bytes
        assert row.pages * row.page_bytes == pytest.approx(0.9 * left, rel=2e-3)
    assert len(table(rows).splitlines()) == 2 + len(rows)
