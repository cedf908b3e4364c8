"""The authors' recorded features of three recordings."""

import numpy as np
import pytest
import torch

from conftest import REFERENCE, needs_reference
from ctal.audio import load_audio
from ctal.features import extract_features

RECORDINGS = ["emodb-03a01Fa.wav", "fsdd-7_jackson_32-8khz.wav", "libri-2412-153948-0001.flac"]
KINDS = {
    "mel-delta": {},
    "mel-delta-nocmvn": {"cmvn": "none"},
    "fbank": {"feature_type": "fbank", "delta_order": 0},
    "fbank-delta-deltadelta": {"feature_type": "fbank", "delta_order": 2},
}


@needs_reference
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recording", RECORDINGS)
def test_features_are_the_recorded_ones(recording: str, kind: str):
    folder = REFERENCE / "features"
    expected = np.load(folder / f"{recording.rsplit('.', 1)[0]}.{kind}.npy")
    features = extract_features(torch.from_numpy(load_audio(folder / recording)), **KINDS[kind]).numpy()
    assert features.shape == expected.shape
    assert np.abs(features - expected).max() < 1e-3
    assert np.abs(features - expected).mean() < 1e-5
