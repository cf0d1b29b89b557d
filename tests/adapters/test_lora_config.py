"""Every PEFT field is honoured, ignored as harmless, or refused by name."""

import dataclasses
import json

import pytest

from slora_jax.adapters.config import HARMLESS, REFUSED, SWITCHED_ON_EMPTY, LoraConfig
from slora_jax.adapters.targets import resolve_targets
from slora_jax.errors import AdapterError

PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


def test_every_field_of_the_installed_peft_is_classified():
    peft = pytest.importorskip("peft")
    honoured = {field.name for field in dataclasses.fields(LoraConfig)}
    decided = honoured | HARMLESS | REFUSED.keys() | {"peft_type", "init_lora_weights"}
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} <= decided
    assert not honoured & HARMLESS and not honoured & REFUSED.keys() and not HARMLESS & REFUSED.keys()


def test_default_config_of_peft_is_accepted():
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
    on_empty = field in SWITCHED_ON_EMPTY  # PEFT fills it with defaults
    for unset in (None, False, 0, "", [], *([] if on_empty else [{}])):
        LoraConfig.from_json(PLAIN | {field: unset})
    for value in (True, [1], {"a": 1}, "x", 1, *([{}] if on_empty else [])):
        with pytest.raises(AdapterError, match=f"^{field}: .*must be unset"):
            LoraConfig.from_json(PLAIN | {field: value})


@pytest.mark.parametrize("field", sorted(HARMLESS))
def test_harmless_field_changes_nothing(field):
    assert LoraConfig.from_json(PLAIN | {field: {"any": "value"}}) == LoraConfig.from_json(PLAIN)


@pytest.mark.parametrize("fields", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}])
def test_activated_lora_with_further_extras_is_refused(fields):
    LoraConfig.from_json(PLAIN | {"alora_invocation_tokens": [1, 2]})
    with pytest.raises(AdapterError, match=rf"^alora_invocation_tokens: cannot be combined with {next(iter(fields))}"):
        LoraConfig.from_json(PLAIN | {"alora_invocation_tokens": [1, 2]} | fields)


def test_weight_tying_is_refused_where_it_ties_something():
    for fields in ({"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [1]}):
        with pytest.raises(AdapterError, match=r"^ensure_weight_tying: "):
            LoraConfig.from_json(PLAIN | fields | {"ensure_weight_tying": True})


def test_fields_beyond_plain_lora_are_read():
    assert LoraConfig.from_json(PLAIN | {"bias": None, "use_dora": None, "lora_bias": False}).extras == ()
    fields = {"bias": "lora_only", "use_dora": True, "lora_bias": True}
    assert LoraConfig.from_json(PLAIN | fields).extras == ("use_dora", "lora_bias", "bias")


@pytest.mark.parametrize("value", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "new", 1, ["eva"]])
def test_initialisation_that_changes_the_base_is_refused(value):
    with pytest.raises(AdapterError, match=r"^init_lora_weights: .*path_initial_model_for_weight_conversion"):
        LoraConfig.from_json(PLAIN | {"init_lora_weights": value})


@pytest.mark.parametrize("value", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_initialisation_that_leaves_the_base_alone_is_accepted(value):
    assert LoraConfig.from_json(PLAIN | {"init_lora_weights": value}) == LoraConfig.from_json(PLAIN)


def test_corda_adapter_converted_to_plain_lora_is_accepted():
    LoraConfig.from_json(PLAIN | {"init_lora_weights": True, "corda_config": {"corda_method": "ipm"}})


@pytest.mark.parametrize("value", [None, False, 0, 0.0, "", [], {}])
def test_unknown_inactive_field_is_ignored(value):
    assert LoraConfig.from_json(PLAIN | {"future_field": value}) == LoraConfig.from_json(PLAIN)


@pytest.mark.parametrize("value", [1, True, "x", [0], {"x": 1}])
def test_unknown_active_field_is_refused(value):
    with pytest.raises(AdapterError, match=r"^future_field: unknown field"):
        LoraConfig.from_json(PLAIN | {"future_field": value})


PUBLISHED = {
    "regex exclude": {"exclude_modules": r".*layers\.0\..*"},
    "integer dropout": {"lora_dropout": 0},
    "sequence-to-sequence task on a causal model": {"task_type": "SEQ_2_SEQ_LM"},
    "no task": {"task_type": None},
    "PEFT 0.2 fields": {"enable_lora": None, "merge_weights": False},
    "inactive fields of PEFT 0.21": {
        **dict.fromkeys(("lora_ga_config", "velora_config", "monteclora_config", "kasa_config", "arrow_config")),
        **dict.fromkeys(("use_bdlora", "alora_invocation_tokens", "trainable_token_indices", "target_parameters")),
        "layer_replication": None,
        "use_qalora": False,
        "qalora_group_size": 16,
        "ensure_weight_tying": False,
    },
    "weight tying asked for, nothing tied": {"ensure_weight_tying": True},
    "alpha below rank": {"r": 64, "lora_alpha": 16},
    "rank pattern with anchors": {"rank_pattern": {"^model.layers.0.self_attn.q_proj$": 4}},
    "null flags": {"use_rslora": None, "fan_in_fan_out": None},
    "empty layer selection beside a regex": {
        "target_modules": ".*q_proj",
        "layers_to_transform": [],
        "layers_pattern": "",
    },
}


@pytest.mark.parametrize("fields", PUBLISHED.values(), ids=PUBLISHED.keys())
def test_published_config_is_accepted(fields):
    plain = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
    targets = resolve_targets(LoraConfig.from_json(plain | fields), 2)
    expected = {(layer, name) for layer in range(2) for name in "qv"}
    if "exclude_modules" in fields:
        expected = {key for key in expected if key[0] == 1}
    if "target_modules" in fields:
        expected = {key for key in expected if key[1] == "q"}
    assert targets.keys() == expected
    assert targets[1, "q"].scale == fields.get("lora_alpha", 16) / fields.get("r", 8)
    if "rank_pattern" in fields:
        assert targets[0, "q"].rank == 4


@pytest.mark.parametrize("peft_type", [None, "LOHA", "lora", 3])
def test_other_peft_types_are_refused(peft_type):
    with pytest.raises(AdapterError, match="peft_type: expected 'LORA'"):
        LoraConfig.from_json(PLAIN | {"peft_type": peft_type})


OUT_OF_RANGE = {
    "r": [0, -1, 257, True, 4.0, "8", None],
    "lora_alpha": [float("nan"), float("inf"), 10**400, True, "16"],
    "rank_pattern": [{"q_proj": 0}, {"q_proj": 300}, ["q_proj"], {"q_proj(": 4}],
    "alpha_pattern": [{"q_proj": "4"}, {"*": 4}],
    "use_rslora": ["true", 1],
    "fan_in_fan_out": [1],
    "bias": [True, "some"],
    "use_dora": [1],
    "modules_to_save": [["classifier"], ["score", "lm_head"], 3],
    "trainable_token_indices": ["x", [1, 1], [0.5], {"norm": [1]}, list(range(300))],
    "alora_invocation_tokens": ["x", [0.5]],
    "target_modules": [3, ["q_proj", 3], {"q_proj": 1}, "q_proj("],
    "exclude_modules": ["[", 1],
    "layers_to_transform": ["0", [0, "1"], True],
    "layers_pattern": ["layers"],
}


@pytest.mark.parametrize(("field", "value"), [(field, v) for field, values in OUT_OF_RANGE.items() for v in values])
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
        use_dora=True,
        lora_bias=True,
        bias="all",
        modules_to_save=("lm_head",),
        trainable_token_indices={"lm_head": (3, 5)},
        base_model_name_or_path="org/base",
    )
    assert LoraConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
