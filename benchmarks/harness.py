"""What all benchmarks share: alternating rounds, peak memory, the machine's own limits, and how results are written.

Nothing here asserts a time. A `Check` is about equal results, or memory that must not grow, and is all that can fail.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from itertools import pairwise
from multiprocessing import get_context, set_start_method
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F

from ctal.objective import environment
from ctal.precision import multiplies_bf16

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "performance.md"

CPU = torch.device("cpu")

Result = TypeVar("Result")


def say(message: str) -> None:
    print(message, flush=True)


# Time -------------------------------------------------------------------------------------------------------------


class Spread(NamedTuple):
    """Several measurements of one thing."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        if self.low == self.high:
            return significant(self.median)
        return f"{significant(self.median)} ({significant(self.low)}–{significant(self.high)})"

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        values = list(values)
        return cls(statistics.median(values), min(values), max(values))


def significant(value: float) -> str:
    """Three significant digits, whole numbers from 100 on."""
    if not math.isfinite(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def alternate(contenders: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every contender in every round; one that returns a float has timed itself.

    Every other round goes backwards, so that neither a machine that slows down nor a neighbour in the order favours
    anyone.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name in contenders if number % 2 == 0 else reversed(list(contenders)):
            gc.collect()
            began = time.perf_counter()
            own = contenders[name]()
            seconds[name].append(own if isinstance(own, float) else time.perf_counter() - began)
            say(f"  round {number + 1} of {rounds}: {name}: {seconds[name][-1]:.3g} s")
    return seconds


def times_faster(baseline: Sequence[float], contender: Sequence[float]) -> Spread:
    """Ratios of the seconds of the same rounds; who has fewer of them is compared with the last ones."""
    rounds = min(len(baseline), len(contender))
    return Spread.of(slow / quick for slow, quick in zip(baseline[-rounds:], contender[-rounds:], strict=True))


class Stopwatch:
    """Moments of a device: of a GPU when it gets there, not when it is told to."""

    def __init__(self, device: torch.device) -> None:
        """Waits for a GPU to be idle, and marks the first moment."""
        self._of_gpu = device.type == "cuda"
        self._events: list[torch.cuda.Event] = []
        self._moments: list[float] = []
        if self._of_gpu:
            torch.cuda.synchronize()
        self.mark()

    def mark(self) -> None:
        if self._of_gpu:
            self._events.append(torch.cuda.Event(enable_timing=True))
            self._events[-1].record()
        else:
            self._moments.append(time.perf_counter())

    def spans(self) -> list[float]:
        """Seconds between each two moments; waits for a GPU to be done."""
        if self._of_gpu:
            torch.cuda.synchronize()
            return [earlier.elapsed_time(later) / 1000 for earlier, later in pairwise(self._events)]
        return [later - earlier for earlier, later in pairwise(self._moments)]


def python(*arguments: str) -> float:
    """Seconds that an interpreter of its own takes for `arguments`, from its start to its end."""
    return _seconds(lambda: subprocess.run([sys.executable, *arguments], check=True, capture_output=True))


# Memory -----------------------------------------------------------------------------------------------------------


def fresh_processes() -> ForkServerContext:
    """Makes processes that have imported everything and computed nothing."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.pretraining_step", "torch.utils.tensorboard"])
    return context


def in_fresh_process(work: Callable[..., Result], *arguments: object) -> Result:
    """What `work`, a function at the top of a module, gives in a process that keeps nothing of what ran before it.

    Raises:
        BrokenProcessPool: it was killed, mostly by the system for want of memory.
    """
    with ProcessPoolExecutor(1, fresh_processes()) as pool:
        return pool.submit(partial(_as_main, work), *arguments).result()


def _as_main(work: Callable[..., Result], *arguments: object) -> Result:
    """`work` with loaders that start their workers as in a program of its own, not as this process was started."""
    set_start_method(None, force=True)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return work(*arguments)


def peak_memory(work: Callable[..., object], *arguments: object) -> float:
    """GB (10⁹ bytes) that a fresh process holds at most while it does `work`, libraries included.

    Infinite where the system kills it for want of memory, not a number where the system does not tell. `work` is a
    function at the top of a module.
    """
    context = fresh_processes()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, work, arguments))
    process.start()
    sender.close()
    try:
        peak: float = receiver.recv()
    except EOFError:
        peak = math.inf
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"{work.__name__}{arguments} failed in its process; the reason stands above")
    return peak


def available_memory() -> float:
    """GB that processes can still have; not a number where the system does not tell."""
    return _meminfo("MemAvailable")


def _meminfo(name: str) -> float:
    meminfo = Path("/proc/meminfo")
    found = re.search(rf"{name}:\s+(\d+) kB", meminfo.read_text()) if meminfo.exists() else None
    return int(found[1]) * 1024 / 1e9 if found else math.nan


def _measure(sender: Connection, work: Callable[..., object], arguments: Sequence[object]) -> None:
    mark = Path("/proc/self/oom_score_adj")
    if mark.exists():
        mark.write_text("1000")  # where memory does not suffice, this process is to go, not a bystander
    work(*arguments)
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    sender.send(int(found[1]) * 1024 / 1e9 if found else math.nan)


# The machine ------------------------------------------------------------------------------------------------------


class Limits(NamedTuple):
    """What this machine can do at best, with the threads that the benchmarks use."""

    fp32: float
    """Operations (multiplications and additions) a second of a matrix product."""
    bf16: float
    """NaN where it is not measured (`is_timed`)."""
    bandwidth: float
    """Bytes a second, read and written, of a copy in memory."""

    def of(self, precision: str) -> float:
        return self.bf16 if precision == "bf16" else self.fp32

    def __str__(self) -> str:
        bf16 = "" if math.isnan(self.bf16) else f" and {self.bf16 / 1e9:,.0f} (bf16)"
        return (
            f"matrix products {self.fp32 / 1e9:,.0f} (fp32){bf16} billion operations a second, "
            f"copies {self.bandwidth / 1e9:.1f} GB/s"
        )

    def better(self, other: Limits) -> Limits:
        return Limits(*(max(pair) for pair in zip(self, other, strict=True)))


def measure_limits(quick: bool, device: torch.device = CPU) -> Limits:
    """The best of several shapes and repetitions; a benchmark asks before and after it has measured."""
    fp32 = _matrix_peak(torch.float32, quick, device)
    bf16 = _matrix_peak(torch.bfloat16, quick, device) if is_timed("bf16", quick, device) else math.nan
    return Limits(fp32, bf16, _bandwidth(quick, device))


def is_timed(precision: str, quick: bool, device: torch.device = CPU) -> bool:
    """Not bf16 where it is multiplied in software, but for the equality checks of `quick`: it would take hours."""
    return quick or precision != "bf16" or multiplies_bf16(device.type)


def _matrix_peak(dtype: torch.dtype, quick: bool, device: torch.device) -> float:
    """Of shapes as in the model, and of squares."""
    shapes = [(6000, 768, 3072), (6000, 3072, 768), (2048, 2048, 2048), (4096,) * 3]
    if device.type != "cpu":
        shapes = [(48_000, 768, 3072), (48_000, 3072, 768), (8192,) * 3]
    rates = []
    for rows, inner, columns in [(512, 256, 512)] if quick else shapes:
        left, right = (torch.randn(size, inner, dtype=dtype, device=device) for size in (rows, columns))
        seconds = min(_seconds(lambda left=left, right=right: F.linear(left, right), device) for _ in range(5))
        rates.append(2 * rows * inner * columns / seconds)
    return max(rates)


def _bandwidth(quick: bool, device: torch.device) -> float:
    source = torch.ones(2**22 if quick else 2**27, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(_seconds(lambda: target.copy_(source), device) for _ in range(5))


def _seconds(work: Callable[[], object], device: torch.device = CPU) -> float:
    watch = Stopwatch(device)
    work()
    watch.mark()
    return watch.spans()[0]


def describe_machine() -> dict[str, str]:
    """What a number is worth nothing without, by name."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    known = environment()
    gpu = {"GPU": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    bf16 = "" if multiplies_bf16("cpu") else ", bf16 in software"
    return gpu | {
        "CPU": model[1] if model else platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability() + bf16,
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()}",
        "memory": f"{_meminfo('MemTotal'):.0f} GB",
        "system": f"{platform.system()} {platform.release()}",
        "versions": ", ".join(f"{name} {version}" for name, version in known["versions"].items()),
        "commit": str(known["commit"]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "load average before": f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "unknown",
    }


# Results ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """That two ways to compute one thing agree, or that a number stays within its limit otherwise."""

    name: str
    value: float
    limit: float
    at_least: bool = False
    """Whether the limit is the smallest good value (a cosine), not the largest (a difference)."""

    @property
    def passed(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        verdict = "" if self.passed else " – **not met**"
        return f"{self.name}: {self.value:.6g} ({'≥' if self.at_least else '≤'} {self.limit:g}){verdict}"


@dataclass(frozen=True)
class Table:
    caption: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def __str__(self) -> str:
        lines = [self.columns, ("---",) * len(self.columns), *self.rows]
        return f"**{self.caption}**\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


@dataclass
class Report:
    """What a benchmark found."""

    name: str
    tables: list[Table] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    measured: dict[str, Any] = field(default_factory=dict)
    """All single measurements, for the JSON file."""
    document: str = DOCUMENT.name
    """The file in docs/ that it belongs to."""
    is_computed: bool = False
    """Nothing was measured, so it is the same on any machine."""

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def markdown(self, machine: Mapping[str, str], command: str) -> str:
        described = "; ".join(f"{name} {value}" for name, value in machine.items())
        points = "\n".join(f"- {each}" for each in [*self.checks, *self.notes])
        source = f"Computed with `{command}`." if self.is_computed else f"Measured with `{command}`. {described}."
        parts = [*map(str, self.tables), points, source]
        return "\n\n".join(filter(None, parts))


def publish(report: Report, machine: Mapping[str, str], command: str, quick: bool) -> None:
    """Prints a report and writes its JSON; unless `quick`, also into the document, between the benchmark's markers."""
    text = report.markdown(machine, command)
    say(f"\n{text}\n")
    RESULTS.mkdir(exist_ok=True)
    content = {"machine": machine, "command": command, **asdict(report)}
    path = RESULTS / f"{report.name}{'-quick' if quick else ''}.json"
    # JSON has neither: what was not measured, and what no memory sufficed for.
    content = json.loads(json.dumps(content), parse_constant=lambda name: None if name == "NaN" else name)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    if not quick:
        path = DOCUMENT.with_name(report.document)
        path.write_text(_between_markers(path, report.name, text))


def _between_markers(path: Path, name: str, text: str) -> str:
    document = path.read_text()
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    if document.count(start) != 1 or document.count(end) != 1:
        raise ValueError(f"{path}: needs the markers {start} and {end}, once each")
    before, rest = document.split(start)
    return f"{before}{start}\n{text}\n{end}{rest.split(end)[1]}"
