"""Embeddings of a folder of recordings, ours beside the authors' composition one recording at a time.

One by one in file order wastes nothing on padding, so it is the fairest baseline; with torch's fused attention (SDPA)
it is as fast as that composition gets today. An embedding is the mean of the last audio states over the frames, without
a transcript. Features are made beforehand, the same for all: they take a thousandth of real time. The weights are
random, so cosines say what a precision costs before training.

Every round takes another part of the recordings, so that each is encoded once by every contender.

Shape suffixes: R recordings, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baseline import AuthorsModel, copy_weights
from benchmarks.harness import Check, Report, Spread, Table, alternate, is_timed, say, significant, times_faster
from benchmarks.samples import librispeech_like_seconds, padded, speech_like
from ctal import CtalConfig, CtalForPreTraining
from ctal.audio import load_audio
from ctal.batching import collate
from ctal.costs import FRAMES_A_SECOND
from ctal.features import extract_features
from ctal.inference import BATCH_FRAMES, find_recordings, like_lengths
from ctal.precision import autocast, for_precision

COSINES = {"ours, fp32": 0.99999, "ours, bf16": 0.9999, "ours, int8": 0.999}
"""The least cosine with the baseline's embedding, of any recording."""

_ROUNDS = 3
_RECORDINGS = 12
_NO_TEXT = (0, 2)
"""`<s></s>`."""


def made_up_features(seconds: Sequence[float]) -> list[Tensor]:
    """(T, 160) each, of speech-like noise."""
    return [extract_features(torch.from_numpy(speech_like(each, number))) for number, each in enumerate(seconds)]


def recorded_features(folder: Path, max_frames: int) -> list[Tensor]:
    """(T, 160) each, of the recordings in a folder in the order of their names, cut to `max_frames`."""
    recordings = find_recordings([folder])
    waves = (load_audio(Path(str(each.audio))) for each in recordings)
    return [extract_features(torch.from_numpy(wave))[:max_frames] for wave in waves]


def _utterances(features: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    return [{"input_ids": torch.tensor(_NO_TEXT), "input_features": each} for each in features]


def _means(states_BTD: Tensor, features: Sequence[Tensor]) -> list[Tensor]:
    return [states[: len(each)].float().mean(0) for states, each in zip(states_BTD, features, strict=True)]


@torch.inference_mode()
def authors_embeddings(model: AuthorsModel, batch_size: int, features: Sequence[Tensor]) -> Tensor:
    """(R, D), in file order, padded batches of `batch_size`."""
    found = []
    for start in range(0, len(features), batch_size):
        part = features[start : start + batch_size]
        found += _means(model.encode(**padded(_utterances(part))), part)
    return torch.stack(found)


@torch.inference_mode()
def our_embeddings(model: nn.Module, precision: str, features: Sequence[Tensor]) -> Tensor:
    """(R, D), the longest first, packed batches of as many frames as `ctal.pipeline` takes."""
    found: dict[int, Tensor] = {}
    for batch in like_lengths([len(each) for each in features], BATCH_FRAMES["cpu"]):
        part = [features[number] for number in batch]
        with autocast(torch.device("cpu"), precision):
            states_BTD = model(**collate(_utterances(part))).audio_hidden_state
        found.update(zip(batch, _means(states_BTD, part), strict=True))
    return torch.stack([found[number] for number in range(len(features))])


def main(quick: bool, audio: Path | None = None) -> Report:
    """Size base on the recordings in `audio`, or on made-up ones as long as LibriSpeech's; `quick`: nano, few."""
    report = Report("inference")
    size = "nano" if quick else "base"
    torch.manual_seed(0)
    ours = CtalForPreTraining(CtalConfig.of_size(size, audio_is_causal=True)).eval()
    authors = AuthorsModel(ours.config).eval()
    copy_weights(ours, authors)
    fused = AuthorsModel(ours.config, "sdpa").eval()
    fused.load_state_dict(authors.state_dict(), assign=True)
    scale = 0.1 if quick else 1.0
    if audio:
        features = recorded_features(audio, ours.config.audio.max_frames)
    else:
        lengths = librispeech_like_seconds(6 if quick else _RECORDINGS)
        features = made_up_features([scale * each for each in lengths])
    say(f"{len(features)} recordings, {sum(map(len, features)) / FRAMES_A_SECOND / 60:.1f} min")

    one_by_one = "authors' composition, one by one in file order"
    contenders: dict[str, Callable[[Sequence[Tensor]], Tensor]] = {
        one_by_one: partial(authors_embeddings, authors, 1),
        "authors' composition, padded batches of 8": partial(authors_embeddings, authors, 8),
        "the same with SDPA, one by one in file order": partial(authors_embeddings, fused, 1),
        "ours, fp32": partial(our_embeddings, ours.ctal, "fp32"),
        **({"ours, bf16": partial(our_embeddings, ours.ctal, "bf16")} if is_timed("bf16", quick) else {}),
        "ours, int8": partial(our_embeddings, for_precision(ours.ctal, "int8"), "int8"),
    }
    rounds = min(_ROUNDS, len(features))
    parts = [features[number::rounds] for number in range(rounds)]
    found: dict[str, list[Tensor]] = {name: [] for name in contenders}

    def encode_next(name: str) -> None:
        found[name].append(contenders[name](parts[len(found[name])]))

    for embed in contenders.values():  # the first call of anything is slow
        embed(features[:1])
    seconds = alternate({name: partial(encode_next, name) for name in contenders}, rounds)
    audio_seconds = [sum(map(len, part)) / FRAMES_A_SECOND for part in parts]
    rates = {
        name: [length / value for length, value in zip(audio_seconds, each, strict=True)]
        for name, each in seconds.items()
    }

    expected_RD = torch.cat(found[one_by_one])
    rows = []
    for name in contenders:
        embeddings_RD = torch.cat(found[name])
        cosine = float(F.cosine_similarity(embeddings_RD, expected_RD).min())
        centre_D = expected_RD.mean(0)
        centred = float(F.cosine_similarity(embeddings_RD - centre_D, expected_RD - centre_D).min())
        times = str(times_faster(seconds[one_by_one], seconds[name])) if name != one_by_one else "1"
        rows.append((name, str(Spread.of(rates[name])), times, f"{cosine:.6f}", f"{centred:.6f}"))
        if name in COSINES:
            report.checks.append(Check(f"{name}: least cosine with the baseline", cosine, COSINES[name], at_least=True))
        report.measured[name] = {"audio_seconds_per_second": rates[name], "cosine": cosine, "centred_cosine": centred}
    minutes = significant(sum(audio_seconds) / 60)
    source = "real recordings" if audio else "made-up recordings as long as LibriSpeech's"
    columns = ("", "audio s/s", "times the first row", "least cosine", "least cosine less the mean")
    report.tables.append(Table(f"Embeddings, `{size}`, {len(features)} {source}, {minutes} min", columns, rows))
    report.notes += [
        "medians over the parts of the recordings, one a round; random weights, no transcripts, causal as the baseline",
        "int8: `torch.ao.quantization.quantize_dynamic`, which torch has deprecated for torchao",
    ]
    return report
