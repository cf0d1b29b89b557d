"""Projections with their rank and scale, compared with PEFT on a real model."""

import json
import warnings

import pytest
from hypothesis import given, note
from hypothesis import strategies as st

from slora_jax.adapters.config import LoraConfig
from slora_jax.adapters.geometry import module_name
from slora_jax.adapters.targets import Target, resolve_targets
from slora_jax.errors import AdapterError
from slora_jax.models.projections import PROJECTIONS

LAYERS = 3


def by_peft(tiny_llama, fields):
    """Returns PEFT's `module name -> Target`, and the config that it saves before and after."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(**fields)
    before = json.loads(json.dumps(config.to_dict(), default=list))
    model = peft.get_peft_model(tiny_llama(), config)
    layers = {
        name.removeprefix("base_model.model."): Target(module.r["default"], module.scaling["default"])
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    after = json.loads(json.dumps(model.peft_config["default"].to_dict(), default=list))
    return layers, before, after


def by_us(fields):
    targets = resolve_targets(LoraConfig.from_json(fields), LAYERS)
    return {module_name(*key): target for key, target in targets.items()}


CASES = {
    "default_targets": {},
    "suffixes": {"target_modules": ["q_proj", "up_proj"]},
    "longer_suffix": {"target_modules": ["self_attn.k_proj", "layers.1.mlp.down_proj"]},
    "suffix_must_start_at_a_dot": {"target_modules": ["proj", "_proj", "o_proj"]},
    "full_names": {"target_modules": ["model.layers.2.self_attn.v_proj", "gate_proj"]},
    "regex": {"target_modules": r".*\.[02]\.self_attn\.(q|v)_proj"},
    "regex_of_the_whole_name": {"target_modules": r"model\.layers\.\d+\.mlp\.(up|down)_proj"},
    "regex_with_lookahead": {"target_modules": r"^(?!.*visual).*(q_proj|down_proj)$"},
    "regex_of_unsloth": {
        "target_modules": r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
        r"(?:k_proj|v_proj|q_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn"
        r"|dense)\.(?:(?:k_proj|v_proj|q_proj)))"
    },
    "all_linear": {"target_modules": "all-linear"},
    "all_linear_any_case": {"target_modules": "All-Linear"},
    "all_linear_excluding": {"target_modules": "all-linear", "exclude_modules": ["k_proj", "layers.1.mlp.up_proj"]},
    "exclude_list": {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    "exclude_regex": {"target_modules": ["q_proj", "o_proj"], "exclude_modules": r".*\.2\..*"},
    "exclude_regex_needs_whole_name": {"target_modules": ["q_proj"], "exclude_modules": "q_proj"},
    "layer_list": {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
    "one_layer": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": 1},
    "no_layer_list": {"target_modules": ["q_proj"], "layers_to_transform": []},
    "layers_pattern": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "layers_patterns": {"target_modules": ["v_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    "full_name_ignores_layers": {
        "target_modules": ["model.layers.2.self_attn.q_proj", "v_proj"],
        "layers_to_transform": [0],
    },
    "rank_pattern": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 3, "q_proj": 5}},
    "rank_pattern_regex": {"target_modules": ["q_proj"], "rank_pattern": {r"model\.layers\.[01]\..*": 7}},
    "rank_pattern_caret": {"target_modules": ["q_proj"], "rank_pattern": {r"^model.layers.1.self_attn.q_proj": 2}},
    "rank_pattern_needs_a_dot": {"target_modules": ["q_proj"], "rank_pattern": {"_proj": 2, "proj": 3}},
    "first_pattern_wins": {
        "target_modules": ["q_proj", "k_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, ".*q_proj": 4, "q_proj": 6},
    },
    "alpha_pattern": {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"v_proj": 3, ".*1.*q_proj": 0.5}},
    "rank_and_alpha": {
        "target_modules": ["q_proj", "gate_proj"],
        "rank_pattern": {"gate_proj": 4},
        "alpha_pattern": {"gate_proj": 6, "layers.0.self_attn.q_proj": 1},
    },
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True},
    "rslora_patterns": {
        "target_modules": "all-linear",
        "use_rslora": True,
        "rank_pattern": {"down_proj": 2},
        "alpha_pattern": {"up_proj": 5},
    },
    "fan_in_fan_out": {"target_modules": ["q_proj"], "fan_in_fan_out": True},
    "many_full_names": {
        "target_modules": [module_name(i, p) for i in range(LAYERS) for p in PROJECTIONS if (i, p) != (1, "k")],
    },
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fields", CASES.values(), ids=CASES.keys())
def test_resolution_equals_peft(tiny_llama, fields):
    fields = {"r": 8, "lora_alpha": 12, "task_type": "CAUSAL_LM"} | fields
    expected, before, after = by_peft(tiny_llama, fields)
    assert expected
    assert by_us(before) == expected
    assert by_us(after) == expected


NAMES = ["q_proj", "k_proj", "o_proj", "down_proj", "self_attn.v_proj", "layers.1.mlp.up_proj", module_name(0, "gate")]
REGEXES = [r".*(q|k)_proj", r"model\.layers\.[12]\..*proj", r".*mlp\.\w+_proj", r".*\.1\.self_attn\.o_proj"]
KEYS = [*NAMES, r".*\.1\..*", r"layers\.[02]\.\w+\.\w+_proj", "_proj", r"^model.layers.0.self_attn.q_proj"]
LISTS = st.fixed_dictionaries(
    {"target_modules": st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True)},
    optional={
        "layers_to_transform": st.one_of(st.integers(0, 2), st.lists(st.integers(0, 2), max_size=2)),
    },
)
STRINGS = st.fixed_dictionaries({"target_modules": st.sampled_from([*REGEXES, "all-linear"])})
OTHER = st.fixed_dictionaries(
    {"r": st.integers(1, 9), "lora_alpha": st.integers(1, 20), "use_rslora": st.booleans()},
    optional={
        "exclude_modules": st.one_of(st.sampled_from(REGEXES), st.lists(st.sampled_from(NAMES), max_size=2)),
        "rank_pattern": st.dictionaries(st.sampled_from(KEYS), st.integers(1, 9), max_size=3),
        "alpha_pattern": st.dictionaries(st.sampled_from(KEYS), st.integers(1, 20), max_size=3),
    },
)


@given(targets=st.one_of(LISTS, STRINGS), other=OTHER)
def test_resolution_of_random_configs_equals_peft(tiny_llama, targets, other):
    fields = other | targets | {"task_type": "CAUSAL_LM"}
    note(str(fields))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            expected, before, _ = by_peft(tiny_llama, fields)
        except ValueError:
            with pytest.raises(AdapterError):
                by_us(fields | {"peft_type": "LORA"})
            return
    assert by_us(before) == expected


@pytest.mark.parametrize(
    ("wanted", "named"),
    [
        (["q_proj", "embed_tokens"], "model.embed_tokens"),
        (["lm_head"], "lm_head"),
        (".*lm_head", "lm_head"),
        (["mlp"], "model.layers.0.mlp"),
        (["input_layernorm"], "model.layers.0.input_layernorm"),
        (["norm"], "model.norm"),
        (".*", "model"),
    ],
)
def test_target_outside_the_seven_projections_is_refused_by_name(wanted, named):
    with pytest.raises(AdapterError, match=rf"target_modules: matches '{named}'"):
        resolve_targets(LoraConfig(target_modules=tuple(wanted) if isinstance(wanted, list) else wanted), LAYERS)


def test_all_linear_leaves_out_the_output_head():
    assert len(resolve_targets(LoraConfig(target_modules="all-linear"), LAYERS)) == LAYERS * 7


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=("c_attn",)),
        LoraConfig(target_modules=()),
        LoraConfig(target_modules="q_proj"),
        LoraConfig(target_modules=("q_proj",), layers_to_transform=(7,)),
        LoraConfig(target_modules=("q_proj",), layers_to_transform=1, layers_pattern="blocks"),
        LoraConfig(target_modules=("q_proj",), layers_to_transform=1, layers_pattern="layers|h"),
        LoraConfig(target_modules="all-linear", exclude_modules=".*"),
    ],
)
def test_config_without_targets_is_refused(config):
    with pytest.raises(AdapterError, match="matches no projection of the 3 layers"):
        resolve_targets(config, LAYERS)


def test_fan_in_fan_out_warns_and_has_no_effect():
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        targets = resolve_targets(LoraConfig(fan_in_fan_out=True), LAYERS)
    assert targets == resolve_targets(LoraConfig(), LAYERS)
