"""A step of pre-training: forward, backward, clipping and AdamW, ours beside the authors' recipe.

Rows of one kind train the same weights in one process, which takes a step when it is told to, so that each finds the
allocator as its own training leaves it. Peak memory is measured in a fresh process each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.baseline import Attention, AuthorsModel, compare, copy_weights
from benchmarks.harness import (
    CPU,
    Check,
    Limits,
    Report,
    Spread,
    Stopwatch,
    Table,
    alternate,
    available_memory,
    fresh_processes,
    is_timed,
    measure_limits,
    peak_memory,
    say,
    significant,
    times_faster,
)
from benchmarks.samples import MIXED_SECONDS, NEIGHBOURING_SECONDS, masked_batch
from ctal import CtalConfig, CtalForPreTraining
from ctal.costs import Positions, pretraining_operations
from ctal.masking import IGNORED
from ctal.packing import stack_mask
from ctal.precision import autocast
from ctal.processes import keep_freed_memory
from ctal.recipes import PretrainConfig, make_config
from ctal.training import parameter_groups

Precision = Literal["fp32", "bf16"]
Batch = Mapping[str, Tensor]

LOSS_LIMIT = 1e-5
GRADIENT_LIMIT = 1e-4
"""How far ours may be from the baseline in fp32, with equal weights and without dropout."""

_RECIPE = make_config(PretrainConfig)
_CHECK_SECONDS = (1.0, 3.5, 2.2)
_WARM_UP_SECONDS = (1.0,)


# Contenders -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One way to take a step."""

    name: str
    ours: bool
    seconds: tuple[float, ...] = MIXED_SECONDS
    """Length of each utterance."""
    attention: Attention = "eager"
    """Of the baseline; ours has one way."""
    attention_dropout: float = 0.0
    precision: Precision = "fp32"
    causal: bool = False
    """Of ours; the baseline always is."""
    frame_stack: int = 1
    gradient_checkpointing: bool = False
    """Of ours."""
    compile: bool = False
    """Of ours."""
    recorded: bool = False
    """Of ours: CUDA graphs."""
    has_memory: bool = True
    """Whether its peak memory is measured."""
    keeps_memory: bool | None = None
    """Whether memory that is freed is kept (`keep_freed_memory`); None: as a user has it, with ours alone."""
    once: bool = False
    """Timed after the others alone, when their processes have ended: it takes longest, or most memory."""

    @property
    def keeps(self) -> bool:
        return self.ours if self.keeps_memory is None else self.keeps_memory

    @property
    def process(self) -> tuple[object, ...]:
        """Rows that are alike in this share a process."""
        return self.ours, self.attention, self.keeps

    def scaled(self, scale: float) -> Row:
        """The same with utterances of other lengths."""
        return replace(self, seconds=tuple(scale * each for each in self.seconds))

    def config(self, size: str) -> CtalConfig:
        return CtalConfig.of_size(
            size,
            attention_probs_dropout_prob=self.attention_dropout,
            audio_is_causal=self.causal,
            frame_stack=self.frame_stack,
        )

    def build(self, size: str) -> nn.Module:
        config = self.config(size)
        if not self.ours:
            return AuthorsModel(config, self.attention)
        model = CtalForPreTraining(config)
        if self.gradient_checkpointing:
            model.activation_checkpointing_enable()
        if self.compile:
            model.compile_layers()
        if self.recorded:
            model.record_passes()
        return model


AUTHORS = Row("authors' recipe, neighbouring lengths", ours=False, seconds=NEIGHBOURING_SECONDS, attention_dropout=0.1)
"""The headline baseline: what the authors trained with."""
AUTHORS_RANDOM = Row("authors' recipe, random lengths", ours=False, attention_dropout=0.1, once=True)
FAIREST = Row(
    "the same model, neighbouring lengths, attention dropout 0 and SDPA",
    ours=False,
    seconds=NEIGHBOURING_SECONDS,
    attention="sdpa",
)
_KEEPING = ", keeping freed memory as ours does"
AUTHORS_KEEPING = replace(AUTHORS, name=AUTHORS.name + _KEEPING, keeps_memory=True, once=True)
FAIREST_KEEPING = replace(FAIREST, name=FAIREST.name + _KEEPING, keeps_memory=True, once=True)
OURS = Row("ours, fp32", ours=True)
OURS_CAUSAL = Row("ours, fp32, causal as the authors' model", ours=True, causal=True)
OURS_BF16 = Row("ours, bf16", ours=True, precision="bf16")
OURS_DROPOUT = Row("ours, fp32, attention dropout 0.1", ours=True, attention_dropout=0.1)
OURS_BF16_DROPOUT = Row("ours, bf16, attention dropout 0.1", ours=True, attention_dropout=0.1, precision="bf16")
_GIVING_BACK = ", giving freed memory back as theirs does"
OURS_GIVING_BACK = replace(OURS, name=OURS.name + _GIVING_BACK, keeps_memory=False)
OURS_BF16_GIVING_BACK = replace(OURS_BF16, name=OURS_BF16.name + _GIVING_BACK, keeps_memory=False)
ROWS = (AUTHORS, AUTHORS_RANDOM, FAIREST, OURS, OURS_BF16, OURS_DROPOUT, OURS_BF16_DROPOUT)
ALLOCATORS = (
    *(AUTHORS, AUTHORS_KEEPING, FAIREST, FAIREST_KEEPING),
    *(OURS, OURS_GIVING_BACK, OURS_BF16, OURS_BF16_GIVING_BACK),
)
STACKED = tuple(
    Row(f"ours, fp32, {stack} frames joined: not the same maths", ours=True, frame_stack=stack) for stack in (2, 4)
)


class Parts(NamedTuple):
    """Seconds of a step."""

    forward: float
    backward: float
    update: float
    """Clipping and the optimiser."""


def make_optimizer(model: nn.Module, ours: bool) -> torch.optim.Optimizer:
    """AdamW as `ctal.training` has it, or, for the baseline, a kernel an operation and tensor."""
    groups = parameter_groups(model, _RECIPE.weight_decay, lambda name: 1.0)
    return torch.optim.AdamW(groups, lr=_RECIPE.learning_rate, eps=_RECIPE.adam_epsilon, fused=ours, foreach=False)


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, precision: Precision) -> Parts:
    """One update of the weights, as the loop in `ctal.training` does it on one device."""
    device = batch["input_ids"].device
    watch = Stopwatch(device)
    with autocast(device, precision):
        loss = model(**batch).loss
    watch.mark()
    loss.backward()
    watch.mark()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), _RECIPE.max_grad_norm)
    if not torch.isfinite(norm):
        raise RuntimeError("the gradient is not finite: such a step is not worth timing")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    watch.mark()
    return Parts(*watch.spans())


def on_device(batch: Batch, device: torch.device) -> Batch:
    return {name: values.to(device) for name, values in batch.items()}


class Trainers:
    """Models of one size for any row; those with parameters of the same shapes share them and their optimiser."""

    def __init__(self, size: str, device: torch.device = CPU) -> None:
        self.size, self.device = size, device
        self._models: dict[Row, nn.Module] = {}
        self._families: dict[tuple[bool, int], tuple[nn.Module, torch.optim.Optimizer]] = {}
        self.parts: dict[Row, list[Parts]] = {}

    def prepare(self, row: Row) -> None:
        """Makes the row's model, and takes a short step, so that no first time of anything is measured."""
        with self.device:
            model = row.build(self.size)
        family = (row.ours, row.frame_stack)
        if family in self._families:
            model.load_state_dict(self._families[family][0].state_dict(keep_vars=True), assign=True)
        else:
            self._families[family] = model, make_optimizer(model, row.ours)
        self._models[row] = model
        self.step(row, self.batch(replace(row, seconds=_WARM_UP_SECONDS)))
        self.parts[row] = []

    def step(self, row: Row, batch: Batch) -> None:
        _, optimizer = self._families[row.ours, row.frame_stack]
        self.parts.setdefault(row, []).append(take_step(self._models[row], optimizer, batch, row.precision))

    def batch(self, row: Row) -> Batch:
        """What the row trains on, on the device."""
        return on_device(masked_batch(row.seconds, row.config(self.size)), self.device)


def train_once(row: Row, size: str) -> None:
    """A step in a process of its own; a short one goes before, since the optimiser has no moments before it."""
    if row.keeps:
        keep_freed_memory({})
    trainers = Trainers(size)
    trainers.prepare(row)
    trainers.step(row, trainers.batch(row))


class Contenders:
    """Rows that share a `process`, which takes a step of one of them when it is told to."""

    def __init__(self, size: str, rows: Sequence[Row]) -> None:
        self._pool = ProcessPoolExecutor(1, fresh_processes(), self._prepare, (size, rows))

    def __enter__(self) -> Contenders:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()

    def step(self, row: Row) -> Parts:
        return self._pool.submit(self._step, row).result()

    _trainers: ClassVar[Trainers]
    """In the process."""

    @classmethod
    def _prepare(cls, size: str, rows: Sequence[Row]) -> None:
        cls._trainers = Trainers(size)
        if rows[0].keeps:
            keep_freed_memory({})
        for row in rows:
            cls._trainers.prepare(row)
            if row.keeps:  # memory, which has to be had once
                cls._trainers.step(row, cls._trainers.batch(row))

    @classmethod
    def _step(cls, row: Row) -> Parts:
        cls._trainers.step(row, cls._trainers.batch(row))
        return cls._trainers.parts[row][-1]


# Work -------------------------------------------------------------------------------------------------------------


def operations(config: CtalConfig, batch: Batch, *, all_positions: bool = True) -> float:
    """Multiplications and additions of the matrix products of a step, padding left out; the backward pass counts twice.

    Args:
        all_positions: Count every layer and head on every position, as the model is defined, whatever is skipped. Else
            only what ours computes: queries and feed-forward of the last audio layer and both heads on masked positions
            alone.
    """
    return pretraining_operations(config, positions_of(config, batch, all_positions))


def positions_of(config: CtalConfig, batch: Batch, all_positions: bool = False) -> list[Positions]:
    """Of each utterance; with `all_positions` every token and frame counts as predicted."""
    tokens = batch["attention_mask"].sum(1)
    wanted_tokens = tokens if all_positions else (batch["labels"] != IGNORED).sum(1)
    frames, wanted_frames = (
        stack_mask(mask.bool(), config.audio.frame_stack).any(2).sum(1)
        for mask in (batch["feature_attention_mask"], batch["mask_time_indices"])
    )
    columns = (tokens, frames, wanted_tokens, frames if all_positions else wanted_frames)
    return [Positions(*each) for each in torch.stack(columns, 1).tolist()]


# Tables -----------------------------------------------------------------------------------------------------------


def check_equality(size: str, device: torch.device = CPU) -> list[Check]:
    """Losses and gradients of ours and the baseline on a batch of mixed lengths."""
    without_dropout = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    config = CtalConfig.of_size(size, audio_is_causal=True, position_init="normal", **without_dropout)
    torch.manual_seed(0)
    with device:
        ours, authors = CtalForPreTraining(config), AuthorsModel(config)
    copy_weights(ours, authors)
    found = compare(ours, authors, on_device(masked_batch(_CHECK_SECONDS, config), device))
    checks = [
        Check(f"`{size}`: difference of the losses, fp32, equal weights, dropout 0", found.loss, LOSS_LIMIT),
        Check(f"`{size}`: relative difference of the gradients, at most", found.gradient, GRADIENT_LIMIT),
    ]
    for check in checks:
        say(f"  {check}")
    return checks


def measure(
    size: str, rows: Sequence[Row], rounds: int
) -> tuple[dict[Row, list[float]], dict[Row, float], dict[Row, list[Parts]]]:
    """Seconds of every row in every round, peak memory in GB of every row, and where the time went.

    A row for which memory does not suffice has no seconds.
    """
    memory = {row: peak_memory(train_once, row, size) for row in rows if row.has_memory}
    for row, peak in memory.items():
        say(f"  {size}, {row.name}: {peak:.2f} GB")
    available = available_memory()
    timed = [row for row in rows if not memory.get(row, 0) > available]  # what is not known is tried
    parts: dict[Row, list[Parts]] = {row: [] for row in timed}

    def step(process: Contenders, row: Row) -> float:
        parts[row].append(process.step(row))
        return sum(parts[row][-1])

    with ExitStack() as running:
        contenders = {}
        for kind in dict.fromkeys(row.process for row in timed):
            alike = [row for row in timed if row.process == kind and not row.once]
            if alike:
                process = running.enter_context(Contenders(size, alike))
                contenders |= {row.name: partial(step, process, row) for row in alike}
        alternate({row.name: contenders[row.name] for row in timed if not row.once}, rounds)
    for row in timed:
        if row.once:
            with Contenders(size, [row]) as process:
                say(f"  at last: {row.name}: {step(process, row):.3g} s")
    return {row: [sum(each) for each in parts[row]] for row in timed}, memory, parts


def step_table(
    caption: str,
    size: str,
    rows: Sequence[Row],
    seconds: Mapping[Row, Sequence[float]],
    memory: Mapping[Row, float],
    limits: Limits,
) -> Table:
    """Rows against the first of them."""
    columns = (
        "",
        "s a step",
        "audio s/s",
        "times the first row",
        "memory, GB",
        "of the first row's",
        "of peak",
        "done",
    )
    baseline = rows[0]
    lines = []
    for row in rows:
        peak = memory.get(row, float("nan"))
        part = peak / memory.get(baseline, math.nan)
        share = f"{100 * part:.0f} %" if math.isfinite(part) and baseline in seconds else "–"
        if row not in seconds:
            lines.append((row.name, "out of memory", *("–",) * 6))
            continue
        spread = Spread.of(seconds[row])
        config, batch = row.config(size), masked_batch(row.seconds, row.config(size))
        rate = limits.of(row.precision) * spread.median
        model, done = (operations(config, batch, all_positions=each) / rate for each in (True, False))
        lines.append(
            (
                row.name,
                str(spread),
                significant(sum(row.seconds) / spread.median),
                str(times_faster(seconds[baseline], seconds[row])) if baseline in seconds else "–",
                significant(peak),
                share,
                f"{100 * model:.0f} %",
                f"{100 * done:.0f} %" if row.ours else "–",
            )
        )
    return Table(caption, columns, lines)


def parts_table(size: str, rows: Sequence[Row], parts: Mapping[Row, Sequence[Parts]]) -> Table:
    """Where the time of a step goes."""
    lines = []
    for row in rows:
        if each := parts.get(row):
            medians = [Spread.of(column).median for column in zip(*each, strict=True)]
            lines.append((row.name, *(f"{100 * part / sum(medians):.0f} %" for part in medians)))
    return Table(f"`{size}`: where a step goes", ("", "forward", "backward", "clipping and AdamW"), lines)


def _with_memory(rows: Sequence[Row], measured: Sequence[Row]) -> list[Row]:
    """The peak memory of few rows, since a process of its own takes longer than their steps."""
    return [replace(row, has_memory=row in measured) for row in rows]


def main(quick: bool) -> Report:
    """Sizes base and mini, six utterances and one long one; `quick`: nano, shorter ones."""
    one = [replace(row, seconds=(37.5,), has_memory=False) for row in (replace(AUTHORS, once=True), OURS, OURS_BF16)]
    plans = (
        [_Plan("nano", _with_memory(ROWS, (AUTHORS, OURS)), 2)]
        if quick
        else [
            _Plan("base", _with_memory(ROWS, (AUTHORS, OURS, OURS_BF16)), 3),
            _Plan("base", one, 2),
            _Plan("mini", _with_memory([*ROWS, OURS_CAUSAL, *STACKED], (AUTHORS, OURS, OURS_BF16)), 3),
        ]
    )
    report = Report("pretraining_step")
    say("equality with the baseline")
    for size in dict.fromkeys(plan.size for plan in plans):
        report.checks += check_equality(size)
    return _measure_plans(report, plans, quick)


def allocators(quick: bool) -> Report:
    """Size base, each contender with its own way to deal with freed memory and with the other's; `quick`: nano."""
    plan = _Plan("nano", list(ALLOCATORS), 1) if quick else _Plan("base", list(ALLOCATORS), 2)
    return _measure_plans(Report("allocators"), [plan], quick)


class _Plan(NamedTuple):
    """What stands in one table."""

    size: str
    rows: Sequence[Row]
    rounds: int


def _measure_plans(report: Report, plans: Sequence[_Plan], quick: bool) -> Report:
    """The report with their tables; `quick`: on a tenth of the audio."""
    limits = measure_limits(quick)
    results = []
    for size, rows, rounds in plans:
        rows = [row.scaled(0.1 if quick else 1.0) for row in rows if is_timed(row.precision, quick)]
        lengths = rows[0].seconds
        utterances = f"{len(lengths)} utterances" if len(lengths) > 1 else "one utterance"
        what = f"`{size}`, {utterances}, {sum(lengths):.1f} s in all"
        say(what)
        results.append((size, what, rows, *measure(size, rows, rounds)))
    limits = limits.better(measure_limits(quick))
    for size, what, rows, seconds, memory, parts in results:
        caption = f"Pre-training step, {what}"
        report.tables.append(step_table(caption, size, rows, seconds, memory, limits))
        report.tables.append(parts_table(size, [row for row in rows if row.ours], parts))
        report.measured[what] = {row.name: {"seconds": seconds.get(row), "memory_gb": memory.get(row)} for row in rows}
    report.measured["limits"] = limits._asdict()
    report.notes += [
        f"the machine's own limits in the same run: {limits}",
        "of peak: the model's operations (every layer and head on every position, no padding) a second, as a share of "
        "the matrix-product peak of that precision; done: likewise, of those that ours does, since it skips what no "
        "loss needs",
        "medians of the rounds, least and most in brackets, or one step after the others where there are none; memory "
        "is that of a whole process, libraries included",
    ]
    return report
