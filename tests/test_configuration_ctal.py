"""Configurations refuse what they do not know, and travel unchanged."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from ctal import CtalAudioConfig, CtalConfig, CtalTextConfig
from ctal.configuration_ctal import SIZES, architecture_fields
from ctal.errors import InputError

PAPER_SIZES = {"tiny": 3, "base": 6, "large": 12}


@pytest.mark.parametrize(("size", "layers"), PAPER_SIZES.items())
def test_sizes_are_those_of_the_paper(size: str, layers: int) -> None:
    config = CtalConfig.of_size(size)
    for encoder in (config.text, config.audio):
        assert encoder.num_hidden_layers == layers
        assert (encoder.hidden_size, encoder.num_attention_heads, encoder.intermediate_size) == (768, 12, 3072)
        assert encoder.layer_norm_eps == 1e-12
    assert config.text.vocab_size == 30_000
    assert config.text.max_tokens == 510
    assert config.audio.feature_size == 160
    assert config.audio.max_frames == 3000
    assert not config.audio_is_causal


@pytest.mark.parametrize("size", SIZES)
def test_an_override_reaches_every_encoder_that_has_the_field(size: str) -> None:
    config = CtalConfig.of_size(size, hidden_dropout_prob=0.3, vocab_size=300, frame_stack=2, audio_is_causal=True)
    assert config.text.hidden_dropout_prob == config.audio.hidden_dropout_prob == 0.3
    assert config.text.vocab_size == 300
    assert config.audio.max_frames == 6000
    assert config.audio_is_causal


def test_models_from_before_there_was_pitch_have_none() -> None:
    old = CtalConfig.of_size("nano").to_dict()
    del old["audio_config"]["pitch"], old["audio_pooling"]
    config = CtalConfig.from_dict(old)
    assert not config.audio.pitch
    assert config.audio_pooling == "max"


def test_every_field_can_be_overridden_and_sizes_stay_as_they_are() -> None:
    before = copy.deepcopy(SIZES)
    defaults = CtalConfig.of_size("nano")
    for name in architecture_fields():
        owner = next(each for each in (defaults.text, defaults.audio, defaults) if name in each.to_dict())
        CtalConfig.of_size("nano", **{name: getattr(owner, name)})
    CtalConfig.of_size("nano", num_hidden_layers=7)
    assert before == SIZES


@pytest.mark.parametrize(
    ("kind", "fields", "named"),
    [
        pytest.param(CtalConfig, {"audio_is_casual": True}, "did you mean 'audio_is_causal'", id="misspelt"),
        pytest.param(CtalConfig, {"text_config": {"hiden_size": 8}}, "did you mean 'hidden_size'", id="inside"),
        pytest.param(CtalAudioConfig, {"frame_stac": 2}, "did you mean 'frame_stack'", id="audio"),
        pytest.param(CtalTextConfig, {"frame_stack": 2}, "no field 'frame_stack'", id="of the other encoder"),
        pytest.param(CtalAudioConfig, {"frame_stack": 3}, "1, 2 or 4", id="a stack of 3"),
        pytest.param(CtalTextConfig, {"num_attention_heads": 7}, "num_attention_heads", id="heads do not divide"),
        pytest.param(
            CtalTextConfig, {"max_position_embeddings": 3}, "leaves 1 for tokens", id="no position for a word"
        ),
        pytest.param(
            CtalConfig,
            {"text_config": {"hidden_size": 24, "num_attention_heads": 2}},
            "hidden_size differs",
            id="unequal widths",
        ),
    ],
)
def test_a_wrong_field_gives_one_line_that_names_it(kind: type[Any], fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named) as error:
        kind(**fields)
    assert "\n" not in str(error.value)


def test_a_margin_and_the_weight_of_a_term_may_be_0_and_not_less() -> None:
    for name in ("speaker_margin", "orthogonality_weight"):
        assert getattr(CtalConfig.of_size("nano", **{name: 0}), name) == 0
        with pytest.raises(InputError, match=f"{name}=-0.1: must be at least 0"):
            CtalConfig.of_size("nano", **{name: -0.1})


def test_a_wrong_size_or_override_gives_the_nearest_name() -> None:
    with pytest.raises(InputError, match="did you mean 'large'"):
        CtalConfig.of_size("lrage")
    with pytest.raises(InputError, match="did you mean 'frame_stack'"):
        CtalConfig.of_size("nano", frame_stak=2)


def test_a_saved_configuration_comes_back_equal(tmp_path: Path) -> None:
    config = CtalConfig.of_size("nano", vocab_size=300, frame_stack=4, audio_is_causal=True, initializer_range=0.1)
    config.save_pretrained(tmp_path)

    again = CtalConfig.from_pretrained(tmp_path)

    assert again.to_diff_dict() == config.to_diff_dict()
    for side in ("text", "audio"):
        assert type(getattr(again, side)) is type(getattr(config, side))
    assert copy.deepcopy(config).to_dict() == config.to_dict()


def test_a_misspelt_field_in_the_file_is_refused(tmp_path: Path) -> None:
    CtalConfig.of_size("nano").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    fields = json.loads(file.read_text())
    fields["audio_config"]["frame_stak"] = 2
    file.write_text(json.dumps(fields))
    with pytest.raises(InputError, match="did you mean 'frame_stack'"):
        CtalConfig.from_pretrained(tmp_path)


def test_word_embeddings_are_tied_at_the_top_level_where_transformers_looks() -> None:
    assert CtalConfig.of_size("nano").tie_word_embeddings
