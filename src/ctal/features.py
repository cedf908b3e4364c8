"""Acoustic features in torch, batched, on any device: the authors' librosa features without librosa.

Log-mel spectrograms, their deltas, and normalisation (CMVN, by the utterance), as recorded from the authors' code:
power spectrogram with zeros beyond both ends, Slaney mel filters, log(x + 1e-6), Savitzky–Golay deltas of the static
features whose edges continue the fit of the outermost window, population standard deviation.

A window of 800 samples inside an FFT of 2,048 needs only its 800 live samples framed, since a power spectrum does not
depend on where in the FFT they lie. Frames are transformed in blocks that stay in the cache: the log-mel of 30 s runs
at 1,900 times real time on one CPU core with 128 frames a block and at 740 in one block. Half of that is the FFT.

With `pitch`, the fundamental frequency, its delta and voicing stand behind them (`ctal.pitch`), which the mel channels
show only as the distance of harmonics. It is ours, not the authors'.

Shape suffixes: B utterances, T frames (padded), N frames of all utterances one behind the other, W samples of a
window, K bins of a spectrum, S squares of their two parts, M mel channels, P lags, D feature dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ctal.audio import HOP_LENGTH, SAMPLING_RATE, FeatureType, num_frames
from ctal.pitch import autocorrelation, track_pitch

NUM_MEL = 80
NUM_PITCH = 3
"""Logarithm of the fundamental frequency, its delta, voicing."""

DeltaOrder = Literal[0, 1, 2]
Cmvn = Literal["utterance", "level", "fixed", "speaker", "none"]
"""What features are normalised by: each recording's own mean and deviation of every dimension, as the authors have it;
constants, once it is brought to one level, so that how coloured a voice is stays in them; constants alone, so that how
loud it was recorded does too; constants, and then less the speaker's mean, so that what is left is how someone
differs from how they always sound; or nothing."""

_LOG_OFFSET = 1e-6
_DELTA_HALF_WIDTH = 4
"""Deltas look this many frames back and forth: a window of 9."""
_MIN_STD = 1e-3
"""Of a natural-log feature: below it a channel is constant but for rounding (digital silence) and is not blown up."""
_BAND_CHANNELS = 16
"""Mel channels that are one matrix product: fewer see less that is 0, but leave a product that is too narrow."""
_BLOCK_FRAMES = {"cpu": 128, "cuda": 16_384}


class _Analysis(NamedTuple):
    n_fft: int
    window: int
    mean: float
    """Of log-mel features of read speech, about, over all channels."""


_ANALYSIS: dict[FeatureType, _Analysis] = {
    "mel": _Analysis(n_fft=2048, window=800, mean=-7.0),  # 50 ms
    "fbank": _Analysis(n_fft=400, window=400, mean=-9.0),  # 25 ms
}
_DEVIATIONS = (4.0, 0.5, 0.25)
"""Likewise, of static features and of their deltas of each order (`mel` of LibriSpeech: -7.4, 3.9, 0.5, 0.26; of EmoDB:
-5.8, 4.2, 0.6, 0.34). Models depend on these numbers: others need another name than `fixed`, `speaker` and `level`."""
_LOG_HERTZ = (5.05, 0.35)
"""Mean (156 Hz) and deviation of the logarithm of the fundamental frequency of many voices, about. Models depend on
this and on the three below just so. (LibriSpeech: 4.99 to 5.08, 0.36 to 0.40; EmoDB: 5.19, 0.38.)"""
_LOG_HERTZ_OF_A_VOICE = 0.25
"""Its deviation within an utterance (LibriSpeech: 0.22 to 0.27; EmoDB: 0.20)."""
_DELTA_LOG_HERTZ = 0.02
"""Deviation of its delta, a frame (LibriSpeech: 0.019 to 0.025; EmoDB: 0.018)."""
_VOICING = (0.3, 0.25)
"""Mean and deviation of voicing (LibriSpeech: 0.29 to 0.30, 0.25; EmoDB: 0.32, 0.25)."""
_LEVEL = 10 ** (-23 / 20)
"""Of `level`: root mean square of a recording, 23 dB below full scale, where these constants fit read speech."""
_LEAST_LEVEL = 1e-4
"""What is quieter, 80 dB below full scale, is raised by no more than this is: it may be silence."""


class Features(NamedTuple):
    """Features of a batch."""

    features_BTD: Tensor
    """float32; frames behind an utterance's last are 0."""
    lengths_B: Tensor
    """int64, frames of each utterance."""


def feature_size(delta_order: DeltaOrder, pitch: bool = False) -> int:
    """Dimensions D of a feature frame: log-mel, its deltas of each order and, behind them, those of `pitch`."""
    return NUM_MEL * (1 + delta_order) + NUM_PITCH * pitch


def extract_features(
    wave: Tensor,
    *,
    feature_type: FeatureType = "mel",
    delta_order: DeltaOrder = 1,
    cmvn: Cmvn = "utterance",
    pitch: bool = False,
) -> Tensor:
    """Features (T, D) float32 of one utterance (num_samples ≥ 1,) at 16 kHz, with T = `num_frames(num_samples)`."""
    batch = extract_features_batch([wave], feature_type=feature_type, delta_order=delta_order, cmvn=cmvn, pitch=pitch)
    return batch.features_BTD[0]


def extract_features_batch(
    waves: Sequence[Tensor],
    *,
    feature_type: FeatureType = "mel",
    delta_order: DeltaOrder = 1,
    cmvn: Cmvn = "utterance",
    pitch: bool = False,
) -> Features:
    """Features of utterances of any lengths, each (num_samples ≥ 1,) float at 16 kHz and on the same device.

    The batch an utterance is in does not change its features (beyond rounding, below 1e-5; of pitch, below 1e-4, unless
    two frequencies fit a frame equally well; below 1e-3 in two or three frames, of whose deviations little is left).
    An utterance of fewer than 9 frames, too short for the authors' code, gets deltas over the widest odd window that
    fits; one or two frames have deltas of 0, and with `cmvn="utterance"` a single frame is all 0 but for its voicing.
    With `cmvn="speaker"` an utterance is all that is known of its speaker: its own mean is taken.
    """
    if cmvn == "level":
        waves = [at_one_level(wave) for wave in waves]
    sizes = [num_frames(len(wave), feature_type) for wave in waves]
    lengths = torch.tensor(sizes, device=waves[0].device)
    mask_BT = torch.arange(max(sizes), device=lengths.device) < lengths[:, None]
    mels_TM, correlations_TP = _analyse(waves, feature_type, pitch)
    static_BTM = pad_sequence(mels_TM, batch_first=True)
    orders = [static_BTM, *(deltas(static_BTM, lengths, order) for order in range(1, delta_order + 1))]
    features_BTD = torch.cat(orders, dim=-1)
    if cmvn == "utterance":
        features_BTD = normalize(features_BTD, mask_BT)
    elif cmvn in ("level", "fixed", "speaker"):
        features_BTD = standardize(features_BTD, feature_type, delta_order)
    if pitch:
        pitch_BTD = _pitch(pad_sequence(correlations_TP, batch_first=True), mask_BT, lengths, cmvn)
        features_BTD = torch.cat([features_BTD, pitch_BTD], dim=-1)
    if cmvn == "speaker":
        features_BTD = features_BTD - _mean_over_time(features_BTD, mask_BT)
    return Features(features_BTD * mask_BT[..., None], lengths)


def log_mel(waves: Sequence[Tensor], feature_type: FeatureType = "mel") -> Tensor:
    """Log-mel frames (N, M) float32 of all utterances, one behind the other without padding."""
    return torch.cat(_analyse(waves, feature_type, pitch=False)[0])


def _analyse(waves: Sequence[Tensor], feature_type: FeatureType, pitch: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Log-mel frames (T, M) of each utterance, and with `pitch` their `autocorrelation` (T, P), of one spectrum."""
    n_fft, width, _ = _ANALYSIS[feature_type]
    device = waves[0].device
    window_W = torch.hann_window(width, device=device)
    bands = _mel_bands(n_fft, device)
    frames_NW, utterances = _frames(waves, feature_type)
    powers, correlations = [], []
    with torch.autocast(device.type, enabled=False):
        for block_NW in frames_NW.split(_BLOCK_FRAMES.get(device.type, 16_384)):
            spectrum_NK = torch.fft.rfft(block_NW * window_W, n=n_fft)
            # The filters add up both parts' squares: each on its own, or abs() of a complex tensor, takes much longer.
            squares_NS = torch.view_as_real(spectrum_NK).flatten(1).square_()
            powers.append(torch.cat([squares_NS[:, parts] @ filters for parts, filters in bands], 1))
            if pitch:
                correlations.append(autocorrelation(squares_NS, width))
    mel_NM = torch.log(torch.cat(powers) + _LOG_OFFSET)
    mels_TM = [mel_NM[rows] for rows in utterances]
    if not pitch:
        return mels_TM, []
    correlation_NP = torch.cat(correlations)
    return mels_TM, [correlation_NP[rows] for rows in utterances]


def _pitch(correlation_BTP: Tensor, mask_BT: Tensor, lengths_B: Tensor, cmvn: Cmvn) -> Tensor:
    """(B, T, `NUM_PITCH`), normalised by constants; with `utterance` a voice's own mean is taken away, but never how
    far it rises and falls, by which it tells moods apart."""
    log_hertz_BT, voicing_BT, is_voiced_BT = track_pitch(correlation_BTP, mask_BT)
    delta_BT = deltas(log_hertz_BT[..., None], lengths_B, order=1)[..., 0]
    if cmvn != "none":
        mean, deviation = _LOG_HERTZ
        if cmvn == "utterance":
            count_B1 = is_voiced_BT.sum(1, keepdim=True).clamp_min(1)
            mean = (log_hertz_BT * is_voiced_BT).sum(1, keepdim=True) / count_B1
            deviation = _LOG_HERTZ_OF_A_VOICE
        log_hertz_BT = (log_hertz_BT - mean) / deviation * is_voiced_BT.any(1, keepdim=True)
        delta_BT = delta_BT / _DELTA_LOG_HERTZ
        voicing_BT = (voicing_BT - _VOICING[0]) / _VOICING[1]
    return torch.stack([log_hertz_BT, delta_BT, voicing_BT], dim=-1)


def _frames(waves: Sequence[Tensor], feature_type: FeatureType) -> tuple[Tensor, list[slice]]:
    """Frames (N, W) of all utterances in turn, each centred on a multiple of the hop, with zeros beyond the ends; and
    which rows are an utterance's: between two there are a few more, that see both."""
    width, hop = _ANALYSIS[feature_type].window, HOP_LENGTH[feature_type]
    padded, rows, first = [], [], 0
    for wave in waves:
        hops = -(-(len(wave) + width) // hop)
        padded.append(F.pad(wave.float(), (width // 2, hops * hop - len(wave) - width // 2)))
        rows.append(slice(first, first + num_frames(len(wave), feature_type)))
        first += hops
    return torch.cat(padded).unfold(0, width, hop), rows


def deltas(static_BTM: Tensor, lengths_B: Tensor, order: int) -> Tensor:
    """First (`order` 1) or second derivatives over time of a padded batch, as `librosa.feature.delta` gives them.

    Savitzky–Golay with a polynomial of degree `order`, whose derivative of that order is the same everywhere in a
    window: so the first and last frames take the value of the outermost full window.
    """
    num_steps = static_BTM.shape[1]
    half_B = ((lengths_B - 1) // 2).clamp(max=_DELTA_HALF_WIDTH)
    kernel_BK = _delta_kernels(order).to(static_BTM.device)[half_B]
    padded = F.pad(static_BTM, (0, 0, _DELTA_HALF_WIDTH, _DELTA_HALF_WIDTH))
    result_BTM = torch.zeros_like(static_BTM)
    for k in range(2 * _DELTA_HALF_WIDTH + 1):
        result_BTM.addcmul_(kernel_BK[:, k, None, None], padded[:, k : k + num_steps])
    frame_T = torch.arange(num_steps, device=lengths_B.device)
    centre_BT = torch.minimum(torch.maximum(frame_T, half_B[:, None]), (lengths_B - 1 - half_B)[:, None])
    return result_BTM.gather(1, centre_BT[..., None].expand_as(result_BTM))


def normalize(features_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean 0 and population standard deviation 1 per utterance and dimension, over the frames of `mask_BT`."""
    mask = mask_BT[..., None]
    centred = (features_BTD - _mean_over_time(features_BTD, mask_BT)) * mask
    variance = centred.square().sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True)
    return centred / variance.clamp_min(_MIN_STD**2).sqrt()  # not of 0, whose gradient is infinite


def _mean_over_time(features_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """(B, 1, D), over the frames of `mask_BT`."""
    mask = mask_BT[..., None]
    return (features_BTD * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True)


class FrameSums(NamedTuple):
    """Of R utterances, on the CPU, so that a mean over the frames of some of them is at hand."""

    sums_RD: Tensor
    """Float64."""
    counts_R: Tensor
    """Frames of each."""

    @classmethod
    def of(cls, utterances: Iterable[Tensor]) -> FrameSums | None:
        """Of utterances (T, D) each, one after the other; None where there is none."""
        parts = [(features_TD.double().sum(0).cpu(), len(features_TD)) for features_TD in utterances]
        if not parts:
            return None
        sums, counts = zip(*parts, strict=True)
        return cls(torch.stack(sums), torch.tensor(counts))

    def mean(self, chosen: np.ndarray | slice = slice(None)) -> Tensor:
        """(D,) float32, over all frames of all utterances, or of those at some places."""
        return (self.sums_RD[chosen].sum(0) / self.counts_R[chosen].sum()).float()


def standardize(features_BTD: Tensor, feature_type: FeatureType, delta_order: DeltaOrder) -> Tensor:
    """About mean 0 and standard deviation 1 over much read speech, by constants: the same for every recording."""
    static_BTM, deltas_BTD = features_BTD[..., :NUM_MEL], features_BTD[..., NUM_MEL:]
    deviations_D = features_BTD.new_tensor(_DEVIATIONS[1 : 1 + delta_order]).repeat_interleave(NUM_MEL)
    static_BTM = (static_BTM - _ANALYSIS[feature_type].mean) / _DEVIATIONS[0]
    return torch.cat([static_BTM, deltas_BTD / deviations_D], dim=-1)


def at_one_level(wave: Tensor) -> Tensor:
    """The recording (num_samples,) as loud as every other: the root mean square about its mean is `_LEVEL`."""
    wave = wave.float()
    return wave * (_LEVEL / wave.std(correction=0).clamp_min(_LEAST_LEVEL))


@cache
@torch.inference_mode(False)  # what is kept may be needed for gradients later
def _mel_bands(n_fft: int, device: torch.device) -> list[tuple[slice, Tensor]]:
    """The filters of `_BAND_CHANNELS` channels at a time, from low to high, without the bins in which all are 0.

    Which parts of a spectrum (real and imaginary of each bin in turn) they see, and the filters (parts, channels).
    """
    bands = []
    for filters in mel_filters(SAMPLING_RATE, n_fft, NUM_MEL).split(_BAND_CHANNELS, 1):
        seen = filters.any(1).nonzero()
        first, end = int(seen.min()), int(seen.max()) + 1
        bands.append((slice(2 * first, 2 * end), filters[first:end].repeat_interleave(2, 0).to(device)))
    return bands


@cache
@torch.inference_mode(False)
def mel_filters(sampling_rate: int, n_fft: int, num_mel: int) -> Tensor:
    """Slaney's mel filterbank, (n_fft // 2 + 1, num_mel) float32 on the CPU, each triangle of unit area in Hz.

    After M. Slaney's Auditory Toolbox (1998), as `librosa.filters.mel` has it; 0 Hz to half the sampling rate.
    """
    edges_hz = _mel_to_hz(np.linspace(0.0, _hz_to_mel(sampling_rate / 2), num_mel + 2))
    bins_hz = np.linspace(0.0, sampling_rate / 2, n_fft // 2 + 1)[:, None]
    low, centre, high = edges_hz[:-2], edges_hz[1:-1], edges_hz[2:]
    triangles = np.minimum((bins_hz - low) / (centre - low), (high - bins_hz) / (high - centre)).clip(min=0.0)
    return torch.from_numpy((triangles * 2.0 / (high - low)).astype(np.float32))


# Slaney's scale: linear below 1 kHz, 27 mel to every factor of 6.4 above it.
_LINEAR_HZ_PER_MEL = 200.0 / 3.0
_BREAK_HZ = 1000.0
_BREAK_MEL = _BREAK_HZ / _LINEAR_HZ_PER_MEL
_LOG_STEP = np.log(6.4) / 27.0


def _hz_to_mel(hz: float) -> float:
    """For frequencies above the break."""
    return _BREAK_MEL + float(np.log(hz / _BREAK_HZ) / _LOG_STEP)


def _mel_to_hz(mel: np.ndarray) -> np.ndarray:
    log_hz = _BREAK_HZ * np.exp(_LOG_STEP * (mel - _BREAK_MEL))
    return np.where(mel < _BREAK_MEL, _LINEAR_HZ_PER_MEL * mel, log_hz)


@cache
@torch.inference_mode(False)
def _delta_kernels(order: int) -> Tensor:
    """Row h: the weights of frames -4 … 4 for a window of 2h+1 frames; (5, 9) float32, row 0 is 0."""
    offsets = np.arange(-_DELTA_HALF_WIDTH, _DELTA_HALF_WIDTH + 1, dtype=np.float64)
    kernels = np.zeros((_DELTA_HALF_WIDTH + 1, len(offsets)))
    for half in range(1, _DELTA_HALF_WIDTH + 1):
        inside = np.abs(offsets) <= half
        # Least squares: the coefficient of xⁿ is the projection on xⁿ made orthogonal to lower powers; × n!.
        basis = offsets[inside] ** order
        basis -= basis.mean()
        kernels[half, inside] = order * basis / (basis @ basis)
    return torch.from_numpy(kernels.astype(np.float32))
