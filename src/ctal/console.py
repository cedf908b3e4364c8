"""Progress on the terminal, shared by the verbs: bars with rate and time left, or plain lines where there is none."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

SECONDS_BETWEEN_LINES = 20

Metrics = Mapping[str, float]


def is_main_process() -> bool:
    """Whether this is the process of a launcher's job that speaks, or the only one."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """A bar; the callback takes (done, total)."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def print_table(table: Table) -> None:
    """On a terminal as wide as that is; elsewhere, where someone may search in it, with nothing cut or broken."""
    for column in table.columns:
        column.overflow = "fold"
    console = Console()
    (console if console.is_terminal else Console(width=10_000)).print(table)


class TrainingProgress:
    """What `ctal.training.Progress` asks for, on the main process."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, quiet=not is_main_process())
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.bar = Progress(
            TextColumn("training"),
            *columns,
            TextColumn("{task.fields[now]}"),
            console=self.console,
            disable=not self.console.is_terminal or not is_main_process(),
        )
        self.task = self.bar.add_task("training", total=None, now="")
        self.total, self.last_line = 0, 0.0

    def start(self, done: int, total: int) -> None:
        self.total = total
        self.bar.start()
        self.bar.update(self.task, completed=done, total=total)
        if done:
            self.note(f"going on after step {done} of {total}")

    def step(self, done: int, speed: float, losses: Metrics) -> None:
        now = f"{_joined(losses)}, {speed:.0f} s of audio a second"
        self.bar.update(self.task, completed=done, now=now)
        is_due = done == self.total or time.monotonic() - self.last_line > SECONDS_BETWEEN_LINES
        if not self.console.is_terminal and is_due:
            self.last_line = time.monotonic()
            self.note(f"step {done}/{self.total}: {now}")

    def validated(self, step: int, metrics: Metrics) -> None:
        if metrics:
            self.note(f"held out after step {step}: {_joined(metrics)}")

    def note(self, message: str) -> None:
        self.console.print(message, highlight=False, soft_wrap=True, markup=False)

    def stop(self) -> None:
        self.bar.stop()


def _joined(values: Metrics) -> str:
    # A part of a loss that is exactly 0 is a sum over nothing, such as masked words where there is no transcript.
    told = {name: value for name, value in values.items() if value != 0 or not name.endswith("_loss")}
    return ", ".join(f"{name} {value:.4f}" for name, value in told.items())
