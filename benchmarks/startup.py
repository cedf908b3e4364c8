"""How long a command takes before it does anything."""

from __future__ import annotations

from functools import partial

from benchmarks.harness import Report, Spread, Table, alternate, python

COMMANDS = {
    "an interpreter that does nothing": ("-c", "pass"),
    "`import ctal`": ("-c", "import ctal"),
    "`ctal --help`": ("-m", "ctal", "--help"),
    "`ctal predict --help`": ("-m", "ctal", "predict", "--help"),
    "`import torch, transformers` and its RoBERTa, as research code begins": (
        *("-c", "import torch; from transformers import RobertaForMaskedLM"),
    ),
}


def main(quick: bool) -> Report:
    """Each in an interpreter of its own, which is read from the disk's cache."""
    report = Report("startup")
    contenders = {name: partial(python, *arguments) for name, arguments in COMMANDS.items()}
    if not quick:
        for run in contenders.values():
            run()
    seconds = alternate(contenders, 1 if quick else 3)
    rows = [(name, str(Spread.of(each))) for name, each in seconds.items()]
    report.tables.append(Table("Start-up", ("", "s"), rows))
    report.measured = seconds
    return report
