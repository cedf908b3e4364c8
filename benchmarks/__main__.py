"""`python -m benchmarks [NAMES…] [--quick] [--audio FOLDER]`, from the root of the repository."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from benchmarks import (
    data_loading,
    devices,
    features,
    gpu,
    inference,
    length,
    operators,
    pretraining_step,
    scaling,
    sharing,
    startup,
)
from benchmarks.harness import describe_machine, in_fresh_process, publish, say

BENCHMARKS = {
    "pretraining_step": pretraining_step.main,
    "allocators": pretraining_step.allocators,
    "operators": operators.main,
    "inference": inference.main,
    "features": features.main,
    "data_loading": data_loading.main,
    "devices": devices.main,
    "startup": startup.main,
    "length": length.main,
    "scaling": scaling.main,
    "outlook": scaling.outlook,
    "sharing": sharing.main,
    "many_steps": devices.many_steps,
    "gpu": gpu.main,
}
_BY_NAME_ALONE = ("allocators", "sharing", "many_steps")
"""They take minutes each."""


def main() -> int:
    """Exit code 1 where a check is not met (equal results, memory that stays), else 0, whatever the times."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    known = f"of {', '.join(BENCHMARKS)}; default: all that this machine can, but for {', '.join(_BY_NAME_ALONE)}"
    parser.add_argument("names", nargs="*", metavar="NAMES", help=known)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: for the equality checks, not for the times")
    parser.add_argument("--audio", type=Path, help="a folder of recordings for `inference`; default: made-up ones")
    asked = parser.parse_args()
    for name in asked.names:
        if name not in BENCHMARKS:
            parser.error(f"no benchmark '{name}': choose from {', '.join(BENCHMARKS)}")
    command = shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]])
    machine = describe_machine()  # once: a later load average would be that of the benchmarks themselves
    failed = []
    for name in asked.names or _all_that_can(asked.quick):
        began = time.monotonic()
        say(f"== {name}")
        arguments = (asked.quick, asked.audio) if name == "inference" else (asked.quick,)
        try:
            # What an earlier one leaves with the allocator would be missing here.
            report = in_fresh_process(BENCHMARKS[name], *arguments)
        except BrokenProcessPool:
            say(f"{name}: its process was killed, for want of memory if nothing else stands above; the others go on")
            failed.append(name)
            continue
        publish(report, machine | {"took": f"{time.monotonic() - began:.0f} s"}, command, asked.quick)
        if not report.passed:
            failed.append(name)
    if failed:
        say(f"checks not met, or not made, in: {', '.join(failed)}")
    return 1 if failed else 0


def _all_that_can(quick: bool) -> list[str]:
    """Names of the benchmarks, less those that are asked for by name; without a GPU, less the one that needs it."""
    if quick:  # with these eight processes more it would take all of its three minutes
        return [name for name in BENCHMARKS if name != "allocators"]
    left_out: dict[str, str] = dict.fromkeys(_BY_NAME_ALONE, "asked for by its name alone")
    if not torch.cuda.is_available():
        left_out["gpu"] = "torch sees no GPU here"
    for name, why in left_out.items():
        say(f"== {name}: left out ({why})")
    return [name for name in BENCHMARKS if name not in left_out]


if __name__ == "__main__":
    sys.exit(main())
