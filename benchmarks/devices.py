"""What a large training rests on, as far as one machine without a GPU shows it: processes, memory, many steps.

Training over processes is `ctal.training.train` itself, on two gloo processes with half the threads each. They stay
alive and take a step when they are told to, so that contenders take turns as elsewhere.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar

from benchmarks.harness import (
    Check,
    Report,
    Spread,
    Table,
    alternate,
    fresh_processes,
    in_fresh_process,
    say,
    significant,
    times_faster,
)
from benchmarks.pretraining_step import LOSS_LIMIT, Batch, Row, measure
from benchmarks.samples import librispeech_like_seconds, masked_batch, write_store
from ctal import CtalConfig, CtalFeatureExtractor, CtalForPreTraining, CtalProcessor
from ctal.batching import Corpus, Microbatch, StepPlan, deal
from ctal.costs import FRAMES_A_SECOND
from ctal.pretrain import PretrainingObjective, load_tokenizer
from ctal.processes import keep_freed_memory, leave_processes
from ctal.recipes import MODEL_DEFAULTS, PretrainConfig, make_config
from ctal.store import Store
from ctal.training import Metrics, Silence, train

STEP_FRAMES = make_config(PretrainConfig).batch_frames
UTTERANCES_A_STEP = 6
"""Of LibriSpeech's, as many as the recipe's frames hold."""
GROWTH_LIMIT = 0.05
"""By which share the memory of a training may grow from a tenth of its steps to its end."""

_WITHOUT_GPU = {"CUDA_VISIBLE_DEVICES": ""}


# Several processes ------------------------------------------------------------------------------------------------


class StepsOnly(PretrainingObjective):
    """Measures no held-out data and writes no model."""

    def validation_microbatches(self) -> list[Microbatch]:
        return []

    def save_model(self, folder: Path, step: int, metrics: Metrics) -> None: ...


class _Rounds(Silence):
    """Lets the loop take a step whenever it is told to; tells how many seconds one of audio took, and the losses.

    Where nobody is at the other end any more, `EOFError` ends the loop.
    """

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe

    def start(self, done: int, total: int) -> None:
        self.pipe.recv()

    def step(self, done: int, speed: float, losses: Metrics) -> None:
        self.pipe.send((1 / speed, losses))
        self.pipe.recv()


def objective_on(
    folder: Path, config: PretrainConfig, model: CtalForPreTraining, kind: type[PretrainingObjective]
) -> PretrainingObjective:
    """An objective of `kind` on the store that `write_store` left in `folder`."""
    processor = CtalProcessor(CtalFeatureExtractor(), load_tokenizer(folder / "tokenizer"))
    return kind(model, processor, Corpus([Store(folder / "store")]), config)


def _train_in_rounds(
    pipe: Connection, place: Mapping[str, str], threads: int, folder: Path, out: Path, size: str, config: PretrainConfig
) -> None:
    """A process of a training; `place` are the variables by which it finds the others."""
    # Accelerate takes a number of threads of its own choice where this variable does not stand.
    os.environ.update({**place, "OMP_NUM_THREADS": str(threads)})
    keep_freed_memory({})
    torch.set_num_threads(threads)
    torch.manual_seed(config.seed)
    model = CtalForPreTraining(CtalConfig.of_size(size, hidden_dropout_prob=0, attention_probs_dropout_prob=0))
    with suppress(EOFError, BrokenPipeError):
        train(objective_on(folder, config, model, StepsOnly), config, out, progress=_Rounds(pipe))
    leave_processes()


class Training:
    """A training without dropout on `ranks` processes, which takes a step when it is asked to."""

    def __init__(self, ranks: int, threads: int, folder: Path, out: Path, size: str, config: PretrainConfig) -> None:
        """`folder` is what `write_store` left; each process computes with `threads`."""
        self.losses: list[Metrics] = []
        context = fresh_processes()
        self._pipes: list[Connection] = []
        self._processes = []
        for place in _places(ranks):
            ours, theirs = context.Pipe()
            arguments = (theirs, place, threads, folder, out, size, config)
            process = context.Process(target=_train_in_rounds, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def step(self) -> float:
        """Seconds that the slowest process takes for a second of audio."""
        for pipe in self._pipes:
            pipe.send(None)
        seconds, losses = zip(*(pipe.recv() for pipe in self._pipes), strict=True)
        self.losses.append(losses[0])
        return max(seconds)

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join()


def _places(ranks: int) -> list[dict[str, str]]:
    """What a launcher would tell each process; without a GPU they speak through gloo."""
    if ranks == 1:
        return [_WITHOUT_GPU]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shared = {**_WITHOUT_GPU, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def largest_difference(one: Sequence[Metrics], other: Sequence[Metrics]) -> float:
    """Of all losses of all steps."""
    return max(
        abs(value - theirs[name]) for ours, theirs in zip(one, other, strict=True) for name, value in ours.items()
    )


def measure_processes(report: Report, folder: Path, size: str, scale: float, rounds: int) -> None:
    """`scale` shortens the utterances, and the step with them."""
    write_store(folder, [scale * each for each in librispeech_like_seconds((rounds + 2) * UTTERANCES_A_STEP)])
    threads = torch.get_num_threads()
    half = max(1, threads // 2)
    named = {
        f"one process, {threads} threads": (1, threads, False),
        f"two processes (DDP), {half} each": (2, half, False),
        f"two processes, weights split (FSDP2), {half} each": (2, half, True),
    }
    # The rate is whole at once, so that the few steps that are compared move the weights.
    fields = {"batch_frames": round(scale * STEP_FRAMES), "warmup_ratio": 0, "workers": 0}
    with ExitStack() as stack:
        trainings = {}
        for number, (name, (ranks, each, sharded)) in enumerate(named.items()):
            config = make_config(PretrainConfig, fields, {"sharded": sharded})
            training = Training(ranks, each, folder, folder / f"run-{number}", size, config)
            trainings[name] = stack.enter_context(closing(training))
        for training in trainings.values():
            training.step()  # no first time of anything is measured
        seconds = alternate({name: training.step for name, training in trainings.items()}, rounds)
    baseline = next(iter(trainings))
    lines = []
    for name, each in seconds.items():
        rate = Spread.of(1 / value for value in each)
        lines.append((name, str(rate), str(times_faster(seconds[baseline], each))))
        if name != baseline:
            difference = largest_difference(trainings[name].losses, trainings[baseline].losses)
            what = f"`{size}`, {name}: largest difference of a loss from one process's, {rounds + 1} steps, dropout 0"
            report.checks.append(Check(what, difference, LOSS_LIMIT))
    caption = f"A step of `{size}` on {scale * STEP_FRAMES / FRAMES_A_SECOND:.3g} s of audio, fp32"
    report.tables.append(Table(caption, ("", "audio s/s", "times the first row"), lines))
    report.measured["processes"] = {
        name: {"seconds_a_second_of_audio": seconds[name], "losses": training.losses}
        for name, training in trainings.items()
    }


# Activation checkpointing -----------------------------------------------------------------------------------------


def losses_and_gradients(model: nn.Module, batch: Batch) -> list[Tensor]:
    """Of a pass with always the same dropout."""
    model.zero_grad()
    torch.manual_seed(0)
    loss = model(**batch).loss
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


def check_checkpointing(size: str, rows: Sequence[Row], seconds: Sequence[float]) -> Check:
    """That both rows compute the same, with dropout."""
    first, second = (row.build(size) for row in rows)
    second.load_state_dict(first.state_dict())
    batch = masked_batch(seconds, rows[0].config(size))
    pairs = zip(losses_and_gradients(first, batch), losses_and_gradients(second, batch), strict=True)
    difference = float(torch.stack([(one - other).abs().max() for one, other in pairs]).max())
    return Check(f"`{size}`: largest difference of loss and gradients, activations computed again", difference, 0)


def measure_checkpointing(report: Report, size: str, seconds: float, rounds: int, *, has_memory: bool) -> None:
    """On one utterance of `seconds`."""
    kept = Row("activations kept", ours=True, seconds=(seconds,), has_memory=has_memory)
    again = replace(kept, name="activations computed again", gradient_checkpointing=True)
    report.checks.append(check_checkpointing(size, (kept, again), (seconds / 10, seconds / 20)))
    times, memory, _ = measure(size, (kept, again), rounds)
    memory = memory or dict.fromkeys((kept, again), float("nan"))
    lines = [
        (
            row.name,
            str(Spread.of(times[row])),
            str(times_faster(times[row], times[kept])),
            significant(memory[row]),
            significant(memory[row] / memory[kept]),
        )
        for row in times
    ]
    columns = ("", "s a step", "times as long as the first row", "memory, GB", "times the first row's")
    report.tables.append(Table(f"Activation checkpointing, `{size}`, one utterance of {seconds:g} s", columns, lines))
    report.measured["checkpointing"] = {
        row.name: {"seconds": times.get(row), "memory_gb": memory[row]} for row in (kept, again)
    }


# Frames of the ranks ----------------------------------------------------------------------------------------------


def frames_dealt(frames: np.ndarray, ranks: int, step_frames: int) -> np.ndarray:
    """(steps, ranks) frames of an epoch as training deals out its steps of `step_frames`."""
    rows = np.arange(len(frames))
    plan = StepPlan(rows, frames, np.zeros_like(rows), step_frames, seed=0)
    return np.array([[frames[part].sum() for part in deal(step, frames, ranks)] for step in plan.steps(0)])


def frames_drawn(frames: np.ndarray, ranks: int) -> np.ndarray:
    """(steps, ranks) frames where each rank takes equally many utterances at random, as `DistributedSampler` deals."""
    shuffled = np.random.default_rng(0).permutation(frames)
    whole = len(shuffled) // (ranks * UTTERANCES_A_STEP) * ranks * UTTERANCES_A_STEP
    return shuffled[:whole].reshape(-1, ranks, UTTERANCES_A_STEP).sum(2)


def imbalance(frames: np.ndarray) -> float:
    """By which share the fullest rank exceeds the mean one, on average over the steps of (steps, ranks) frames."""
    return float((frames.max(1) / frames.mean(1) - 1).mean())


def count_frames(report: Report) -> None:
    """For each rank as many frames as the recipe's step has."""
    frames = np.round(np.array(librispeech_like_seconds(50_000)) * FRAMES_A_SECOND).astype(np.int64)
    lines = []
    for ranks in (2, 8, 64):
        ours = imbalance(frames_dealt(frames, ranks, ranks * STEP_FRAMES))
        at_random = imbalance(frames_drawn(frames, ranks))
        lines.append((str(ranks), f"{100 * ours:.1f} %", f"{100 * at_random:.1f} %"))
        report.measured[f"imbalance over {ranks} ranks"] = {"ours": ours, "at random": at_random}
    columns = ("ranks", "ours", f"{UTTERANCES_A_STEP} utterances each, at random")
    caption = f"By how much the fullest rank's frames exceed the mean ({STEP_FRAMES:,} a rank); counted, not timed"
    report.tables.append(Table(caption, columns, lines))
    whole = 100 * imbalance(frames_dealt(frames, 2, STEP_FRAMES))
    report.notes.append(f"of a single recipe's step over two ranks, as in the first table: {whole:.1f} %")


# Many steps -------------------------------------------------------------------------------------------------------


class _Memory(Silence):
    """Resident megabytes of this process and of its workers, after some of the steps."""

    def __init__(self, wanted: Iterable[int]) -> None:
        self.found: dict[int, tuple[float, float]] = dict.fromkeys(wanted, (0.0, 0.0))

    def step(self, done: int, speed: float, losses: Metrics) -> None:
        if done in self.found:
            process = psutil.Process()
            workers = sum(_megabytes(child) for child in process.children())
            self.found[done] = _megabytes(process), workers


def _megabytes(process: psutil.Process) -> float:
    return process.memory_info().rss / 1e6


def train_and_watch(
    folder: Path, size: str, config: PretrainConfig, wanted: Sequence[int]
) -> dict[int, tuple[float, float]]:
    """Resident megabytes of this process, which trains, and of its workers, after each of the `wanted` steps."""
    os.environ.update(_WITHOUT_GPU)
    keep_freed_memory({})
    torch.set_num_threads(1)
    disable_progress_bar()
    memory = _Memory(wanted)
    model = CtalForPreTraining(CtalConfig.of_size(size, vocab_size=300, **MODEL_DEFAULTS[size]))
    train(objective_on(folder, config, model, PretrainingObjective), config, folder / "run", progress=memory)
    return memory.found


def watch_memory(report: Report, folder: Path, size: str, steps: int) -> None:
    """One training with a worker, in a fresh process, validated and saved ten times."""
    write_store(folder, np.linspace(0.6, 1.4, 40).tolist())
    fields = {"steps": steps, "batch_frames": 100, "checkpoint_every": steps // 10, "workers": 1}
    wanted = [steps // 10, steps // 2, steps]
    found = in_fresh_process(train_and_watch, folder, size, make_config(PretrainConfig, fields), wanted)
    lines = []
    for number, name in enumerate(("training", "its worker")):
        megabytes = [found[step][number] for step in wanted]
        lines.append((name, *map(significant, megabytes)))
        growth = megabytes[-1] / megabytes[0] - 1
        report.checks.append(Check(f"`{size}`, {name}: growth from a tenth of the steps", growth, GROWTH_LIMIT))
    columns = ("resident memory, MB", *(f"after {step:,} steps" for step in wanted))
    report.tables.append(Table(f"Memory over {steps:,} steps of `{size}`, about 1 s of audio each", columns, lines))
    report.measured["memory_mb"] = found


def many_steps(quick: bool) -> Report:
    """Size nano; `quick`: a hundredth of the steps."""
    report = Report("many_steps")
    with tempfile.TemporaryDirectory() as folder:
        watch_memory(report, Path(folder), "nano", 200 if quick else 20_000)
    return report


def main(quick: bool) -> Report:
    """Size base; `quick`: nano, few steps."""
    report = Report("devices")
    size, scale, rounds = ("nano", 0.1, 2) if quick else ("base", 1.0, 2)
    with tempfile.TemporaryDirectory() as folder:
        say("several processes")
        measure_processes(report, Path(folder), size, scale, rounds)
    say("activation checkpointing")
    measure_checkpointing(report, size, 3.75 if quick else 37.5, rounds, has_memory=not quick)
    count_frames(report)
    report.notes += [
        "audio s/s of several processes is that of the slowest; reading is left out, the exchange of gradients is not",
        "times as long: in the same rounds; memory is that of a whole process, libraries included",
    ]
    return report
