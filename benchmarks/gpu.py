"""A step of pre-training on a GPU, ours beside the authors' recipe, and the cost model of `ctal.costs` beside both.

Each row's memory is measured with nothing else on the device, then all rows of a size alternate.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from benchmarks.harness import CPU, Report, Spread, Table, alternate, measure_limits, say, significant
from benchmarks.operators import shares, shares_table
from benchmarks.pretraining_step import (
    AUTHORS,
    FAIREST,
    OURS,
    OURS_BF16,
    OURS_BF16_DROPOUT,
    Batch,
    Parts,
    Row,
    Trainers,
    check_equality,
    parts_table,
    positions_of,
    step_table,
)
from benchmarks.samples import MIXED_SECONDS, NEIGHBOURING_SECONDS, librispeech_like_seconds, masked_batch
from ctal.costs import (
    count_weights,
    launches,
    machine_at_hand,
    pretraining_operations,
    step_seconds,
    update_bytes,
)

ROWS = (
    AUTHORS,
    replace(AUTHORS, name="authors' recipe in bf16", precision="bf16"),
    FAIREST,
    replace(FAIREST, name="the same model, attention dropout 0 and SDPA, in bf16", precision="bf16"),
    OURS,
    OURS_BF16,
    OURS_BF16_DROPOUT,
    replace(OURS_BF16, name="ours, bf16, compiled", compile=True),
    replace(OURS_BF16, name="ours, bf16, CUDA graphs", recorded=True),
    replace(OURS_BF16, name="ours, bf16, compiled, CUDA graphs", compile=True, recorded=True),
    replace(OURS_BF16, name="ours, bf16, layers computed again", gradient_checkpointing=True),
)


@dataclass(frozen=True)
class Load:
    """Utterances of a step."""

    size: str
    name: str
    mixed: tuple[float, ...]
    """Seconds of ours."""
    neighbouring: tuple[float, ...]
    """Of the baseline, of about as many seconds in all."""
    has_fp32: bool = True
    """Other rows in fp32 than the authors' too."""

    def rows(self) -> list[Row]:
        kept = [row for row in ROWS if self.has_fp32 or row is AUTHORS or row.precision == "bf16"]
        return [replace(row, seconds=self.mixed if row.ours else self.neighbouring) for row in kept]


def _even(size: str, name: str, seconds: Sequence[float], *, has_fp32: bool = True) -> Load:
    return Load(size, name, tuple(seconds), tuple(seconds), has_fp32)


_MANY = tuple(librispeech_like_seconds(48))
LOADS = (
    Load("base", "the recipe's six utterances", MIXED_SECONDS, NEIGHBOURING_SECONDS),
    Load("base", f"48 utterances, {sum(_MANY):.0f} s in all", _MANY, (sum(_MANY) / 48,) * 48),
    _even("base", "8 utterances of 37.5 s", (37.5,) * 8),
    _even("large", "8 utterances of 37.5 s", (37.5,) * 8, has_fp32=False),
)
QUICK_LOADS = (_even("nano", "2 utterances of 1 s", (1.0, 1.0)),)
STEPS = 3
"""That a round takes of a row, after one that is not timed."""


def device_memory(row: Row, size: str, device: torch.device) -> float:
    """GB of tensors on the device at most, over two steps of nothing but this row; infinite where it does not suffice,
    not a number on a CPU."""
    gc.collect()
    if device.type != "cuda":
        return math.nan
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        trainers = Trainers(size, device)
        trainers.prepare(row)
        trainers.step(row, trainers.batch(row))
    except torch.OutOfMemoryError:
        return math.inf
    return torch.cuda.max_memory_allocated() / 1e9


def take_steps(trainers: Trainers, row: Row, batch: Batch) -> float:
    """Mean seconds of `STEPS` steps, as the device has them."""
    trainers.step(row, batch)
    trainers.parts[row].pop()
    for _ in range(STEPS):
        trainers.step(row, batch)
    return sum(map(sum, trainers.parts[row][-STEPS:])) / STEPS


@dataclass(frozen=True)
class Measured:
    """A load that was measured."""

    load: Load
    memory: dict[Row, float]
    seconds: dict[Row, list[float]]
    parts: dict[Row, list[Parts]]

    def operations(self, row: Row) -> float:
        """Those that ours does."""
        config = row.config(self.load.size)
        return pretraining_operations(config, positions_of(config, masked_batch(row.seconds, config)))


def measure(load: Load, device: torch.device, rounds: int) -> Measured:
    """Leaves nothing on the device, where it would count as the next load's memory."""
    rows = [row for row in load.rows() if device.type == "cuda" or not (row.compile or row.recorded)]
    memory = {row: device_memory(row, load.size, device) for row in rows}
    for row, peak in memory.items():
        say(f"  {load.size}, {row.name}: {peak:.2f} GB")
    trainers = Trainers(load.size, device)
    contenders = {}
    for row in rows:
        if memory[row] != math.inf:
            trainers.prepare(row)
            contenders[row.name] = partial(take_steps, trainers, row, trainers.batch(row))
    seconds = alternate(contenders, rounds)
    measured = [row for row in rows if row.name in seconds]
    return Measured(load, memory, {row: seconds[row.name] for row in measured}, trainers.parts)


def model_table(measured: Sequence[Measured]) -> Table:
    """What passes and update reach, and the step by the cost model of the machine at hand beside the measured one."""
    columns = (
        *("", "forward and backward, Tflop/s", "of peak", "clipping and AdamW, TB/s"),
        *("µs a launch, if it were all", "measured, ms", "model, ms", "error"),
    )
    lines = []
    for each in measured:
        weights = count_weights(OURS.config(each.load.size))
        for row, seconds in each.seconds.items():
            if row.name not in (OURS.name, OURS_BF16.name):
                continue
            machine, spread = machine_at_hand(row.precision), Spread.of(seconds)
            parts = each.parts[row]
            passes = Spread.of(part.forward + part.backward for part in parts).median
            update = Spread.of(part.update for part in parts).median
            rate = each.operations(row) / passes
            model = step_seconds(machine, weights, each.operations(row), row.precision).total
            lines.append(
                (
                    f"`{each.load.size}`, {each.load.name}, {row.precision}",
                    significant(rate / 1e12),
                    f"{100 * rate / machine.peaks[row.precision]:.0f} %",
                    significant(update_bytes(weights) / update / 1e12),
                    significant(1e6 * spread.median / launches(weights, row.precision)),
                    significant(1000 * spread.median),
                    significant(1000 * model),
                    f"{100 * (model / spread.median - 1):+.0f} %",
                )
            )
    return Table("The model beside measured steps", columns, lines)


def main(quick: bool) -> Report:
    """Sizes base and large on a GPU; `quick`: nano, and without a GPU the CPU.

    Raises:
        SystemExit: There is no GPU.
    """
    if not quick and not torch.cuda.is_available():
        raise SystemExit("gpu: torch sees no GPU here; with --quick it runs on the CPU")
    device = torch.device("cuda") if torch.cuda.is_available() else CPU
    loads, rounds = (QUICK_LOADS, 2) if quick else (LOADS, 3)
    report = Report("gpu")
    say("equality with the baseline")
    for size in dict.fromkeys(load.size for load in loads):
        report.checks += check_equality(size, device)
    limits = measure_limits(quick, device)
    measured = []
    for load in loads:
        say(f"{load.size}, {load.name}")
        measured.append(measure(load, device, rounds))
    limits = limits.better(measure_limits(quick, device))
    for each in measured:
        caption = f"`{each.load.size}`, {each.load.name}"
        rows = list(each.memory)
        report.tables.append(step_table(caption, each.load.size, rows, each.seconds, each.memory, limits))
        report.measured[caption] = {
            row.name: {
                "seconds": each.seconds.get(row),
                "memory_gb": each.memory[row],
                "parts": [part._asdict() for part in each.parts.get(row, ())],
            }
            for row in rows
        }
    for size in dict.fromkeys(load.size for load in loads):
        largest = max((each for each in measured if each.load.size == size), key=lambda each: sum(each.load.mixed))
        report.tables.append(parts_table(size, list(largest.seconds), largest.parts))
    found = {
        f"`{load.size}`, {load.name}, {row.name}": shares(load.size, row, device)
        for load in loads
        for row in load.rows()
        if row.name == OURS_BF16.name
    }
    report.tables.append(shares_table(found))
    report.measured["shares"] = found
    report.tables.append(model_table(measured))
    report.measured["limits"] = limits._asdict()
    report.notes += [
        f"the device's own limits in the same run: {limits}",
        "memory is that of tensors on the device",
    ]
    return report
