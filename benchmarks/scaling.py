"""The cost model of `ctal.costs`: fitted on some measured steps and tried on others; and what follows for GPUs.

`scaling` measures, on this machine. `outlook` only computes, from the constants in `ctal.costs`, so that its tables in
docs/scaling.md are the same wherever it runs.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from scipy.optimize import lsq_linear

from benchmarks.harness import Limits, Report, Spread, Table, is_timed, measure_limits, say, significant
from benchmarks.pretraining_step import Parts, Precision, Row, measure, positions_of
from benchmarks.samples import librispeech_like_seconds, masked_batch, write_store
from ctal import CtalConfig, CtalFeatureExtractor, CtalProcessor
from ctal.batching import Corpus, Microbatch
from ctal.costs import (
    CPU,
    FRAMES_A_SECOND,
    GPUS,
    LOADED,
    STORED_BYTES,
    Machine,
    Positions,
    StepSeconds,
    Weights,
    activation_bytes,
    communicated_bytes,
    count_weights,
    expected_positions,
    launches,
    pretraining_operations,
    state_bytes,
    step_seconds,
    update_bytes,
)
from ctal.pretrain import load_tokenizer, make_dataset
from ctal.recipes import MODEL_DEFAULTS, PRETRAINING, PretrainConfig, make_config
from ctal.store import Store
from ctal.stored_features import write_features

DOCUMENT = "scaling.md"

# Measured ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A step to be timed."""

    size: str
    seconds: tuple[float, ...]
    """Of each utterance."""
    frame_stack: int = 1
    is_held_out: bool = False
    """The model is tried on it, not fitted."""

    def row(self, precision: Precision) -> Row:
        joined = f", {self.frame_stack} frames joined" if self.frame_stack > 1 else ""
        name = f"`{self.size}`, {len(self.seconds)} × {self.seconds[0]:g} s{joined}, {precision}"
        return Row(name, True, self.seconds, precision=precision, frame_stack=self.frame_stack, has_memory=False)


POINTS = (
    Point("mini", (2.0,) * 12),
    Point("mini", (12.0,) * 4),
    Point("mini", (12.0,) * 4, frame_stack=4),
    Point("mini", (37.5,), is_held_out=True),
    Point("tiny", (2.0,) * 6),
    Point("tiny", (12.0,) * 2),
    Point("tiny", (5.0,) * 4, frame_stack=2),
    Point("tiny", (37.5,), is_held_out=True),
    Point("base", (2.0,) * 6, is_held_out=True),
    Point("base", (12.0,) * 2, is_held_out=True),
)
QUICK_POINTS = (
    Point("nano", (0.5,) * 2),
    Point("nano", (2.0,) * 3),
    Point("nano", (1.0,) * 4, frame_stack=2),
    Point("nano", (5.0,), is_held_out=True),
)


@dataclass(frozen=True)
class Timed:
    """A step that was timed."""

    point: Point
    name: str
    precision: Precision
    operations: float
    weights: Weights
    parts: Sequence[Parts]
    """Of every round."""

    @property
    def seconds(self) -> Spread:
        return Spread.of(map(sum, self.parts))

    @property
    def update(self) -> float:
        return Spread.of(each.update for each in self.parts).median

    @property
    def passes(self) -> float:
        return Spread.of(each.forward + each.backward for each in self.parts).median


def fit(timed: Sequence[Timed], limits: Limits) -> Machine:
    """The constants with which the model errs least, relative to what was measured, on points that are not held out.

    The bandwidth is that of all updates together; shares, at most 1, and launches share out the passes.
    """
    fitted = [each for each in timed if not each.point.is_held_out]
    bandwidth = sum(update_bytes(each.weights) for each in fitted) / sum(each.update for each in fitted)
    precisions: list[Precision] = list(dict.fromkeys(each.precision for each in fitted))
    rows = [
        [
            *(each.operations / limits.of(name) if name == each.precision else 0.0 for name in precisions),
            launches(each.weights, each.precision),
        ]
        for each in fitted
    ]
    seconds = np.array([each.passes for each in fitted])
    least = [1.0] * len(precisions) + [0.0]
    found = lsq_linear(np.array(rows) / seconds[:, None], np.ones(len(rows)), bounds=(least, np.inf)).x
    return Machine(
        "this machine",
        peaks={name: limits.of(name) for name in precisions},
        shares={name: 1 / float(each) for name, each in zip(precisions, found[:-1], strict=True)},
        bandwidth=bandwidth,
        launch=float(found[-1]),
        is_asynchronous=False,
    )


def time_steps(points: Sequence[Point], rounds: int, quick: bool) -> list[Timed]:
    precisions = [each for each in get_args(Precision) if is_timed(each, quick)]
    timed = []
    for size, group in groupby(points, key=lambda point: point.size):
        rows = {each.row(precision): each for each in group for precision in precisions}
        _, _, parts = measure(size, list(rows), rounds)
        for row, point in rows.items():
            config = row.config(size)
            operations = pretraining_operations(config, positions_of(config, masked_batch(row.seconds, config)))
            weights = count_weights(config)
            timed.append(Timed(point, row.name, row.precision, operations, weights, parts[row]))
    return timed


def error(machine: Machine, timed: Timed) -> float:
    """Of the model's seconds, relative to the measured ones."""
    model = step_seconds(machine, timed.weights, timed.operations, timed.precision)
    return model.total / timed.seconds.median - 1


def loading_rates(quick: bool) -> dict[str, float]:
    """Seconds of audio that one core makes ready for the model in a second, by what is stored of it."""
    lengths = librispeech_like_seconds(2 if quick else 12)
    batch = Microbatch(0, tuple(range(len(lengths))))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rates = {}
    config = make_config(PretrainConfig, {"cache_megabytes": 0})  # it is asked several times
    with tempfile.TemporaryDirectory() as made_up:
        folder = Path(made_up)
        write_store(folder, lengths)
        store, tokenizer = Store(folder / "store"), load_tokenizer(folder / "tokenizer")
        whole = CtalFeatureExtractor()
        contenders = {
            "FLAC": whole,
            "16-bit features": whole,
            "16-bit log-mel": CtalFeatureExtractor(delta_order=0),
        }
        for name, extractor in contenders.items():
            if name != "FLAC":
                write_features(store, extractor.analysis, extractor.features, workers=1)
            processor = CtalProcessor(extractor, tokenizer)
            dataset = make_dataset(Corpus([store]), processor, config, max_frames=extractor.max_frames, seed=0)
            seconds = []
            for _ in range(3):
                began = time.perf_counter()
                dataset[batch]
                seconds.append(time.perf_counter() - began)
            rates[name] = sum(lengths) / min(seconds)
            say(f"  loading {name}: {rates[name]:.0f} audio s/s")
    torch.set_num_threads(threads)
    return rates


def main(quick: bool) -> Report:
    """Steps of mini and tiny to fit, base and long utterances to try; `quick`: nano."""
    report = Report("scaling", document=DOCUMENT)
    limits = measure_limits(quick)
    timed = time_steps(QUICK_POINTS if quick else POINTS, 2, quick)
    limits = limits.better(measure_limits(quick))
    machine = fit(timed, limits)
    lines = []
    for each in timed:
        model = step_seconds(machine, each.weights, each.operations, each.precision)
        kind = "tried" if each.point.is_held_out else "fitted"
        error_now = f"{100 * error(machine, each):+.0f} %"
        lines.append((each.name, kind, str(each.seconds), significant(model.total), error_now))
    columns = ("a step of pre-training", "", "measured, s", "model, s", "error")
    report.tables.append(Table("The model beside measured steps", columns, lines))
    rates = loading_rates(quick)
    rows = [(name, significant(STORED_BYTES[name]), significant(rate)) for name, rate in rates.items()]
    columns = ("stored", "bytes a second of audio", "audio s/s of one core")
    report.tables.append(Table("Making batches of LibriSpeech's lengths, masks included", columns, rows))
    errors = {
        kind: [abs(error(machine, each)) for each in timed if each.point.is_held_out == is_held_out]
        for kind, is_held_out in (("fitted", False), ("tried", True))
    }
    shares = " and ".join(f"{100 * share:.0f} % ({name})" for name, share in machine.shares.items())
    report.notes += [
        *(
            f"mean error of the {len(each)} points {kind}: {100 * np.mean(each):.0f} %, at most {100 * max(each):.0f} %"
            for kind, each in errors.items()
        ),
        f"the machine's own limits in the same run: {limits}",
        f"fitted: {shares} of these products, {machine.bandwidth / 1e9:.1f} GB/s in clipping and AdamW, "
        f"{1e6 * machine.launch:.0f} µs a launch",
        "medians of the rounds, least and most in brackets",
    ]
    report.measured = {
        "limits": limits._asdict(),
        "fitted": {"shares": machine.shares, "bandwidth": machine.bandwidth, "launch": machine.launch},
        "steps": {each.name: [part._asdict() for part in each.parts] for each in timed},
        "loading": rates,
    }
    return report


# Computed ---------------------------------------------------------------------------------------------------------

SIZES = ("tiny", "base", "large")
LIBRISPEECH_HOURS = 960.9
MANY_HOURS = 100_000
FULL_SECONDS = 600.0
"""Of audio a step and GPU, of which no size leaves the GPU idle."""
CORES_A_GPU = 16
PLAN_STEPS = 1200
"""Of the pre-training of a plan like `paper-fusion`, on the demo corpus."""
DEMO_LENGTH = 3.5
"""Seconds of an utterance."""

_LENGTHS = librispeech_like_seconds(500)
"""Seconds of each utterance."""
_MEAN_SECONDS = float(np.mean(_LENGTHS))


@dataclass(frozen=True)
class Size:
    """What is computed of a size, in bf16 and for LibriSpeech's lengths."""

    name: str
    config: CtalConfig
    weights: Weights
    positions: Sequence[Positions]
    """Of the utterances of a sample."""

    @classmethod
    def of(cls, name: str) -> Size:
        config = CtalConfig.of_size(name)
        masking = make_config(PretrainConfig, PRETRAINING[name])
        positions = [expected_positions(config, each, masking) for each in _LENGTHS]
        return cls(name, config, count_weights(config), positions)

    @cached_property
    def operations(self) -> float:
        """A second of audio."""
        return pretraining_operations(self.config, self.positions) / sum(_LENGTHS)

    @cached_property
    def defined_operations(self) -> float:
        """Likewise, with every layer and head on every position."""
        whole = [each._replace(predicted_tokens=each.tokens, predicted_frames=each.frames) for each in self.positions]
        return pretraining_operations(self.config, whole) / sum(_LENGTHS)

    def step(self, machine: Machine, seconds: float, precision: Precision = "bf16", devices: int = 1) -> StepSeconds:
        """`seconds` of audio on each of `devices`, under DDP."""
        return step_seconds(machine, self.weights, seconds * self.operations, precision, devices=devices)


def outlook(quick: bool) -> Report:
    """Tables from the constants alone; `quick` changes nothing of them."""
    sizes = [Size.of(name) for name in SIZES]
    report = Report("outlook", document=DOCUMENT, is_computed=True)
    report.tables = [costs_table(sizes), passes_table(sizes), one_gpu_table(sizes), many_hours_table(sizes)]
    gpu = GPUS["h200"]
    report.notes += [
        f"an H200: matrix products reach {gpu.peaks['bf16'] / 1e12:.0f} Tflop/s in bf16 and "
        f"{gpu.peaks['fp32'] / 1e12:.0f} in fp32, of which forward and backward reach "
        f"{100 * gpu.shares['bf16']:.0f} and {100 * gpu.shares['fp32']:.0f} %, clipping and AdamW move "
        f"{gpu.bandwidth / 1e12:.1f} TB/s, and a launch takes {1e6 * gpu.launch:.0f} µs, as measured on one; several, "
        "and the H100, are computed",
        f"a core makes batches of {LOADED['FLAC']:,.0f} audio s/s from FLAC, of {LOADED['16-bit log-mel']:,.0f} from "
        "16-bit log-mel",
        f"{MANY_HOURS:,} hours are "
        + ", ".join(f"{MANY_HOURS * 3600 * each / 1e12:.1f} TB of {name}" for name, each in STORED_BYTES.items()),
        f"the pre-training of `paper-fusion` ({PLAN_STEPS:,} steps of `mini` on the demo corpus) on the CPU, without "
        f"loading and validation: {plan_minutes():.1f} min",
    ]
    return report


def plan_minutes() -> float:
    """Of those steps, in bf16 on one core."""
    config = CtalConfig.of_size("mini", vocab_size=2000, **MODEL_DEFAULTS["mini"])
    positions = expected_positions(config, DEMO_LENGTH, make_config(PretrainConfig, PRETRAINING["mini"]))
    operations = pretraining_operations(config, [positions]) * recipe_seconds() / DEMO_LENGTH
    return PLAN_STEPS * step_seconds(CPU, count_weights(config), operations, "bf16").total / 60


def costs_table(sizes: Sequence[Size]) -> Table:
    """Operations, memory and bytes."""
    columns = (
        *(
            "",
            "weights, million",
            "Mflop a frame",
            "Mflop a token",
            "Gflop a second of audio",
            "as the model is defined",
        ),
        *("weights, gradients, moments, GB", "kept for the backward pass, MB a second of audio"),
        *("clipping and AdamW move, GB", "DDP on 8 and on 64 sends, GB a step", "FSDP2"),
    )
    rows = []
    for size in sizes:
        positions = size.positions
        tokens, frames = (sum(getattr(each, name) for each in positions) for name in ("tokens", "frames"))
        # What the words cost is what is saved without them.
        wordless = [each._replace(tokens=0.0, predicted_tokens=0.0) for each in positions]
        of_frames = pretraining_operations(size.config, wordless)
        of_tokens = pretraining_operations(size.config, positions) - of_frames
        kept = activation_bytes(size.config, positions, "bf16")
        ddp, fsdp = (
            [communicated_bytes(size.weights, devices, sharded=sharded) / 1e9 for devices in (8, 64)]
            for sharded in (False, True)
        )
        rows.append(
            (
                f"`{size.name}`",
                significant(size.weights.total / 1e6),
                significant(of_frames / frames / 1e6),
                significant(of_tokens / tokens / 1e6),
                significant(size.operations / 1e9),
                significant(size.defined_operations / 1e9),
                significant(state_bytes(size.weights) / 1e9),
                significant(kept / sum(_LENGTHS) / 1e6),
                significant(update_bytes(size.weights) / 1e9),
                " and ".join(map(significant, ddp)),
                " and ".join(map(significant, fsdp)),
            )
        )
    return Table("What a step costs, forward and backward, bf16", columns, rows)


def recipe_seconds() -> float:
    """Of audio in a step of the paper's recipe."""
    return make_config(PretrainConfig).batch_frames / FRAMES_A_SECOND


def passes_table(sizes: Sequence[Size]) -> Table:
    """LibriSpeech-960 by the recipe."""
    steps, each = make_config(PretrainConfig).steps, recipe_seconds()
    audio_hours = steps * each / 3600
    contenders: list[tuple[str, Machine, Precision, float]] = [
        (f"{CPU.name}, fp32", CPU, "fp32", each),
        (f"{CPU.name}, bf16", CPU, "bf16", each),
        ("H100, fp32", GPUS["h100"], "fp32", each),
        ("H100, bf16", GPUS["h100"], "bf16", each),
        ("H200, bf16", GPUS["h200"], "bf16", each),
        (f"H200, bf16, steps of {FULL_SECONDS:g} s", GPUS["h200"], "bf16", FULL_SECONDS),
    ]
    rows = []
    for name, machine, precision, seconds in contenders:
        totals = [size.step(machine, seconds, precision).total / seconds * audio_hours for size in sizes]
        hours = [significant(total * LIBRISPEECH_HOURS / audio_hours) for total in totals]
        rows.append((name, *hours, *map(significant, totals)))
    names = [f"`{size.name}`" for size in sizes]
    columns = ("", *(f"{name}: hours a pass" for name in names), *(f"{name}: hours the recipe" for name in names))
    caption = (
        f"LibriSpeech-960 ({LIBRISPEECH_HOURS:g} h); the recipe is {steps:,} steps of {each:g} s: "
        f"{audio_hours:,.0f} h, {audio_hours / LIBRISPEECH_HOURS:.1f} passes"
    )
    return Table(caption, columns, rows)


def one_gpu_table(sizes: Sequence[Size]) -> Table:
    """What one H200 takes, and from which length of a step on it is not waiting."""
    columns = (
        *(
            "",
            "audio s/s at most",
            "counted as defined",
            "utterances a second",
            "cores for FLAC",
            "cores for log-mel",
        ),
        *(
            "the recipe's step: forward and backward, ms",
            "update, ms",
            "host, ms",
            "audio s/s",
            "full from, s of audio a step",
        ),
    )
    gpu, rows = GPUS["h200"], []
    for size in sizes:
        rate = 1 / size.step(gpu, 1.0).passes
        step = size.step(gpu, recipe_seconds())
        rows.append(
            (
                f"`{size.name}`",
                significant(rate),
                significant(rate * size.operations / size.defined_operations),
                significant(rate / _MEAN_SECONDS),
                significant(rate / LOADED["FLAC"]),
                significant(rate / LOADED["16-bit log-mel"]),
                *(significant(1000 * part) for part in (step.passes, step.update, step.host)),
                significant(recipe_seconds() / step.total),
                significant(max(0.0, step.host - step.update) * rate),
            )
        )
    return Table("One H200, bf16", columns, rows)


def many_hours_table(sizes: Sequence[Size]) -> Table:
    """A pass of very many hours on 8 and on 64 GPUs."""
    columns = (
        *("H200s", "s of audio a step and GPU", "hours a pass", "GPU hours", "forward and backward, ms", "update, ms"),
        *("communication not hidden, ms", "host, ms", "cores a GPU, FLAC", "FLAC, MB/s"),
        f"hours with FLAC on {CORES_A_GPU} cores a GPU",
    )
    gpu, rows = GPUS["h200"], []
    for size in sizes:
        for devices in (8, 64):
            for seconds in (recipe_seconds(), FULL_SECONDS):
                step = size.step(gpu, seconds, devices=devices)
                rate = devices * seconds / step.total
                hours = MANY_HOURS / rate
                loaded = min(rate, devices * CORES_A_GPU * LOADED["FLAC"])
                rows.append(
                    (
                        f"`{size.name}`, {devices}",
                        significant(seconds),
                        significant(hours),
                        significant(hours * devices),
                        *(significant(1000 * part) for part in step[:-1]),
                        significant(rate / devices / LOADED["FLAC"]),
                        significant(rate * STORED_BYTES["FLAC"] / 1e6),
                        significant(MANY_HOURS / loaded),
                    )
                )
    return Table(f"A pass of {MANY_HOURS:,} hours, bf16, DDP", columns, rows)
