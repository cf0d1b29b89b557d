"""Sampling parameters are checked once, by name."""

import math

import pytest

from slora_jax import ConfigError, SamplingParams

WRONG = {
    "max_tokens": [0, -1, 1.5, "8", True],
    "temperature": [-0.1, math.nan, math.inf, "0.5", None, True],
    "top_k": [-1, 1.5, None, 2**31, True],
    "top_p": [0, 0.0, -0.1, 1.01, math.nan, None],
    "min_p": [-0.1, 1.01, math.nan, None],
    "seed": [-1, 2**32, 0.5, "7", True],
    "stop": [[""], [1], ["a", ""], "", [None], 3, {"a": 1}],
    "stop_token_ids": [[-1], ["a"], [1.0], [True], 3, "a"],
    "logprobs": [-1, 21, 1.5, True],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in WRONG.items() for value in values])
def test_bad_value_is_refused_with_field_and_value(field: str, value: object) -> None:
    with pytest.raises(ConfigError) as error:
        SamplingParams(**{field: value})
    assert f"SamplingParams.{field}=" in str(error.value)
    assert "must be" in str(error.value)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"max_tokens": None},
        {"max_tokens": 1, "temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0},
        {"temperature": 1e4, "top_k": 2**31 - 1, "top_p": 1e-9, "min_p": 1.0},
        {"seed": 0},
        {"seed": 2**32 - 1},
        {"logprobs": 0},
        {"logprobs": 20},
    ],
)
def test_values_at_the_borders_are_taken(fields: dict) -> None:
    params = SamplingParams(**fields)
    assert all(getattr(params, name) == value for name, value in fields.items())


def test_stop_is_a_string_or_strings_and_becomes_a_tuple() -> None:
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(stop_token_ids=[3, 4]).stop_token_ids == (3, 4)
    assert SamplingParams(stop=None, stop_token_ids=None) == SamplingParams()


def test_parameters_can_be_shared_as_a_key() -> None:
    assert len({SamplingParams(stop=["a"]), SamplingParams(stop=("a",)), SamplingParams()}) == 2


def test_unknown_field_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"SamplingParams\.n_beams is unknown; there are max_tokens, "):
        SamplingParams(n_beams=4)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match=r"SamplingParams\.max_token is unknown \(did you mean 'max_tokens'\?\)"):
        SamplingParams(max_token=3)  # type: ignore[call-arg]
