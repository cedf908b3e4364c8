"""What the worker processes of ctal have in common."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from threading import Thread
from types import FrameType
from typing import NamedTuple, NoReturn, TypeVar

from ctal.errors import InputError

ResultT = TypeVar("ResultT")
Submit = Callable[[Callable[[], ResultT]], Future[ResultT]]


class Terminated(Exception):
    """A signal ended the work, by default SIGTERM; what can be gone on with is saved."""

    def __init__(self, message: str, number: int = signal.SIGTERM) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


def follow_parent() -> None:
    """Start of a worker process: the parent alone answers Ctrl-C, and the worker ends with it, even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None, "follow_parent is for worker processes"

    def watch() -> None:
        parent.join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def share_cores(variables: MutableMapping[str, str]) -> None:
    """Makes threads that wait for each other give up their cores, where `variables` do not say how they shall wait.

    For the environment of a process that has not imported torch yet. GNU's OpenMP, torch's on Linux, waits by spinning
    300,000 times at the end of each operation; where another process has a core of ours, so that the last thread comes
    late, that is most of what a training does. A thousand, which it takes itself where it knows of too few cores, costs
    nothing on an idle machine (`python -m benchmarks sharing`).
    """
    if "OMP_WAIT_POLICY" not in variables:
        variables.setdefault("GOMP_SPINCOUNT", "1000")


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""glibc's names of how much may be free at the end of the heap, and of how many blocks may lie outside it: what is
beyond, or freed out there, goes back to the system."""


def keep_freed_memory(variables: Mapping[str, str]) -> None:
    """Has the C library keep what is freed, where `variables`, the environment, do not say what it shall do.

    By itself glibc gives large tensors back to the system, which hands out every page of the next ones anew: in a step
    of `base` an eighth of the time, and about a twentieth less memory. Other C libraries are left alone.
    """
    chosen = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_")
    if any(name in variables for name in chosen) or "glibc.malloc" in variables.get("GLIBC_TUNABLES", ""):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, -1)
        mallopt(_M_MMAP_MAX, 0)


def leave_processes() -> None:
    """Parts with the other processes of a launcher, if there are any; to be called when nothing of a training is held.

    A thread of gloo's that frees a tensor only after the interpreter has ended aborts the process; what holds the model
    of a training, such as the traceback of an exception, keeps these threads.
    """
    distributed = sys.modules.get("torch.distributed")  # a command that had no need of torch has no processes either
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        gc.collect()
        distributed.destroy_process_group()


_STOPPED = "stopped by {}; run the same command again to go on"


@contextmanager
def training_pool(workers: int) -> Iterator[Submit]:
    """A function that gives calls to processes for trainings: one on each GPU, or with an even share of the cores.

    Ctrl-C, SIGTERM (both as `Terminated`) or a failure in the block ends what is running in them with SIGTERM, so that
    each training writes a checkpoint first. A process that the system kills is an `InputError`.
    """
    import torch

    # Spawned: a fork would copy the locks of the threads that this process has had.
    context = get_context("spawn")
    numbers = context.SimpleQueue()
    for number in range(workers):
        numbers.put(number)
    devices = torch.cuda.device_count()
    threads = max(1, usable_cores() // workers)
    previous = signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        with ProcessPoolExecutor(workers, context, _start_worker, (numbers, devices, threads)) as pool:
            try:
                yield partial(pool.submit, _call)
            except BaseException as error:
                for child in active_children():
                    child.terminate()
                pool.shutdown(cancel_futures=True)
                if isinstance(error, KeyboardInterrupt):
                    raise Terminated(_STOPPED.format("Ctrl-C"), signal.SIGINT) from None
                if isinstance(error, BrokenProcessPool):
                    raise InputError(
                        "a training was killed, perhaps for lack of memory; run the same command again to go on, if "
                        "need be with fewer at a time"
                    ) from None
                raise
    finally:
        signal.signal(signal.SIGTERM, previous)


def _raise_terminated(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise Terminated(_STOPPED.format("SIGTERM"))


def _call(call: Callable[[], ResultT]) -> ResultT:
    try:
        return call()
    except Terminated:
        os._exit(143)  # else the worker would begin the next call, which waits in its queue already


def nth_device(number: int, devices: int, chosen: str | None) -> str:
    """The GPU of worker `number`, where `devices` are visible: one of those that the user has `chosen`, if any."""
    names = chosen.split(",") if chosen else [str(each) for each in range(devices)]
    return names[number % devices].strip()


def _start_worker(numbers: SimpleQueue[int], devices: int, threads: int) -> None:
    follow_parent()
    keep_freed_memory(os.environ)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if devices:
        # Read when CUDA is first used, which has not happened yet in a spawned process.
        chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = nth_device(numbers.get(), devices, chosen)
    import torch

    torch.set_num_threads(threads)


class Cost(NamedTuple):
    """What a call took."""

    seconds: float
    peak_memory_mb: float
    """Of the process and, where there is one, of the GPU: the larger one."""


def measured(call: Callable[[], ResultT]) -> tuple[ResultT, Cost]:
    """What `call` returns, and what it took; memory is measured anew for each call where the system can (Linux)."""
    import torch

    peak = Path("/proc/self/clear_refs")
    if peak.exists():
        peak.write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - began
    of_gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return result, Cost(seconds, max(_peak_memory(), of_gpu) / 2**20)


def _peak_memory() -> float:
    """Bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return float(line.split()[1]) * 1024
    import resource  # not on every system

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
