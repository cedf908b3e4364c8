"""The configuration of a run."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from ctal.configuration_ctal import SIZES, CtalConfig
from ctal.errors import InputError
from ctal.recipes import (
    HARMLESS,
    MODEL_DEFAULTS,
    PRETRAINING,
    FinetuneConfig,
    PretrainConfig,
    RunConfig,
    check_same,
    learning_rate,
    make_config,
    parse_settings,
)


def test_later_layers_win_and_the_rest_are_the_paper_s() -> None:
    config = make_config(PretrainConfig, {"steps": 5, "seed": 1}, {"steps": 7})
    assert (config.steps, config.seed, config.learning_rate, config.warmup_ratio) == (7, 1, 5e-5, 0.07)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"learning_rat": 1}, "unknown field 'learning_rat' (did you mean 'learning_rate'?)"),
        ({"steps": 0}, "steps=0: "),
        ({"steps": "many"}, "steps='many': "),
        ({"learning_rate": float("nan")}, "learning_rate=nan: "),
        ({"precision": "fp16"}, "precision='fp16': "),
        ({"validation_share": 1}, "validation_share=1: "),
        ({"min_span": 60}, "configuration"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_wrong_field_is_one_line_that_names_it(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        make_config(PretrainConfig, fields)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_spans_that_contradict_each_other_are_told_as_such() -> None:
    with pytest.raises(InputError, match="min_span 60 is above max_span 50"):
        make_config(PretrainConfig, {"min_span": 60})


def test_settings_are_json_where_they_parse_and_text_else() -> None:
    known = ["steps", "learning_rate", "precision", "audio_is_causal"]
    settings = ["steps=3", "learning_rate=1e-3", "precision=bf16", "audio_is_causal=True"]
    assert parse_settings(settings, known) == {
        "steps": 3,
        "learning_rate": 1e-3,
        "precision": "bf16",
        "audio_is_causal": True,
    }


def test_a_setting_without_a_value_or_with_an_unknown_name_is_refused_with_the_mend() -> None:
    with pytest.raises(InputError, match="--set steps: write it as field=value"):
        parse_settings(["steps"], ["steps"])
    with pytest.raises(InputError, match=r"--set stepz: unknown field \(did you mean 'steps'\?\)"):
        parse_settings(["stepz=3"], ["steps"])
    with pytest.raises(InputError, match="--set cmvn: is decided in pre-training; pre-train with it"):
        parse_settings(["cmvn=fixed"], ["steps"], of_pretraining=["cmvn"])


def test_every_size_has_a_recipe_that_is_valid() -> None:
    assert PRETRAINING.keys() == SIZES.keys()
    for fields in PRETRAINING.values():
        make_config(PretrainConfig, fields)
    for size, fields in MODEL_DEFAULTS.items():
        CtalConfig.of_size(size, **fields)


def test_every_field_is_documented() -> None:
    kinds: list[type[BaseModel]] = [RunConfig, PretrainConfig]
    for kind in kinds:
        for name, field in kind.model_fields.items():
            assert field.description, name


def test_a_saved_configuration_is_read_back_exactly() -> None:
    config = make_config(PretrainConfig, {"learning_rate": 0.1 + 0.2, "seed": 2**40})
    assert PretrainConfig.model_validate_json(config.model_dump_json()) == config


def other_value(name: str) -> Any:
    value = getattr(make_config(PretrainConfig), name)
    special = {"precision": "bf16", "short_masking": "reference", "warmup_ratio": 0.5, "validation_share": 0.2}
    return special[name] if name in special else value / 2 if isinstance(value, float) else value + 1


@pytest.mark.parametrize("name", PretrainConfig.model_fields)
def test_every_field_that_touches_the_result_must_stay_when_a_run_is_resumed(name: str) -> None:
    before = make_config(PretrainConfig)
    after = make_config(PretrainConfig, {name: other_value(name)})
    assert after != before
    if name in HARMLESS:
        check_same(before.model_dump(), after, {})
    else:
        with pytest.raises(InputError, match=f"--resume: {name} is "):
            check_same(before.model_dump(), after, {})


def test_a_run_older_than_a_field_goes_on_with_its_default_alone() -> None:
    older = make_config(FinetuneConfig).model_dump()
    del older["speaker_swap"]
    check_same(older, make_config(FinetuneConfig), {})
    with pytest.raises(InputError, match=r"--resume: speaker_swap is 0.5, but the run was started with 0.0"):
        check_same(older, make_config(FinetuneConfig, {"speaker_swap": 0.5}), {})


@given(steps=st.integers(1, 3000), warmup=st.floats(0, 1))
def test_the_rate_rises_to_its_peak_and_falls_to_almost_nothing(steps: int, warmup: float) -> None:
    config = make_config(PretrainConfig, {"steps": steps, "warmup_ratio": warmup, "learning_rate": 1.0})
    rates = [learning_rate(config, step) for step in range(steps)]
    peak = max(range(steps), key=rates.__getitem__)
    assert all(0 < rate <= 1 + 1e-9 for rate in rates)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert abs(peak - warmup * steps) <= 1


def test_the_rate_has_the_values_of_a_linear_schedule() -> None:
    config = make_config(PretrainConfig, {"steps": 100, "warmup_ratio": 0.1, "learning_rate": 1.0})
    assert learning_rate(config, 10) == 1.0
    assert learning_rate(config, 55) == pytest.approx(0.5)
    assert learning_rate(config, 99) == pytest.approx(1 / 90)
