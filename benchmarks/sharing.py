"""Training while other programs want the cores too: how threads wait for each other decides whether it goes on.

Every measurement is a process of its own, since OpenMP reads how to wait when it is loaded. The other programs are
loops that never rest.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from benchmarks.harness import ROOT, Report, Spread, Table, alternate, times_faster
from benchmarks.pretraining_step import OURS, Trainers
from benchmarks.samples import masked_batch
from ctal.processes import share_cores, usable_cores
from ctal.recipes import MODEL_DEFAULTS

_SECONDS = (12.0, 10.0, 14.0, 8.0)
"""Lengths of a step's utterances."""


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many other processes that compute all the time."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def seconds_beside(others: int, polite: bool, size: str, duration: float) -> float:
    """Seconds that training takes for one of audio beside `others`; `polite`: as the command line trains."""
    variables = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    if polite:
        share_cores(variables)
    command = [sys.executable, "-c", f"from {__name__} import train_for; print(train_for({size!r}, {duration}))"]
    with busy(others):
        finished = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, env=variables)
    return float(finished.stdout)


def train_for(size: str, duration: float) -> float:
    """Seconds for one of audio, of steps that are taken until `duration` seconds have passed, one at least."""
    row = replace(OURS, frame_stack=MODEL_DEFAULTS[size]["frame_stack"])
    trainers = Trainers(size)
    trainers.prepare(row)
    batch = masked_batch(_SECONDS, row.config(size))
    began, steps = time.perf_counter(), 0
    while not steps or time.perf_counter() - began < duration:
        trainers.step(row, batch)
        steps += 1
    return (time.perf_counter() - began) / (steps * sum(_SECONDS))


def main(quick: bool) -> Report:
    """`mini` on all threads, alone, beside one other program, and one on each core; `quick`: nano, not the last."""
    report = Report("sharing")
    size, duration, rounds = ("nano", 0.5, 1) if quick else ("mini", 4.0, 2)
    loads = {"alone": 0, "beside one busy process": 1}
    if not quick:  # even to start takes ten seconds then
        loads["beside one on each core"] = usable_cores()
    rows = []
    for load, others in loads.items():
        waits = {False: f"{load}, waiting as OpenMP does", True: f"{load}, as `ctal` waits"}
        contenders = {name: partial(seconds_beside, others, polite, size, duration) for polite, name in waits.items()}
        seconds = alternate(contenders, rounds)
        usual, ours = (seconds[name] for name in waits.values())
        rates = [str(Spread.of(1 / each for each in values)) for values in (usual, ours)]
        rows.append((load, *rates, str(times_faster(usual, ours))))
        report.measured |= seconds
    columns = ("", "audio s/s, waiting as OpenMP does by itself", "audio s/s, as `ctal` waits", "times as fast")
    report.tables.append(Table(f"Training `{size}` beside other programs, fp32", columns, rows))
    return report
