"""Every PEFT field is honoured, harmless or refused by name."""

import dataclasses
import json

import pytest

from slora_jax.adapters.config import HARMLESS, REFUSED, LoraConfig
from slora_jax.errors import AdapterError

PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


def test_every_field_of_the_installed_peft_is_decided():
    peft = pytest.importorskip("peft")
    honoured = {field.name for field in dataclasses.fields(LoraConfig)}
    decided = honoured | HARMLESS | REFUSED.keys() | {"peft_type", "bias", "init_lora_weights"}
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} <= decided
    assert not honoured & HARMLESS and not honoured & REFUSED.keys() and not HARMLESS & REFUSED.keys()


def test_what_peft_writes_by_default_is_accepted():
    peft = pytest.importorskip("peft")
    fields = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM").to_dict()
    config = LoraConfig.from_json(json.loads(json.dumps(fields, default=list)))
    assert config == LoraConfig(r=4, target_modules=("q_proj",))


def test_peft_defaults_are_ours():
    peft = pytest.importorskip("peft")
    ours, theirs = LoraConfig(), peft.LoraConfig()
    for field in dataclasses.fields(LoraConfig):
        assert getattr(ours, field.name) == getattr(theirs, field.name), field.name


@pytest.mark.parametrize("field", sorted(REFUSED))
def test_unsupported_field_is_refused_by_name(field):
    for unset in (None, False, []):
        LoraConfig.from_json(PLAIN | {field: unset})
    for value in (True, [1], {}, {"a": 1}, "x", 1):
        with pytest.raises(AdapterError, match=f"^{field}: .*must be unset"):
            LoraConfig.from_json(PLAIN | {field: value})


@pytest.mark.parametrize("field", sorted(HARMLESS))
def test_harmless_field_changes_nothing(field):
    assert LoraConfig.from_json(PLAIN | {field: {"any": "value"}}) == LoraConfig.from_json(PLAIN)


@pytest.mark.parametrize("value", ["all", "lora_only", True])
def test_bias_is_refused(value):
    with pytest.raises(AdapterError, match=r"^bias: only 'none'"):
        LoraConfig.from_json(PLAIN | {"bias": value})


@pytest.mark.parametrize("value", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "new", 1, ["eva"]])
def test_initialisation_that_changes_the_base_is_refused(value):
    with pytest.raises(AdapterError, match=r"^init_lora_weights: .*path_initial_model_for_weight_conversion"):
        LoraConfig.from_json(PLAIN | {"init_lora_weights": value})


@pytest.mark.parametrize("value", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_initialisation_that_leaves_the_base_alone_is_accepted(value):
    assert LoraConfig.from_json(PLAIN | {"init_lora_weights": value}) == LoraConfig.from_json(PLAIN)


def test_corda_adapter_converted_to_plain_lora_is_accepted():
    LoraConfig.from_json(PLAIN | {"init_lora_weights": True, "corda_config": {"corda_method": "ipm"}})


@pytest.mark.parametrize("value", [1, True, False, "x", [], {}])
def test_unknown_field_with_a_value_is_refused(value):
    LoraConfig.from_json(PLAIN | {"future_field": None})
    with pytest.raises(AdapterError, match=r"^future_field: unknown field"):
        LoraConfig.from_json(PLAIN | {"future_field": value})


@pytest.mark.parametrize("peft_type", [None, "LOHA", "lora", 3])
def test_other_peft_types_are_refused(peft_type):
    with pytest.raises(AdapterError, match="peft_type: expected 'LORA'"):
        LoraConfig.from_json(PLAIN | {"peft_type": peft_type})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("r", -1),
        ("r", 257),
        ("r", True),
        ("r", 4.0),
        ("r", "8"),
        ("r", None),
        ("lora_alpha", float("nan")),
        ("lora_alpha", float("inf")),
        ("lora_alpha", 10**400),
        ("lora_alpha", True),
        ("lora_alpha", "16"),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"q_proj": 300}),
        ("rank_pattern", ["q_proj"]),
        ("rank_pattern", {"q_proj(": 4}),
        ("alpha_pattern", {"q_proj": "4"}),
        ("alpha_pattern", {"*": 4}),
        ("use_rslora", "true"),
        ("use_rslora", 1),
        ("fan_in_fan_out", 1),
        ("target_modules", 3),
        ("target_modules", ["q_proj", 3]),
        ("target_modules", {"q_proj": 1}),
        ("target_modules", "q_proj("),
        ("exclude_modules", "["),
        ("exclude_modules", 1),
        ("layers_to_transform", "0"),
        ("layers_to_transform", [0, "1"]),
        ("layers_to_transform", True),
        ("layers_pattern", "layers"),
    ],
)
def test_value_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(AdapterError, match=rf"^{field}"):
        LoraConfig.from_json(PLAIN | {field: value})


@pytest.mark.parametrize("field", ["layers_to_transform", "layers_pattern"])
def test_layer_selection_with_a_regular_expression_is_refused_as_in_peft(field):
    peft = pytest.importorskip("peft")
    fields = {"target_modules": ".*q_proj", "layers_to_transform": [0] if field == "layers_to_transform" else None}
    fields |= {"layers_pattern": "layers"} if field == "layers_pattern" else {}
    with pytest.raises(ValueError, match=field):
        peft.LoraConfig(**fields)
    with pytest.raises(AdapterError, match=f"^{field}: cannot be combined"):
        LoraConfig.from_json(PLAIN | fields)


@pytest.mark.parametrize("data", [[], "x", 3, None])
def test_config_that_is_not_an_object_is_refused(data):
    with pytest.raises(AdapterError, match="expected a JSON object"):
        LoraConfig.from_json(data)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"{not json", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1, 2]", "expected a JSON object"),
        (b'{"peft_type": "LORA", "r": 4, "r": 8}', "field 'r' occurs twice"),
    ],
)
def test_damaged_config_file_is_refused_with_its_path(tmp_path, content, message):
    path = tmp_path / "adapter_config.json"
    path.write_bytes(content)
    with pytest.raises(AdapterError, match=message) as caught:
        LoraConfig.from_file(path)
    assert str(path) in str(caught.value)


def test_missing_config_file_is_refused_with_its_path(tmp_path):
    with pytest.raises(AdapterError, match=r"adapter_config.json: no such file"):
        LoraConfig.from_file(tmp_path / "adapter_config.json")
    (tmp_path / "adapter_config.json").mkdir()
    with pytest.raises(AdapterError, match="cannot be read"):
        LoraConfig.from_file(tmp_path / "adapter_config.json")


def test_to_json_reads_back_equal():
    config = LoraConfig(
        r=16,
        lora_alpha=4.5,
        target_modules=("q_proj", "down_proj"),
        exclude_modules=r".*\.1\..*",
        rank_pattern={"q_proj": 2},
        alpha_pattern={"down_proj": 7},
        use_rslora=True,
        layers_to_transform=(0, 2),
        layers_pattern=("layers",),
        fan_in_fan_out=True,
    )
    assert LoraConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
