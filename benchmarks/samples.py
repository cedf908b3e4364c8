"""Data as long as LibriSpeech's, made up here so that the benchmarks run anywhere.

What a step costs depends on lengths and masks alone, not on what is said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ctal import CtalConfig
from ctal.audio import SAMPLING_RATE
from ctal.batching import PADDING, masked_utterance, seeded_generator
from ctal.corpora import get_corpus
from ctal.costs import FRAMES_A_SECOND, TOKENS_A_SECOND
from ctal.masking import IGNORED
from ctal.pretrain import make_tokenizer
from ctal.recipes import PretrainConfig, make_config
from ctal.store import prepare_store
from ctal.text import SPECIAL_TOKENS

MIXED_SECONDS = (2.0, 9.0, 14.2, 15.4, 16.2, 17.0)
"""Six utterances as a random draw from LibriSpeech gives them: 73.8 s, 12.3 s on average."""
NEIGHBOURING_SECONDS = (12.0, 12.1, 12.2, 12.4, 12.5, 12.6)
"""As many seconds in a batch of neighbouring lengths. Batches of shorter and longer ones take more time on average,
since attention grows with the square of the length: this one favours the authors."""


def masked_batch(seconds: Sequence[float], config: CtalConfig, seed: int = 0) -> dict[str, Tensor]:
    """A padded, masked batch for pre-training, with normal features and random tokens."""
    generator = seeded_generator("benchmark", seed)
    masking, special = make_config(PretrainConfig), len(SPECIAL_TOKENS)
    utterances = []
    for length in seconds:
        count = max(1, round(length * TOKENS_A_SECOND))
        words = torch.randint(special, config.text.vocab_size, (count,), generator=generator).tolist()
        features = torch.randn(round(length * FRAMES_A_SECOND), config.audio.feature_size, generator=generator)
        ids = torch.tensor([config.text.bos_token_id, *words, config.text.eos_token_id])
        utterance = None
        # The authors leave out utterances without a masked token, and their loss is not a number without any.
        while utterance is None or not (utterance["labels"] != IGNORED).any():
            utterance = masked_utterance(
                ids,
                features,
                masking,
                vocab_size=config.text.vocab_size,
                mask_id=config.text.mask_token_id,
                special_ids=special,
                generator=generator,
            )
        utterances.append(utterance)
    return padded(utterances)


def padded(utterances: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """A batch as recipes commonly have it, which both models take: everything padded on the right to the longest."""
    columns = {name: [each[name] for each in utterances] for name in utterances[0]}
    columns["attention_mask"] = [torch.ones_like(each) for each in columns["input_ids"]]
    columns["feature_attention_mask"] = [torch.ones(len(each), dtype=torch.long) for each in columns["input_features"]]
    return {
        name: pad_sequence(values, batch_first=True, padding_value=PADDING.get(name, 0))
        for name, values in columns.items()
    }


def without_padding(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Such a batch as `ctal.batching.collate` makes it: frames one behind the other, labels of masked ones alone."""
    features = batch["input_features"][batch["feature_attention_mask"].bool()]
    return {**batch, "input_features": features, "feature_labels": batch["feature_labels"][batch["mask_time_indices"]]}


def librispeech_like_seconds(count: int, seed: int = 0) -> list[float]:
    """Lengths between 2 and 17 s, 12.3 s on average, long ones more frequent."""
    return (2 + 15 * np.random.default_rng(seed).beta(2.2, 1.0, count)).round(2).tolist()


_SYLLABLE = SAMPLING_RATE // 5


def speech_like(seconds: float, seed: int) -> np.ndarray:
    """(samples,) float32 at 16 kHz: noise whose spectrum falls as speech's does, in syllables with pauses."""
    rng = np.random.default_rng(seed)
    count = int(seconds * SAMPLING_RATE)
    spectrum = np.fft.rfft(rng.standard_normal(count))
    hz = np.fft.rfftfreq(count, 1 / SAMPLING_RATE)
    noise = np.fft.irfft(spectrum / (1 + hz / 500), count)
    corners = np.arange(0, count + _SYLLABLE, _SYLLABLE)
    syllables = np.interp(np.arange(count), corners, rng.uniform(0, 1, len(corners)))
    wave = noise * syllables**2
    return (0.3 * wave / np.abs(wave).max()).astype(np.float32)


_WORDS = (
    "the",
    "of",
    "and",
    "to",
    "in",
    "that",
    "he",
    "was",
    "his",
    "is",
    "with",
    "as",
    "had",
    "for",
    "at",
    "by",
    "on",
)


def write_recordings(folder: Path, seconds: Sequence[float]) -> list[Path]:
    """FLAC files, each with a transcript beside it, as `ctal prepare folder` takes them."""
    folder.mkdir(parents=True)
    paths = []
    for number, length in enumerate(seconds):
        path = folder / f"{number:04d}.flac"
        soundfile.write(path, speech_like(length, number), SAMPLING_RATE)
        words = np.random.default_rng(number).choice(_WORDS, round(2.7 * length))
        path.with_suffix(".txt").write_text(" ".join(words))
        paths.append(path)
    return paths


def write_store(folder: Path, seconds: Sequence[float]) -> None:
    """Recordings in `folder/recordings`, the store of them in `folder/store`, their tokenizer in `folder/tokenizer`."""
    write_recordings(folder / "recordings", seconds)
    store = folder / "store"
    prepare_store(get_corpus("folder").prepare(folder / "recordings"), store, corpus="made up", workers=1)
    make_tokenizer([store], folder / "tokenizer", 300)
