"""Invariants of `CtalFeatureExtractor` and `CtalProcessor`."""

import json
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import soxr
import torch
from transformers import AutoFeatureExtractor, AutoProcessor, PreTrainedTokenizerBase

from ctal import CtalConfig, CtalFeatureExtractor, CtalProcessor
from ctal.audio import num_frames
from ctal.errors import InputError
from ctal.features import Cmvn
from ctal.text import normalize_transcript, train_tokenizer

RATE = 16_000
TEXTS = ["THE CAT SAT ON THE MAT", "Don’t sit on the cat!", "Übermut tut selten gut"] * 3


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(TEXTS, 280)


@pytest.fixture(scope="module")
def processor(tokenizer: PreTrainedTokenizerBase) -> CtalProcessor:
    return CtalProcessor(CtalFeatureExtractor(), tokenizer)


def noise(num_samples: int, seed: int = 0) -> np.ndarray:
    return 0.1 * np.random.default_rng(seed).standard_normal(num_samples).astype(np.float32)


class TestFeatureExtractor:
    def test_a_batch_is_the_recordings_one_by_one_padded_with_zeros(self):
        extractor = CtalFeatureExtractor()
        waves = [noise(5_000), noise(24_000, seed=1), noise(160, seed=2)]
        batch = extractor(waves, sampling_rate=RATE)
        assert list(batch) == extractor.model_input_names
        assert batch["feature_attention_mask"].sum(dim=1).tolist() == [num_frames(len(wave)) for wave in waves]
        for wave, features, mask in zip(waves, batch["input_features"], batch["feature_attention_mask"], strict=True):
            assert torch.allclose(features[mask.bool()], extractor.features(wave), rtol=0, atol=1e-5)
            assert not features[~mask.bool()].any()

    def test_every_way_to_hand_in_a_recording_gives_the_same_features(self):
        extractor = CtalFeatureExtractor()
        wave = noise(4_000)
        expected = extractor(wave, sampling_rate=RATE)["input_features"]
        assert expected.shape == (1, 21, 160)
        for form in (wave.tolist(), torch.from_numpy(wave), [wave], (wave,), [wave.tolist()], wave.astype(np.float64)):
            assert torch.equal(extractor(form, sampling_rate=RATE)["input_features"], expected)
        as_numpy = extractor(wave, sampling_rate=RATE, return_tensors="np")["input_features"]
        assert isinstance(as_numpy, np.ndarray)
        assert np.array_equal(as_numpy, expected.numpy())

    def test_other_sampling_rates_are_resampled(self):
        extractor = CtalFeatureExtractor()
        wave = noise(8_001)
        features = extractor(wave, sampling_rate=8_000)["input_features"][0]
        assert torch.equal(features, extractor.features(soxr.resample(wave, 8_000, RATE)))
        half = wave.astype(np.float16)
        exact = extractor(half.astype(np.float32), sampling_rate=8_000)["input_features"]
        assert torch.equal(extractor(half, sampling_rate=8_000)["input_features"], exact)

    def test_a_missing_sampling_rate_is_refused(self):
        with pytest.raises(InputError, match="sampling_rate"):
            CtalFeatureExtractor()(noise(100))

    @pytest.mark.parametrize("feature_type", ["mel", "fbank"])
    def test_max_frames_is_the_longest_that_passes_and_what_truncation_leaves(self, feature_type):
        extractor = CtalFeatureExtractor(feature_type=feature_type, max_frames=50)
        hop = {"mel": 200, "fbank": 160}[feature_type]
        longest, longer = noise(50 * hop - 1), noise(50 * hop)
        assert extractor(longest, sampling_rate=RATE)["input_features"].shape[1] == 50
        with pytest.raises(InputError, match=r"audio\[1\].*truncation=True"):
            extractor([longest, longer], sampling_rate=RATE)
        truncated = extractor(longer, sampling_rate=RATE, truncation=True)["input_features"]
        assert torch.equal(truncated[0], extractor.features(longer[:-1]))

    @pytest.mark.parametrize(
        ("audio", "message"),
        [
            ([], "empty list"),
            (np.zeros(0, np.float32), "shape"),
            ("talk.wav", "not samples; `ctal.audio.load_audio` reads a file"),
            (None, "not samples"),
            (np.zeros((2, 100), np.float32), "one channel"),
            ([np.zeros(100, np.int16)], "int16"),
            ([noise(100), np.array([0.0, np.nan])], r"audio\[1\] has NaN"),
        ],
    )
    def test_what_is_not_a_recording_is_refused(self, audio, message: str):
        with pytest.raises(InputError, match=message):
            CtalFeatureExtractor()(audio, sampling_rate=RATE)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"feature_typ": "mel"}, "did you mean 'feature_type'"),
            ({"feature_size": 80}, "no field 'feature_size'"),
            ({"feature_type": "mfcc"}, "choose from mel, fbank"),
            ({"delta_order": 3}, "choose from 0, 1, 2"),
            ({"cmvn": "utterence"}, "did you mean 'utterance'.*choose from utterance, level, fixed, speaker, none"),
            ({"max_frames": 0}, "at least 1"),
            ({"pitch": 1}, "pitch is 1; it is true or false"),
            ({"pitch": True, "feature_type": "fbank"}, "too short for deep voices; use feature_type mel"),
        ],
    )
    def test_a_wrong_field_is_refused(self, fields: dict, message: str):
        with pytest.raises(InputError, match=message):
            CtalFeatureExtractor(**fields)

    def test_normalisation_of_models_saved_as_true_or_false_stays_what_it_was(self):
        assert [CtalFeatureExtractor(cmvn=cmvn).cmvn for cmvn in (True, False)] == ["utterance", "none"]

    def test_what_is_normalised_otherwise_has_another_name(self):
        names = {CtalFeatureExtractor(cmvn=cmvn).analysis for cmvn in get_args(Cmvn)}
        assert names == {"mel-1-cmvn", "mel-1-level", "mel-1-fixed", "mel-1-speaker", "mel-1"}
        assert CtalFeatureExtractor(pitch=True).analysis == "mel-1-cmvn-pitch"

    def test_a_speakers_mean_is_taken_away_whatever_the_batch_and_the_length(self):
        extractor = CtalFeatureExtractor(cmvn="speaker", pitch=True)
        waves = [noise(n, seed=n) for n in (30_000, 12_000, 50_000)]
        known = extractor.for_speaker(waves, RATE)
        frames = torch.cat([known.features(wave) for wave in waves])
        assert frames.mean(0).abs().max() < 1e-5
        assert extractor.uncentred.analysis == CtalFeatureExtractor(cmvn="fixed", pitch=True).analysis
        batch = known(waves, sampling_rate=RATE)
        for features, mask, wave in zip(*batch.values(), waves, strict=True):
            assert known.speaker_mean is not None
            alone = extractor.uncentred.features(wave) - known.speaker_mean
            assert torch.allclose(features[mask.bool()], alone, rtol=0, atol=1e-4)
            assert not features[~mask.bool()].any()

    def test_without_recordings_of_the_speaker_the_recording_stands_for_them(self):
        extractor = CtalFeatureExtractor(cmvn="speaker")
        wave = noise(30_000)
        alone = extractor.features(wave)
        assert torch.allclose(alone, extractor.for_speaker([wave], RATE).features(wave), rtol=0, atol=1e-5)
        assert torch.allclose(extractor(wave, sampling_rate=RATE)["input_features"][0], alone, rtol=0, atol=1e-5)

    def test_a_speaker_is_not_saved_with_the_model(self, tmp_path: Path):
        CtalConfig().save_pretrained(tmp_path)
        extractor = CtalFeatureExtractor(cmvn="speaker")
        extractor.for_speaker([noise(8_000)], RATE).save_pretrained(tmp_path)
        loaded = CtalFeatureExtractor.from_pretrained(tmp_path)
        assert loaded.to_dict() == extractor.to_dict()
        assert loaded.speaker_mean is None

    def test_recordings_of_a_speaker_are_refused_where_they_make_no_difference(self):
        with pytest.raises(InputError, match="does not normalise by them \\(its cmvn is fixed\\)"):
            CtalFeatureExtractor(cmvn="fixed").for_speaker([noise(8_000)], RATE)
        extractor = CtalFeatureExtractor(cmvn="speaker")
        with pytest.raises(InputError, match="give at least one"):
            extractor.for_speaker([], RATE)
        with pytest.raises(InputError, match="recordings of the speaker: sampling_rate"):
            extractor.for_speaker([noise(8_000)])
        with pytest.raises(InputError, match="recording 1 of the speaker has NaN"):
            extractor.for_speaker([noise(8_000), np.full(100, np.nan, np.float32)], RATE)

    def test_padding_is_to_the_longest_or_not_at_all(self):
        extractor = CtalFeatureExtractor()
        equal, unequal = [noise(500), noise(500)], [noise(500), noise(900)]
        assert extractor(equal, sampling_rate=RATE, padding=False)["input_features"].shape[0] == 2
        with pytest.raises(InputError, match="different lengths"):
            extractor(unequal, sampling_rate=RATE, padding=False)
        with pytest.raises(InputError, match="max_length"):
            extractor(unequal, sampling_rate=RATE, padding="max_length")  # pyright: ignore[reportArgumentType]

    def test_it_survives_saving_with_every_field(self, tmp_path: Path):
        CtalConfig().save_pretrained(tmp_path)
        extractor = CtalFeatureExtractor(feature_type="fbank", delta_order=2, cmvn="fixed", max_frames=256)
        extractor.save_pretrained(tmp_path)
        for loaded in (CtalFeatureExtractor.from_pretrained(tmp_path), AutoFeatureExtractor.from_pretrained(tmp_path)):
            assert isinstance(loaded, CtalFeatureExtractor)
            assert loaded.to_dict() == extractor.to_dict()
            assert loaded.feature_size == 240
        assert CtalFeatureExtractor.from_pretrained(tmp_path, delta_order=0).feature_size == 80

    def test_its_parts_are_all_dimensions_in_their_order(self, tmp_path: Path):
        CtalConfig().save_pretrained(tmp_path)
        CtalFeatureExtractor(delta_order=2, pitch=True).save_pretrained(tmp_path)
        extractor = CtalFeatureExtractor.from_pretrained(tmp_path)
        assert extractor.feature_size == 243
        assert extractor.parts == {"static": slice(0, 80), "delta": slice(80, 240), "pitch": slice(240, 243)}
        assert CtalFeatureExtractor(delta_order=0).parts == {"static": slice(0, 80)}


class TestProcessor:
    def test_a_batch_has_the_models_inputs(self, processor: CtalProcessor):
        batch = processor(
            text=["THE CAT", "don’t sit on the mat"],
            audio=[noise(4_000), noise(9_000)],
            sampling_rate=RATE,
            return_tensors="pt",
            padding=True,
        )
        assert list(batch) == ["input_ids", "attention_mask", "input_features", "feature_attention_mask"]
        assert {name: value.dtype for name, value in batch.items()} == {
            "input_ids": torch.int64,
            "attention_mask": torch.int64,
            "input_features": torch.float32,
            "feature_attention_mask": torch.int64,
        }
        assert batch["input_features"].shape == (2, 46, 160)
        assert batch["attention_mask"].sum(dim=1).tolist() == (batch["input_ids"] != 1).sum(dim=1).tolist()
        assert set(batch) == set(processor.model_input_names)

    def test_transcripts_are_normalised(self, processor: CtalProcessor):
        ids = processor(text="THE CAT, don’t SIT!")["input_ids"][0].tolist()
        assert ids == processor.tokenizer("the cat don't sit")["input_ids"]

    def test_a_missing_transcript_is_empty(self, processor: CtalProcessor):
        batch = processor(text=[None, "the cat"], audio=[noise(900), noise(900)], sampling_rate=RATE)
        assert batch["input_ids"][0, :3].tolist() == [0, 2, 1]
        assert batch["attention_mask"][0].sum() == 2
        only_audio = processor(audio=[noise(900), noise(900)], sampling_rate=RATE)
        assert only_audio["input_ids"].tolist() == [[0, 2], [0, 2]]

    def test_text_alone_has_no_audio(self, processor: CtalProcessor):
        assert list(processor(text=["the cat", "sat"])) == ["input_ids", "attention_mask"]

    def test_one_of_each_is_a_batch_of_one(self, processor: CtalProcessor):
        batch = processor(text="the cat", audio=noise(900), sampling_rate=RATE, return_tensors="np")
        assert all(isinstance(value, np.ndarray) and len(value) == 1 for value in batch.values())

    @pytest.mark.parametrize(
        ("inputs", "message"),
        [
            ({}, "neither text nor audio"),
            ({"text": []}, "empty list"),
            ({"text": "a", "audio": [noise(9), noise(9)], "sampling_rate": RATE}, "1 texts for 2 recordings"),
            ({"audio": noise(9)}, "sampling_rate"),
            ({"text": ["a", "the cat"], "padding": False}, "different lengths"),
            ({"text": ["a", "the cat"], "padding": "max_length"}, "padding is 'max_length'"),
        ],
    )
    def test_what_does_not_make_a_batch_is_refused(self, processor: CtalProcessor, inputs: dict, message: str):
        with pytest.raises(InputError, match=message):
            processor(**inputs)

    def test_510_tokens_pass_and_longer_text_is_refused_or_truncated(self, processor: CtalProcessor):
        # Single letters that the texts do not have are one token and, behind the first, one for the space.
        text = " ".join("xyzw"[i % 4] for i in range(255))
        assert len(processor.tokenizer(text)["input_ids"]) == 511
        assert processor(text="x" + text.removesuffix(" z"))["input_ids"].shape == (1, 510)
        with pytest.raises(InputError, match=r"text\[1\] has 511 tokens, more than 510"):
            processor(text=["x", text])
        truncated = processor(text=["x", text], truncation=True)["input_ids"]
        assert truncated.shape == (2, 510)
        assert truncated[1, -1] == 2

    def test_it_survives_saving_whole(self, processor: CtalProcessor, tmp_path: Path):
        CtalConfig().save_pretrained(tmp_path)
        original = CtalProcessor(CtalFeatureExtractor(feature_type="fbank", delta_order=2), processor.tokenizer)
        original.save_pretrained(tmp_path)
        inputs = {"text": TEXTS[:3], "audio": [noise(n) for n in (900, 5_000, 8_000)], "sampling_rate": RATE}
        expected = original(**inputs)
        for loaded in (CtalProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
            assert isinstance(loaded, CtalProcessor)
            assert loaded.to_dict() == original.to_dict()
            batch = loaded(**inputs)
            assert all(torch.equal(batch[name], expected[name]) for name in expected)

    def test_a_misspelt_field_in_a_saved_processor_is_refused(self, processor: CtalProcessor, tmp_path: Path):
        processor.save_pretrained(tmp_path)
        file = tmp_path / "processor_config.json"
        saved = json.loads(file.read_text(encoding="utf-8"))
        saved["feature_extractor"]["delta_ordre"] = 2
        file.write_text(json.dumps(saved), encoding="utf-8")
        with pytest.raises(InputError, match="did you mean 'delta_order'"):
            CtalProcessor.from_pretrained(tmp_path)

    def test_ids_decode_to_the_normalised_transcript(self, processor: CtalProcessor):
        ids = processor(text=TEXTS[:3])["input_ids"]
        decoded = processor.batch_decode(ids, skip_special_tokens=True)
        assert decoded == [normalize_transcript(text) for text in TEXTS[:3]]
