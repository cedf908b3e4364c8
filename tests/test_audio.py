"""Invariants of reading recordings (`ctal.audio`) and of acoustic features (`ctal.features`)."""

import io
import struct
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import librosa
import numpy as np
import pytest
import soundfile
import torch

from ctal.audio import SAMPLING_RATE, FeatureType, decode_audio, load_audio, num_frames, resample, resampled_length
from ctal.errors import InputError
from ctal.features import Cmvn, deltas, extract_features, extract_features_batch, feature_size, log_mel, mel_filters

FORMATS = [
    ("WAV", "PCM_16"),
    ("WAV", "PCM_24"),
    ("WAV", "FLOAT"),
    ("FLAC", "PCM_16"),
    ("OGG", "VORBIS"),
    ("MP3", "MPEG_LAYER_III"),
]


def speechlike(num_samples: int, seed: int = 0) -> np.ndarray:
    """Decaying harmonics with some noise, (num_samples,) float32 within ±1."""
    generator = np.random.default_rng(seed)
    time = np.arange(num_samples) / SAMPLING_RATE
    pitch = generator.uniform(90, 220)
    wave = sum(np.sin(2 * np.pi * pitch * k * time + generator.uniform(0, 6)) / k for k in range(1, 12))
    return (0.2 * wave * np.sin(3 * time) ** 2 + 0.01 * generator.standard_normal(num_samples)).astype(np.float32)


def encode(
    wave: np.ndarray, rate: int = SAMPLING_RATE, format: str = "WAV", subtype: str = "PCM_16", **options: Any
) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format=format, subtype=subtype, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(("format", "subtype"), FORMATS)
@pytest.mark.parametrize("channels", [1, 2])
def test_every_format_decodes_to_the_mean_of_its_channels(format: str, subtype: str, channels: int):
    wave = speechlike(16_000)
    stereo = np.stack([wave, 0.5 * wave], axis=1)[:, :channels]
    decoded, rate = decode_audio(encode(stereo, 16_000, format, subtype))
    lossless = format in ("WAV", "FLAC")
    assert rate == 16_000
    assert decoded.dtype == np.float32
    assert decoded.shape == (16_000,)
    assert np.abs(decoded - stereo.mean(axis=1)).max() < (1e-4 if lossless else 0.1)


def test_decoding_in_blocks_equals_decoding_at_once():
    wave = speechlike(2_500_000)
    decoded, _ = decode_audio(encode(wave, subtype="FLOAT"))
    assert np.array_equal(decoded, wave)


def test_a_path_and_its_bytes_decode_equally(tmp_path: Path):
    file = tmp_path / "a.flac"
    file.write_bytes(encode(speechlike(5_000), format="FLAC"))
    assert np.array_equal(load_audio(file), load_audio(file.read_bytes()))


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000])
def test_resampling_is_librosas_in_samples_and_length(rate: int):
    for num_samples in (1, 440, 441, 10_007):
        wave = speechlike(num_samples)
        ours = resample(wave, rate)
        theirs = librosa.resample(wave, orig_sr=rate, target_sr=SAMPLING_RATE)
        assert len(ours) == len(theirs) == resampled_length(num_samples, rate)
        assert np.abs(ours - theirs).max() < 1e-6


def riff(*chunks: tuple[bytes, bytes, int | None]) -> bytes:
    """A WAV from (name, content, the size its header claims or None for the true one)."""
    body = b"".join(
        name + struct.pack("<I", len(content) if claimed is None else claimed) + content + b"\0" * (len(content) % 2)
        for name, content, claimed in chunks
    )
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WAVE" + body


FORMAT_CHUNK = struct.pack("<HHIIHH", 1, 1, 16_000, 32_000, 2, 16)
SECOND = (speechlike(16_000) * 32_767).astype("<i2").tobytes()
LONG_FLAC = encode(speechlike(32_000), format="FLAC")
STREAMED_FLAC = LONG_FLAC[:21] + bytes([LONG_FLAC[21] & 0xF0, 0, 0, 0, 0]) + LONG_FLAC[26:]
"""The number of samples, 36 bits of the STREAMINFO block, set to 0 for "unknown"."""

BAD = {
    "empty": (b"", "empty"),
    "text": (b"not audio at all, but a note about it. " * 40, "not audio"),
    "truncated FLAC": (LONG_FLAC[: len(LONG_FLAC) // 2], "cut short"),
    "FLAC without its last byte": (LONG_FLAC[:-1], "cut short"),
    "streamed FLAC": (STREAMED_FLAC, "leaves the length open"),
    "truncated WAV": (encode(speechlike(16_000))[:20_000], "cut short"),
    "truncated WAV behind a chunk of odd size": (
        riff((b"fmt ", FORMAT_CHUNK, None), (b"LIST", b"odd", None), (b"data", SECOND[:9_000], len(SECOND))),
        "cut short",
    ),
    "truncated MP3": (encode(speechlike(64_000), format="MP3", subtype="MPEG_LAYER_III")[:6_000], "cut short"),
    "another format": (b"\0\0\0 ftypM4A " + bytes(4000), "not audio"),
    "no samples": (encode(np.zeros(0)), "no samples"),
    "NaN": (encode(np.array([0.1, np.nan, 0.1]), subtype="FLOAT"), "NaN or infinite"),
    "infinite": (encode(np.array([0.1, -np.inf, 0.1]), subtype="FLOAT"), "NaN or infinite"),
    "huge samples": (encode(np.array([0.1, 1e30, 0.1]), subtype="FLOAT"), "scale it"),
    "rate too low": (encode(speechlike(100), rate=1_000), "1000 Hz"),
    "rate too high": (encode(speechlike(100), rate=500_000), "500000 Hz"),
    "too many channels": (encode(np.zeros((100, 9))), "9 channels"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_recording_is_refused_in_one_line_that_names_it_and_the_reason(case: str, tmp_path: Path):
    data, reason = BAD[case]
    file = tmp_path / "bad.wav"
    file.write_bytes(data)
    for source, name in ((data, "given name"), (file, None)):
        with pytest.raises(InputError) as caught:
            decode_audio(source, name)
        message = str(caught.value)
        assert message.startswith(f"{name or file}: ")
        assert reason in message
        assert "\n" not in message


def test_an_mp3_without_a_length_is_whole_though_libsndfile_expects_more() -> None:
    options = {"format": "MP3", "subtype": "MPEG_LAYER_III", "compression_level": 0.5, "bitrate_mode": "CONSTANT"}
    told = encode(speechlike(44_100 * 8), rate=44_100, **options)
    untold = told[told.index(told[:2], 4) :]  # without the first frame, which only says how many there are
    with soundfile.SoundFile(io.BytesIO(untold)) as file:
        assert file.frames > len(file.read())
    wave, rate = decode_audio(untold)
    assert rate == 44_100
    assert len(wave) >= 44_100 * 8
    titles = b"ID3\x04\x00\x00" + bytes([0, 0, 20, 10]) + bytes(20 * 128 + 10)
    assert len(decode_audio(titles + told)[0]) == len(decode_audio(told)[0])
    with pytest.raises(InputError, match="cut short"):
        decode_audio(titles + told[: len(told) // 2])


def test_a_recording_in_a_format_that_is_not_read_is_to_be_converted_not_fetched_again(tmp_path: Path) -> None:
    (tmp_path / "call.M4A").write_bytes(b"\0\0\0 ftypM4A " + bytes(4000))
    with pytest.raises(InputError, match="convert it to WAV"):
        decode_audio(tmp_path / "call.M4A")


@pytest.mark.parametrize("path", ["missing.wav", "."])
def test_a_path_that_is_no_file_is_refused(path: str, tmp_path: Path):
    with pytest.raises(InputError, match="check the path"):
        decode_audio(tmp_path / path)


def test_a_streamed_wav_is_read_to_its_end():
    for claimed in (0xFFFF_FFFF, 0x7FFF_FFFF - 8, 0):
        data = riff((b"fmt ", FORMAT_CHUNK, None), (b"data", SECOND, claimed))
        if claimed == 0:  # a player would hear nothing, so this one says so
            with pytest.raises(InputError, match="no samples"):
                decode_audio(data)
        else:
            assert len(decode_audio(data)[0]) == 16_000


def test_reading_recordings_does_not_import_torch():
    code = "import sys, ctal.audio; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("n_fft", [400, 2048])
def test_the_filterbank_is_librosas(n_fft: int):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = librosa.filters.mel(sr=SAMPLING_RATE, n_fft=n_fft, n_mels=80).T
    assert np.abs(mel_filters(SAMPLING_RATE, n_fft, 80).numpy() - expected).max() < 1e-8


@pytest.mark.parametrize(("feature_type", "n_fft", "window"), [("mel", 2048, 800), ("fbank", 400, 400)])
@pytest.mark.parametrize("num_samples", [1, 199, 200, 4_001, 50_000])
def test_log_mel_is_librosas_at_every_length(feature_type, n_fft: int, window: int, num_samples: int):
    wave = speechlike(num_samples)
    hop = {"mel": 200, "fbank": 160}[feature_type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # librosa warns of an FFT longer than the wave
        power = librosa.feature.melspectrogram(
            y=wave, sr=SAMPLING_RATE, n_fft=n_fft, win_length=window, hop_length=hop, n_mels=80, pad_mode="constant"
        )
    ours = log_mel([torch.from_numpy(wave)], feature_type).numpy()
    assert ours.shape == (num_frames(num_samples, feature_type), 80)
    assert np.abs(ours - np.log(power.T + 1e-6)).max() < 1e-3


@pytest.mark.parametrize("order", [1, 2])
def test_deltas_are_librosas_edges_included(order: int):
    lengths = [9, 10, 40]
    static = torch.randn(3, 40, 5, generator=torch.Generator().manual_seed(0))
    ours = deltas(static, torch.tensor(lengths), order)
    for i, length in enumerate(lengths):
        expected = librosa.feature.delta(static[i, :length].numpy(), order=order, axis=0)
        assert np.abs(ours[i, :length].numpy() - expected).max() < 1e-5


@pytest.mark.parametrize("order", [1, 2])
def test_deltas_of_fewer_than_9_frames_use_the_widest_odd_window_that_fits(order: int):
    for length in range(1, 9):
        static = torch.randn(1, length, 5, generator=torch.Generator().manual_seed(length))
        ours = deltas(static, torch.tensor([length]), order)[0].numpy()
        width = length - 1 + length % 2
        if width < 3:
            assert np.array_equal(ours, np.zeros_like(ours))
        else:
            expected = librosa.feature.delta(static[0].numpy(), order=order, width=width, axis=0)
            assert np.abs(ours - expected).max() < 1e-5


@pytest.mark.parametrize(
    ("feature_type", "delta_order", "cmvn"),
    [
        ("mel", 1, "utterance"),
        ("fbank", 2, "utterance"),
        ("fbank", 2, "fixed"),
        ("fbank", 2, "level"),
        ("mel", 1, "speaker"),
        ("mel", 0, "none"),
    ],
)
def test_the_batch_does_not_change_the_features_of_an_utterance(feature_type, delta_order, cmvn: Cmvn):
    waves = [torch.from_numpy(speechlike(n, seed=n)) for n in (30_001, 1, 900, 16_000, 399, 1_600, 70_000)]
    options = {"feature_type": feature_type, "delta_order": delta_order, "cmvn": cmvn}
    features, lengths = extract_features_batch(waves, **options)
    for i, wave in enumerate(waves):
        alone = extract_features(wave, **options)
        assert alone.shape == (num_frames(len(wave), feature_type), feature_size(delta_order))
        assert lengths[i] == len(alone)
        assert torch.allclose(features[i, : lengths[i]], alone, rtol=0, atol=1e-5 if lengths[i] > 3 else 1e-3)
        assert not features[i, lengths[i] :].any()


@pytest.mark.parametrize("cmvn", ["utterance", "level", "fixed"])
def test_features_have_the_gradients_of_finite_differences_beside_silence_too(cmvn: Cmvn) -> None:
    generator = torch.Generator().manual_seed(0)
    wave = torch.from_numpy(speechlike(9_000))
    wave[2_000:4_000] = 0
    with torch.inference_mode():  # what is kept of it must not stand in the way
        features = extract_features(wave, pitch=True, cmvn=cmvn)
    weights = torch.randn(features.shape, generator=generator)
    weights[:, 160:] = 0  # a pitch jumps

    def projected(wave: torch.Tensor) -> torch.Tensor:
        return (weights.double() * extract_features(wave, pitch=True, cmvn=cmvn).double()).sum()

    wave.requires_grad_()
    (gradient,) = torch.autograd.grad(projected(wave), wave)
    assert gradient.isfinite().all()
    wave = wave.detach()
    direction = wave * torch.randn(9_000, generator=generator).sign()
    step = 1e-3 * direction
    expected = (projected(wave + step) - projected(wave - step)) / 2e-3
    assert (gradient.double() * direction).sum() == pytest.approx(float(expected), rel=0.02)
    (gradient,) = torch.autograd.grad(extract_features(wave.requires_grad_(), pitch=True, cmvn=cmvn).sum(), wave)
    assert gradient.isfinite().all()
    for num_samples in (100, 3_000):
        silence = torch.zeros(num_samples, requires_grad=True)
        (gradient,) = torch.autograd.grad(extract_features(silence, pitch=True, cmvn=cmvn).sum(), silence)
        assert gradient.isfinite().all()


def test_autocast_does_not_change_features() -> None:
    wave = torch.from_numpy(speechlike(9_000))
    features = extract_features(wave, pitch=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(extract_features(wave, pitch=True), features)


def test_cmvn_gives_mean_0_and_population_standard_deviation_1():
    features = extract_features(torch.from_numpy(speechlike(40_000)), delta_order=2)
    assert features.mean(dim=0).abs().max() < 1e-5
    assert (features.std(dim=0, correction=0) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("num_samples", [1, 199, 200, 1_599, 100_000])
def test_digital_silence_stays_silent_and_finite(num_samples: int):
    assert extract_features(torch.zeros(num_samples), delta_order=2).abs().max() < 0.02


@pytest.mark.parametrize("cmvn", ["level", "fixed"])
@pytest.mark.parametrize("feature_type", ["mel", "fbank"])
def test_constants_normalise_about_as_much_and_only_level_forgets_how_loud_a_recording_is(
    feature_type: FeatureType, cmvn: Cmvn
) -> None:
    wave = torch.from_numpy(speechlike(40_000))
    made, quieter = (
        extract_features(part, feature_type=feature_type, delta_order=2, cmvn=cmvn) for part in (wave, 0.1 * wave)
    )
    for order, features in enumerate(made.split(80, dim=1)):
        assert features.mean().abs() < 2, order
        assert 0.2 < features.std() < 2, order
    difference = made - quieter
    if cmvn == "level":
        assert difference.abs().max() < 1e-3
    else:
        assert difference[:, :80].mean() == pytest.approx(np.log(100) / 4, rel=0.1)  # of power, in deviations
        assert difference[:, 80:].abs().mean() < 0.1


def test_of_one_level_are_quiet_recordings_too_but_silence_is_not_raised() -> None:
    """A quiet recording must not lose contrast in the floor of the logarithm."""
    wave = torch.from_numpy(speechlike(40_000)) * torch.linspace(1, 1e-3, 40_000)
    made, quieter = (extract_features(part, cmvn="level") for part in (wave, 0.01 * wave))
    assert (made - quieter).abs().max() < 1e-3
    silent = [extract_features(torch.full((num_samples,), 1e-6), cmvn="level") for num_samples in (1, 40_000)]
    assert all(features.isfinite().all() and features[:, :80].mean() < -1 for features in silent)


def test_a_channel_of_speech_is_scaled_not_its_loudness():
    wave = torch.from_numpy(speechlike(40_000))
    loud, quiet = extract_features(wave), extract_features(0.5 * wave)
    assert (loud - quiet).abs().mean() < 0.02
