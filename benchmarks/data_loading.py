"""From a store to batches, with nobody training: ours beside one .npy file an utterance and a CSV of them.

Both draw the same utterances, masks and batches in torch's `DataLoader` with as many workers. What differs is how
features are read, and what crosses from worker to trainer: theirs padded, in float32 as the files have them, with the
labels of all frames, a tensor each; ours without padding, in float16, with the labels of masked frames alone, in one
piece. The trainer does nothing but take the batches; what `mini` would consume stands beside them.
"""

from __future__ import annotations

import csv
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.harness import Check, Report, Spread, Table, alternate, significant, times_faster
from benchmarks.pretraining_step import OURS, Trainers
from benchmarks.samples import librispeech_like_seconds, masked_batch, padded, without_padding, write_store
from ctal import CtalFeatureExtractor, CtalProcessor
from ctal.audio import load_audio
from ctal.batching import (
    PREFETCHED,
    Corpus,
    Microbatch,
    PretrainingDataset,
    StepPlan,
    load,
    masked_utterance,
    seeded_generator,
)
from ctal.objective import frame_counts
from ctal.pretrain import load_tokenizer, make_dataset
from ctal.recipes import MODEL_DEFAULTS, PretrainConfig, make_config
from ctal.store import Store
from ctal.stored_features import write_features as store_features

Batch = dict[str, Tensor]
Reader = Callable[[Iterator[Microbatch]], Generator[Batch]]
"""Batches in the order of their keys."""

_WORKERS = 2
_WARM_EPOCHS = 2
"""The first includes the start of the workers."""
_KEPT_EPOCHS = 4
"""A worker keeps what it has made itself: before the fourth epoch, with two workers, seven eighths of everything."""


class FilePerUtterance(Dataset):
    """Padded batches of features from a .npy file each, named in a CSV with the transcripts."""

    def __init__(self, table: Path, like: PretrainingDataset) -> None:
        """Tokens and masks are those that `like` gives the same utterance."""
        self.like = like
        with table.open(newline="") as file:
            self.rows = list(csv.DictReader(file))

    def __getitem__(self, microbatch: Microbatch) -> Batch:
        return padded([self._utterance(row, microbatch.epoch) for row in microbatch.rows])

    def _utterance(self, row: int, epoch: int) -> dict[str, Tensor]:
        name, like = self.rows[row], self.like
        generator = seeded_generator(like.seed, epoch, name["id"])
        features = torch.from_numpy(np.load(name["path"]))
        return masked_utterance(
            torch.tensor(like.encode(name["text"])),
            features,
            like.masking,
            vocab_size=like.vocab_size,
            mask_id=like.mask_id,
            special_ids=like.special_ids,
            generator=generator,
        )


def write_features(folder: Path, dataset: PretrainingDataset) -> Path:
    """A .npy file an utterance, float32 as the authors have them; returns the CSV of them."""
    folder.mkdir()
    table = folder / "features.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("id", "path", "text"))
        for row in range(len(dataset.corpus)):
            stored = dataset.corpus.read(row)
            path = folder / f"{row:05d}.npy"
            np.save(path, dataset.features.extract(load_audio(stored.audio, stored.id)).numpy())
            writer.writerow((stored.id, path, stored.text))
    return table


def forget(folder: Path) -> None:
    """Drops the files in a folder from the system's cache, so that they are read from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)  # what is not written yet is not dropped
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def read_plainly(dataset: Dataset, order: Iterator[Microbatch]) -> Generator[Batch]:
    """Batches through a `DataLoader` as anyone writes it: they cross as the data set makes them."""
    yield from DataLoader(
        dataset,
        batch_size=None,
        sampler=order,  # type: ignore[arg-type]  # as in `load`
        num_workers=_WORKERS,
        prefetch_factor=PREFETCHED,
        pin_memory=torch.cuda.is_available(),
    )


def seconds_of_epoch(read: Reader, plan: StepPlan, epochs: int, cold: Path | None = None) -> float:
    """What the last of `epochs` takes, one loader through; a single epoch includes the start of the workers."""
    if cold:
        forget(cold)
    steps = [[Microbatch(epoch, tuple(rows.tolist())) for rows in plan.steps(epoch)] for epoch in range(epochs)]
    before_last = sum(map(len, steps[:-1]))
    began = time.perf_counter()
    with closing(read(chain.from_iterable(steps))) as batches:
        for number, _ in enumerate(batches, 1):
            if number == before_last:
                began = time.perf_counter()
        return time.perf_counter() - began


def _differences(plan: StepPlan, read: Reader, plainly: Reader) -> Iterator[float]:
    """Of each tensor of the first batch: what a model would be given either way."""
    key = Microbatch(0, tuple(next(iter(plan.steps(0))).tolist()))
    (mine,), (whole,) = (list(each(iter([key]))) for each in (read, plainly))
    theirs = without_padding(whole)
    for name, value in mine.items():
        assert value.shape == theirs[name].shape, name
        yield float((value.float() - theirs[name].to(value.dtype).float()).abs().max())


def consumption(size: str, frame_stack: int, seconds: Sequence[float], steps: int) -> float:
    """Audio seconds a second that training takes, in fp32."""
    trainers, row = Trainers(size), replace(OURS, frame_stack=frame_stack, seconds=tuple(seconds))
    trainers.prepare(row)
    batch = masked_batch(row.seconds, row.config(size))
    for _ in range(steps):
        trainers.step(row, batch)
    return sum(row.seconds) / Spread.of(sum(parts) for parts in trainers.parts[row]).median


def main(quick: bool) -> Report:
    """Recordings as long as LibriSpeech's, in a folder that is deleted afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        return _measure(Path(folder), quick)


def _measure(folder: Path, quick: bool) -> Report:
    report = Report("data_loading")
    count, scale, rounds, size = (16, 0.1, 1, "nano") if quick else (160, 1.0, 3, "mini")
    write_store(folder, [scale * each for each in librispeech_like_seconds(count)])
    store = folder / "store"
    processor = CtalProcessor(CtalFeatureExtractor(), load_tokenizer(folder / "tokenizer"))
    max_frames = processor.feature_extractor.max_frames

    analysed = folder / "analysed" / "store"
    shutil.copytree(store, analysed)
    extractor = processor.feature_extractor
    kept = store_features(Store(analysed), extractor.analysis, extractor.features, workers=1)

    def ours(cache_megabytes: int, store: Path = store) -> PretrainingDataset:
        config = make_config(PretrainConfig, {"cache_megabytes": cache_megabytes})
        return make_dataset(Corpus([Store(store)]), processor, config, max_frames=max_frames, seed=0)

    corpus = Corpus([Store(store)])
    lengths = frame_counts(corpus, processor, max_frames)
    plan = StepPlan(np.arange(len(corpus)), lengths, corpus.shards, round(6000 * scale), seed=0)
    table = write_features(folder / "npy", ours(0))

    files = FilePerUtterance(table, ours(0))

    def read(cache_megabytes: int = 0, store: Path = store) -> Reader:
        return lambda order: load(ours(cache_megabytes, store), order, _WORKERS)

    baseline, plainly = "a .npy file an utterance and a CSV", partial(read_plainly, files)
    difference = max(_differences(plan, read(store=analysed), plainly))
    report.checks.append(Check("largest difference of a batch from that of the files, in float16", difference, 0))
    contenders: dict[str, Callable[[], float]] = {
        f"{baseline}, warm disk": partial(seconds_of_epoch, plainly, plan, _WARM_EPOCHS),
        "ours, from FLAC in the store, warm disk": partial(seconds_of_epoch, read(), plan, _WARM_EPOCHS),
        "ours, stored features, warm disk": partial(seconds_of_epoch, read(store=analysed), plan, _WARM_EPOCHS),
        f"ours, features kept in the workers' memory, epoch {_KEPT_EPOCHS}": partial(
            seconds_of_epoch, read(cache_megabytes=512), plan, _KEPT_EPOCHS
        ),
    }
    if hasattr(os, "posix_fadvise"):
        contenders |= {
            f"{baseline}, cold disk": partial(seconds_of_epoch, plainly, plan, 1, folder / "npy"),
            "ours, from FLAC in the store, cold disk": partial(seconds_of_epoch, read(), plan, 1, store),
            "ours, stored features, cold disk": partial(seconds_of_epoch, read(store=analysed), plan, 1, analysed),
        }
    seconds = alternate(contenders, rounds)
    audio = float(corpus.seconds.sum())
    stacks = (1, MODEL_DEFAULTS[size]["frame_stack"])
    needs = {stack: consumption(size, stack, corpus.seconds[:6].tolist(), 2 if quick else 5) for stack in stacks}
    rows = []
    for name, each in seconds.items():
        rate = Spread.of(audio / value for value in each)
        faster = str(times_faster(next(iter(seconds.values())), each))
        rows.append((name, str(rate), faster, *(significant(rate.median / need) for need in needs.values())))
    columns = (
        *("", "audio s/s", "times the first row"),
        *(f"times what `{size}` takes, {stack} frame{'s' * (stack > 1)} joined" for stack in stacks),
    )
    report.tables.append(Table(f"Batches of {audio / 60:.1f} min, {_WORKERS} workers", columns, rows))
    report.notes += [
        *(
            f"`{size}` with frame_stack {stack} trains at {significant(need)} audio s/s"
            for stack, need in needs.items()
        ),
        f"on disk: {_megabytes(folder / 'npy')} MB of .npy files, {_megabytes(store)} MB of store, and "
        f"{significant(kept.megabytes)} MB more with `ctal features`",
        "warm: the second epoch of a loader; cold: the first, with the start of its workers",
    ]
    report.measured = {"audio_seconds": audio, "seconds": seconds, "consumption": needs}
    return report


def _megabytes(folder: Path) -> str:
    return significant(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6)
