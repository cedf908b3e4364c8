"""How high a voice is, frame by frame: fundamental frequency and voicing, batched, on any device.

After P. Boersma, "Accurate short-term analysis of the fundamental frequency and the harmonics-to-noise ratio of a
sampled sound" (1993), Praat's method: the autocorrelation of a windowed frame over that of the window is highest at the
period. As in T. Tolonen and M. Karjalainen, "A computationally efficient multipitch analysis model" (2000), it is that
of a compressed spectrum, here of magnitudes, which halves the errors by an octave; and of what lies below 2 kHz. It is
computed at the lags that are wanted, evenly spaced in log-frequency, as one matrix product with the spectrum that the
mel filters see. There is no path search: neighbouring frames are averaged before the best lag is chosen.

Shape suffixes: B utterances, T frames (padded), N frames of all utterances, K bins of the spectrum, P lags.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ctal.audio import SAMPLING_RATE

LOWEST_HZ, HIGHEST_HZ = 60.0, 450.0
"""Three periods of the lowest fill a window of 50 ms."""
_NUM_LAGS = 84
"""2.4 % from one to the next; a parabola through three of them finds what lies between."""
_TOP_HZ = 2_000.0
_OCTAVE_COST = 0.06
"""What a frequency an octave lower must be better by: every multiple of a period is a period too."""
_SMOOTHED = 2
"""Frames to either side over which autocorrelations are averaged."""
_SILENCE = 1e-2
"""Of the loudest frame's magnitude: what is much softer is not voiced, however periodic."""
_LEAST_SQUARE = 1e-36
VOICED = 0.25
"""Voicing from which a frame has a pitch of its own."""


class Pitch(NamedTuple):
    """Of a batch; 0 behind an utterance's last frame."""

    log_hertz_BT: Tensor
    """Natural logarithm of the fundamental frequency; in a straight line across frames without voice, level before the
    first and after the last, and 0 in an utterance without any."""
    voicing_BT: Tensor
    """The height of the autocorrelation there: 0 (silence) … 1; of what is periodic from 0.5 (deep) to 1 (high)."""
    is_voiced_BT: Tensor
    """bool."""


def autocorrelation(squares_NS: Tensor, width: int) -> Tensor:
    """(N, 1 + P), at lag 0 and at each of the P lags, there as a share of what the window leaves.

    Args:
        squares_NS: of the spectra of frames from 0 Hz to half the sampling rate, the real and the imaginary part of
            each bin in turn.
        width: samples of the Hann window that was applied before.
    """
    cosines_KP = _cosines(squares_NS.shape[1] // 2, width, squares_NS.device)
    end = 2 * len(cosines_KP)
    # The gradient of the root is infinite at 0, in silence.
    return (squares_NS[:, 0:end:2] + squares_NS[:, 1:end:2]).clamp_min(_LEAST_SQUARE).sqrt() @ cosines_KP


@cache
@torch.inference_mode(False)  # what is kept may be needed for gradients later
def _cosines(num_bins: int, width: int, device: torch.device) -> Tensor:
    """(K, 1 + P) float32: the first K of `num_bins` bins of a spectrum → its autocorrelation; nothing below the lowest
    pitch, where hum is and no voice."""
    bins_hz = torch.arange(num_bins, dtype=torch.float64) * SAMPLING_RATE / 2 / (num_bins - 1)
    lags = torch.cat([torch.zeros(1, dtype=torch.float64), torch.exp(-_log_grid().double())])  # s
    cosines_KP = torch.cos(2 * torch.pi * bins_hz[:, None] * lags) * (bins_hz[:, None] >= LOWEST_HZ)
    # Of power, not of magnitudes, which would undo more than is well: it favours long lags.
    window = torch.hann_window(width, dtype=torch.float64)
    left_P = torch.fft.irfft(torch.fft.rfft(window, n=4 * width).abs().square())
    left_P = left_P[(lags * SAMPLING_RATE).round().long()] / left_P[0]
    return (cosines_KP / left_P)[bins_hz <= _TOP_HZ].float().to(device)


@cache
@torch.inference_mode(False)
def _log_grid() -> Tensor:
    """(P,) logarithms of the frequencies in Hz whose periods are the lags."""
    return torch.linspace(math.log(LOWEST_HZ), math.log(HIGHEST_HZ), _NUM_LAGS)


def track_pitch(correlation_BTP: Tensor, mask_BT: Tensor) -> Pitch:
    """From the `autocorrelation` (B, T, 1 + P) of each frame; `mask_BT` is true at the frames of an utterance.

    The batch that an utterance is in changes nothing, unless rounding decides between two lags.
    """
    mask_BT1 = mask_BT[..., None]
    energy_BT1, heights_BTP = correlation_BTP[..., :1] * mask_BT1, correlation_BTP[..., 1:] * mask_BT1
    floor_B11 = _SILENCE * energy_BT1.amax(1, keepdim=True)
    heights_BTP = _sums(heights_BTP / (energy_BT1 + floor_B11).clamp_min(1e-9)) / _sums(mask_BT1.float()).clamp_min(1)
    grid_P = _log_grid().to(heights_BTP.device)
    scores_BTP = heights_BTP + _OCTAVE_COST / math.log(2) * (grid_P - grid_P[0])
    best_BT1 = scores_BTP[..., 1:-1].argmax(-1, keepdim=True) + 1
    # The vertex of the parabola through the best lag and its neighbours.
    left, middle, right = (scores_BTP.gather(-1, best_BT1 + side)[..., 0] for side in (-1, 0, 1))
    shift_BT = ((left - right) / (2 * (left - 2 * middle + right)).clamp_max(-1e-6)).clamp(-0.5, 0.5)
    log_hertz_BT = grid_P[best_BT1[..., 0]] + shift_BT * (grid_P[1] - grid_P[0])
    voicing_BT = heights_BTP.gather(-1, best_BT1)[..., 0].clamp(0, 1) * mask_BT
    is_voiced_BT = voicing_BT > VOICED
    return Pitch(_across_gaps(log_hertz_BT, is_voiced_BT) * mask_BT, voicing_BT, is_voiced_BT)


def _sums(values_BTP: Tensor) -> Tensor:
    """Of each frame and its neighbours."""
    padded = F.pad(values_BTP, (0, 0, _SMOOTHED, _SMOOTHED))
    num_steps = values_BTP.shape[1]
    return sum(padded[:, k : k + num_steps] for k in range(2 * _SMOOTHED + 1))  # pyright: ignore[reportReturnType]


def _across_gaps(values_BT: Tensor, is_known_BT: Tensor) -> Tensor:
    """`values_BT` where they are known, else on the line between those that are; 0 where none is."""
    num_steps = values_BT.shape[1]
    frame_T = torch.arange(num_steps, device=values_BT.device)
    before_BT = torch.where(is_known_BT, frame_T, -1).cummax(1).values
    after_BT = torch.where(is_known_BT, frame_T, num_steps).flip(1).cummin(1).values.flip(1)
    before_BT = torch.where(before_BT < 0, after_BT, before_BT)
    after_BT = torch.where(after_BT == num_steps, before_BT, after_BT)
    share_BT = (frame_T - before_BT) / (after_BT - before_BT).clamp_min(1)
    first, last = (values_BT.gather(1, each.clamp_max(num_steps - 1)) for each in (before_BT, after_BT))
    return (first + share_BT * (last - first)) * is_known_BT.any(1, keepdim=True)
