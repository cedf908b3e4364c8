"""The fundamental frequency: right on sounds whose own is known, none where nobody speaks, the same in any batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ctal.audio import HOP_LENGTH, SAMPLING_RATE
from ctal.features import NUM_PITCH, Cmvn, extract_features, extract_features_batch
from ctal.pitch import Pitch, autocorrelation, track_pitch

HOP = HOP_LENGTH["mel"]


def glide(
    middle_hz: float, octaves: float = 0.5, seconds: float = 2.0, lowest_harmonic: int = 1
) -> tuple[Tensor, Tensor]:
    """A buzz that rises and falls by `octaves` about `middle_hz`, and the logarithm of its frequency at each frame."""
    time = torch.arange(int(seconds * SAMPLING_RATE)) / SAMPLING_RATE
    hertz = middle_hz * 2 ** (octaves / 2 * torch.sin(2 * math.pi * 0.8 * time))
    phase = 2 * math.pi * torch.cumsum(hertz.double() / SAMPLING_RATE, 0)
    wave = sum(torch.sin(k * phase) / k for k in range(lowest_harmonic, 15))
    return 0.1 * torch.as_tensor(wave).float(), hertz.log()[::HOP]


def noise(num_samples: int, seed: int = 0) -> Tensor:
    return torch.randn(num_samples, generator=torch.Generator().manual_seed(seed))


def tracked(wave: Tensor) -> Pitch:
    """Of one utterance, without the dimension of the batch."""
    window, frames = torch.hann_window(800), torch.nn.functional.pad(wave, (400, 400)).unfold(0, 800, HOP)
    squares = torch.view_as_real(torch.fft.rfft(frames * window, n=2048)).flatten(1).square()
    found = track_pitch(autocorrelation(squares, 800)[None], torch.ones(1, len(squares), dtype=torch.bool))
    return Pitch(*(each[0] for each in found))


def pitch_of(wave: Tensor, cmvn: Cmvn = "none") -> Tensor:
    return extract_features(wave, cmvn=cmvn, pitch=True)[:, -NUM_PITCH:]


@pytest.mark.parametrize("middle_hz", [90.0, 150.0, 250.0])
@pytest.mark.parametrize("lowest_harmonic", [1, 3])
@pytest.mark.parametrize("noise_level", [0.0, 0.02])
def test_a_glide_is_followed_even_in_noise_and_where_the_fundamental_is_missing(
    middle_hz: float, lowest_harmonic: int, noise_level: float
) -> None:
    wave, truth = glide(middle_hz, lowest_harmonic=lowest_harmonic)
    found = tracked(wave + noise_level * noise(len(wave)))
    error = (found.log_hertz_BT[: len(truth)] - truth).abs()
    assert error.median() < 0.01
    assert (error < 0.06).float().mean() > 0.97  # no jumps by an octave
    assert found.is_voiced_BT.float().mean() > 0.97


@pytest.mark.parametrize(
    "wave", [torch.zeros(8_000), torch.zeros(1), 0.1 * noise(16_000)], ids=["silence", "one", "noise"]
)
def test_silence_and_noise_have_no_pitch(wave: Tensor) -> None:
    found = tracked(wave)
    assert found.is_voiced_BT.float().mean() < 0.05
    assert all(each.isfinite().all() for each in found)
    for cmvn in ("utterance", "fixed"):
        assert extract_features(wave, cmvn=cmvn, pitch=True).isfinite().all()


def test_hum_below_every_voice_does_not_move_it() -> None:
    wave, truth = glide(150)
    hum = 0.1 * torch.sin(2 * math.pi * 50 * torch.arange(len(wave)) / SAMPLING_RATE)
    assert ((tracked(wave + hum).log_hertz_BT[: len(truth)] - truth).abs() < 0.06).float().mean() > 0.97


def test_across_a_pause_the_pitch_is_a_straight_line_and_before_and_after_it_is_level() -> None:
    (low, _), (high, _) = glide(100, octaves=0, seconds=0.5), glide(200, octaves=0, seconds=0.5)
    pause = torch.zeros(8_000)
    found = tracked(torch.cat([pause, low, pause, high, pause]))
    voiced = np.flatnonzero(found.is_voiced_BT.numpy())
    first, last = voiced[0], voiced[-1]
    pause_after = np.flatnonzero(np.diff(voiced) > 10)[0]
    end, start = voiced[pause_after], voiced[pause_after + 1]
    contour = found.log_hertz_BT
    assert torch.equal(contour[:first], contour[first].expand(first))
    assert torch.equal(contour[last:], contour[last].expand(len(contour) - last))
    line = torch.from_numpy(np.linspace(contour[end].item(), contour[start].item(), start - end + 1)).float()
    assert torch.allclose(contour[end : start + 1], line, atol=1e-5)
    assert contour[start] - contour[end] == pytest.approx(math.log(2), abs=0.03)


def test_the_batch_does_not_change_the_pitch_of_an_utterance() -> None:
    waves = [glide(hz)[0][:length] for hz, length in ((100, 30_000), (180, 7_000), (240, 150))] + [0.1 * noise(900)]
    for cmvn in ("utterance", "fixed"):
        batch = extract_features_batch(waves, cmvn=cmvn, pitch=True)
        for number, wave in enumerate(waves):
            alone = extract_features(wave, cmvn=cmvn, pitch=True)
            assert torch.allclose(batch.features_BTD[number, : len(alone)], alone, atol=1e-4)
            assert not batch.features_BTD[number, len(alone) :].any()


def test_pitch_stands_behind_the_other_features_and_changes_none_of_them() -> None:
    wave, _ = glide(150)
    assert torch.equal(extract_features(wave, pitch=True)[:, :-NUM_PITCH], extract_features(wave))


def test_how_loud_a_recording_is_does_not_change_its_pitch() -> None:
    wave = glide(150)[0] + 0.01 * noise(32_000)
    assert torch.allclose(pitch_of(wave), pitch_of(0.01 * wave), atol=1e-3)


def test_normalised_by_the_utterance_a_voice_loses_its_height_but_not_how_far_it_rises() -> None:
    low, high, lively = (glide(hz, octaves)[0] for hz, octaves in ((100, 0.4), (160, 0.4), (100, 0.8)))
    contours = [pitch_of(wave, "utterance")[:, 0] for wave in (low, high, lively)]
    assert torch.allclose(contours[0], contours[1], atol=0.15)
    assert abs(contours[0].mean()) < 0.05
    assert contours[2].std() == pytest.approx(2 * contours[0].std().item(), rel=0.05)
    lifted = pitch_of(high, "fixed")[:, 0].mean() - pitch_of(low, "fixed")[:, 0].mean()
    assert lifted == pytest.approx(math.log(1.6) / 0.35, rel=0.02)
