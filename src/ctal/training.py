"""The only training loop: every task brings an `Objective`, accelerate brings the devices.

What a step computes depends on the seed, the step and the data, never on how it is spread: losses are sums divided by
counts over all ranks and microbatches. Random numbers are seeded anew for every step, so a resumed run needs no
generator states and equals an uninterrupted one bit for bit (on the same machine with as many threads).
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Protocol

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import Dataset
from torch.utils.tensorboard.writer import SummaryWriter

from ctal.batching import Microbatch, PlannedStep, Position, load, seeded_generator
from ctal.checkpoint import checkpoint_path, list_checkpoints, load_checkpoint, save_checkpoint
from ctal.errors import InputError
from ctal.files import disk_refuses, folder_aside, write_json
from ctal.modeling_ctal import CtalPreTrainedModel
from ctal.precision import check_precision, forward_in
from ctal.processes import Terminated
from ctal.recipes import RunConfig, check_same, learning_rate
from ctal.sharding import gather_to_main, gathered, shard, split_like, synchronise, whole

Batch = Mapping[str, Tensor]
Metrics = dict[str, float]
Forward = Callable[..., Any]
"""A model's forward pass."""


class Objective(Protocol):
    """What a task brings to the loop."""

    @property
    def model(self) -> CtalPreTrainedModel: ...

    @property
    def dataset(self) -> Dataset:
        """`dataset[microbatch]` is a batch, with the arguments of the model's `forward`."""
        ...

    @property
    def frames_per_second(self) -> float: ...

    def score(self, metrics: Metrics) -> float:
        """What marks the best model by its validation metrics: the lowest, and of equal ones the latest."""
        ...

    def rate_scale(self, parameter: str) -> float:
        """Of the learning rate of a parameter by its name; 0 leaves it as it is."""
        ...

    def identity(self) -> dict[str, Any]:
        """Data and architecture as plain values by name, none of them a name of the configuration."""
        ...

    def plan(self, start: Position, rank: int, ranks: int) -> Iterator[PlannedStep]:
        """This rank's share of every step from `start` on, without end; checked before anything is computed."""
        ...

    def validation_microbatches(self) -> Sequence[Microbatch]:
        """The held-out data, always the same."""
        ...

    def counts(self, batch: Batch) -> Tensor:
        """(k,) what each loss's sum is divided by, once added up over a step."""
        ...

    def losses(self, model: Forward, batch: Batch, counts: Tensor) -> dict[str, Tensor]:
        """Scalars by name, already divided by the step's `counts`; the one called `loss` is minimised."""
        ...

    def evaluate(self, model: Forward, batches: Iterator[Batch], reduce: Callable[[Tensor], Tensor]) -> Metrics:
        """Metrics on this rank's held-out batches; `reduce` adds a tensor up over the ranks."""
        ...

    def utterance_ids(self, microbatch: Microbatch) -> list[str]:
        """Names of its utterances, for messages."""
        ...

    def save_model(self, folder: Path, step: int, metrics: Metrics) -> None:
        """Writes a `from_pretrained` folder with its model card; called by one process, while weights are whole."""
        ...


class NonFiniteLoss(Exception):
    """The loss or its gradient is not a number; names the step and the utterances."""


class Progress(Protocol):
    """Shows how the loop gets on."""

    def start(self, done: int, total: int) -> None:
        """`done` of `total` steps are done already."""
        ...

    def step(self, done: int, speed: float, losses: Metrics) -> None:
        """A step is done, at `speed` seconds of audio a second."""
        ...

    def validated(self, step: int, metrics: Metrics) -> None:
        """The model was validated after `step`."""
        ...

    def note(self, message: str) -> None:
        """Something that the user should know."""
        ...


class Silence:
    """A `Progress` that shows nothing."""

    def start(self, done: int, total: int) -> None: ...

    def step(self, done: int, speed: float, losses: Metrics) -> None: ...

    def validated(self, step: int, metrics: Metrics) -> None: ...

    def note(self, message: str) -> None: ...


@dataclass
class _State:
    """What a checkpoint holds beside tensors."""

    step: int = 0
    position: Position = field(default_factory=Position)
    best_metric: float = math.inf
    best_step: int = 0
    best_metrics: Metrics = field(default_factory=dict)

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> _State:
        return cls(**{**state, "position": Position(**state["position"])})


def train(
    objective: Objective, config: RunConfig, out: Path, *, resume: bool = False, progress: Progress | None = None
) -> Metrics:
    """Trains `objective.model`; leaves `out/model`, `out/checkpoints`, `out/metrics.jsonl` and TensorBoard's log.

    Returns the validation metrics of the model in `out/model`, the best one by `objective.score`.

    Raises:
        InputError: `out` holds a run already and `resume` is False, or the run in it is another one; or accelerate was
            told to use an engine of its own.
        Terminated: SIGTERM or Ctrl-C came; a checkpoint was written.
        NonFiniteLoss: Training diverged; the weights were not updated with the bad step.
    """
    return _Loop(objective, config, out, progress or Silence()).run(resume)


def _refuse_other_engines() -> None:
    for flag, engine in {"FSDP": "FSDP", "DEEPSPEED": "DeepSpeed", "MEGATRON_LM": "Megatron-LM"}.items():
        if os.environ.get(f"ACCELERATE_USE_{flag}", "").lower() == "true":
            raise InputError(
                f"accelerate is set to {engine}, which is not supported; launch with --multi_gpu, "
                "and split weights over the processes by --set sharded=true"
            )


def _check_compilable(config: RunConfig, device: torch.device) -> None:
    if config.sharded:
        raise InputError("compile=true and sharded=true do not go together: leave one out")
    if device.type != "cuda":
        raise InputError(f"compile=true is for a GPU, and the model is on {device}: leave it out")


class _Loop:
    def __init__(self, objective: Objective, config: RunConfig, out: Path, progress: Progress) -> None:
        # Tokenizers would warn in every forked worker, where their threads serve nothing.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        _refuse_other_engines()
        self.objective, self.config, self.out, self.progress = objective, config, out, progress
        # A process has one precision by accelerate, whatever it trains; ours is that of a run.
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no")
        self.rank, self.ranks = self.accelerator.process_index, self.accelerator.num_processes
        self.is_main = self.accelerator.is_main_process
        if self.is_main:
            check_precision(config.precision, self.accelerator.device)
        if config.gradient_checkpointing:
            objective.model.activation_checkpointing_enable()
        if config.compile:
            _check_compilable(config, self.accelerator.device)
            objective.model.compile_layers()
        is_sharded = config.sharded and self.ranks > 1
        if is_sharded:
            shard(objective.model, self.accelerator.device)
        groups = parameter_groups(objective.model, config.weight_decay, objective.rate_scale)
        optimizer = torch.optim.AdamW(groups, lr=0.0, eps=config.adam_epsilon, fused=True)
        # Prepared as if for evaluation a model gets its device, but not DDP.
        self.model = self.accelerator.prepare_model(objective.model, evaluation_mode=is_sharded)
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        self.parameters = dict(objective.model.named_parameters())
        self.checkpoints = out / "checkpoints"
        self.state = _State()
        self.signal: int | None = None  # by which this process is to end, which may come at any moment
        self.is_ending = False  # what all ranks agreed on in a step
        self.writer: SummaryWriter | None = None

    def run(self, resume: bool) -> Metrics:
        plan = self._start(resume)
        endings = [signal.SIGTERM]
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not in a worker, whose parent answers it
            endings.append(signal.SIGINT)
        previous = {number: signal.signal(number, self._on_signal) for number in endings}
        if self.is_main:
            self.writer = SummaryWriter(str(self.out / "tensorboard"), purge_step=self.state.step + 1)
        try:
            self.progress.start(self.state.step, self.config.steps)
            if self.state.step == 0:
                self._validate()
            with closing(self._steps(plan)) as steps:
                for planned, batches in steps:
                    self._update(planned, batches)
                    last = self.state.step == self.config.steps
                    is_due = last or self.state.step % self.config.checkpoint_every == 0
                    if is_due:
                        self._validate()
                    if is_due or self.is_ending:
                        self._save()
                    if self.is_ending:
                        break
            # Asked again, for it may have come in the last validation; judging the model, and another training behind
            # it, may take long.
            if self._reduce(torch.tensor(float(self.signal is not None))) > 0:
                number = self.signal or signal.SIGTERM  # that of another rank is not known
                name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
                raise Terminated(f"stopped by {name} after step {self.state.step}; go on with --resume", number)
            return self.state.best_metrics
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            if self.writer:
                self.writer.close()

    def _start(self, resume: bool) -> Iterator[PlannedStep]:
        """Begins a new run in `out`, or takes up the newest checkpoint of the one that is there; plans what is left."""
        saved = self.out / "config.json"
        if resume:
            if not saved.exists():
                raise InputError(f"{self.out}: no run to resume; leave --resume out to start one")
            check_same(json.loads(saved.read_text()), self.config, self.objective.identity())
            found = list_checkpoints(self.checkpoints)
            if found:
                self._load(found[-1])
        elif saved.exists():
            raise InputError(f"{self.out}: holds a run already; add --resume to go on, or choose another --out")
        elif taken := [name for name in ("model", "evaluation.json", "report.html") if (self.out / name).exists()]:
            raise InputError(f"{self.out}: holds a {taken[0]} that is of no run; choose another --out")
        # Before the run is there, which --resume could not mend.
        plan = self.objective.plan(self.state.position, self.rank, self.ranks)
        self.accelerator.wait_for_everyone()
        if self.is_main:
            try:
                self.checkpoints.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise disk_refuses(self.out, error, "choose another --out") from None
            write_json(saved, self._identity())
            self._forget_later_metrics()
        return plan

    def _identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with the run that it continues."""
        return {**self.config.model_dump(), **self.objective.identity()}

    def _steps(self, plan: Iterator[PlannedStep]) -> Generator[tuple[PlannedStep, Sequence[Batch]]]:
        """Planned steps with their batches, which workers make ahead of time."""
        planned: list[PlannedStep] = []
        left = self.config.steps - self.state.step

        def microbatches() -> Iterator[Microbatch]:
            for _, step in zip(range(left), plan, strict=False):
                planned.append(step)
                yield from step.microbatches

        with closing(load(self.objective.dataset, microbatches(), self.config.workers)) as batches:
            for _ in range(left):
                held = [next(batches) for _ in range(self.config.accumulation)]
                yield planned.pop(0), held

    def _update(self, planned: PlannedStep, batches: Sequence[Batch]) -> None:
        """One step of the optimiser, on all microbatches of all ranks."""
        began = time.perf_counter()
        batches = [self._on_device(batch) for batch in batches]
        weights = [microbatch.weight for microbatch in planned.microbatches]
        weighted = [self.objective.counts(batch) * weight for batch, weight in zip(batches, weights, strict=True)]
        counts = self._reduce(torch.stack(weighted).sum(0))
        torch.manual_seed(seeded_generator(self.config.seed, self.state.step, self.rank).initial_seed())
        self.model.train()
        losses: list[dict[str, Tensor]] = []
        for number, (batch, weight) in enumerate(zip(batches, weights, strict=True)):
            last = number == len(batches) - 1
            synchronise(self.model, last)
            waiting: AbstractContextManager = nullcontext() if last else self.accelerator.no_sync(self.model)
            with waiting:
                named = self.objective.losses(self._forward(self.model), batch, counts)
                losses.append({name: value * weight for name, value in named.items()})
                # Gradients are averaged over ranks, but each loss is a share of the whole already.
                self.accelerator.backward(losses[-1]["loss"] * self.ranks)
        norm = self.accelerator.clip_grad_norm_(list(self.parameters.values()), self.config.max_grad_norm)
        assert norm is not None
        norm = float(gathered(norm))

        is_finite = [bool(torch.isfinite(each["loss"])) for each in losses]
        names = list(losses[0])
        lengths = (batch["feature_attention_mask"].sum() for batch in batches)
        frames = sum(int(length) * weight for length, weight in zip(lengths, weights, strict=True))
        shared = [torch.stack([each[name].detach().float() for each in losses]).sum() for name in names]
        flags = [float(not (all(is_finite) and math.isfinite(norm))), float(self.signal is not None), float(frames)]
        summary = self._reduce(torch.cat([torch.stack(shared), torch.tensor(flags, device=shared[0].device)]))
        *values, bad, terminated, frames = summary.tolist()
        if bad:
            self._raise_non_finite(planned, is_finite)
        self.is_ending = terminated > 0

        rate = learning_rate(self.config, self.state.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate_scale"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.state.step += 1
        self.state.position = planned.after

        speed = frames / self.objective.frames_per_second / (time.perf_counter() - began)
        now = dict(zip(names, values, strict=True))
        self.progress.step(self.state.step, speed, now)
        if self.state.step % self.config.log_every == 0 or self.state.step == self.config.steps:
            extra = {"learning_rate": rate, "gradient_norm": norm, "audio_seconds_per_second": speed}
            self._record("train", {**now, **extra})

    @torch.no_grad()
    def _validate(self) -> None:
        """Measures the held-out data; the best model so far goes to `out/model`."""
        self.model.eval()
        mine = list(self.objective.validation_microbatches())[self.rank :: self.ranks]
        model = self.accelerator.unwrap_model(self.model)
        with whole(model):
            with closing(load(self.objective.dataset, iter(mine), self.config.workers)) as batches:
                metrics = self.objective.evaluate(self._forward(model), map(self._on_device, batches), self._reduce)
            self._record("validation", metrics)
            self.progress.validated(self.state.step, metrics)
            metric = self.objective.score(metrics)
            if metric <= self.state.best_metric:
                self.state.best_metric, self.state.best_step, self.state.best_metrics = metric, self.state.step, metrics
                if self.is_main:
                    with folder_aside(self.out / "model") as folder:
                        self.objective.save_model(folder, self.state.step, metrics)

    def _save(self) -> None:
        """Writes a checkpoint and removes those that are neither recent nor best."""
        moments = {
            f"{name}/{key}": value
            for name, parameter in self.parameters.items()
            for key, value in self.optimizer.state[parameter].items()
        }
        parts = {"model": self.parameters, "optimizer": moments}
        tensors = {name: gather_to_main(part, self.is_main) for name, part in parts.items()}
        if self.is_main:
            save_checkpoint(checkpoint_path(self.checkpoints, self.state.step), tensors, asdict(self.state))
            best = checkpoint_path(self.checkpoints, self.state.best_step)
            for old in list_checkpoints(self.checkpoints)[: -self.config.keep_checkpoints]:
                if old != best:
                    shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    @torch.no_grad()
    def _load(self, path: Path) -> None:
        checkpoint = load_checkpoint(path)
        for name, parameter in self.parameters.items():
            parameter.copy_(split_like(checkpoint.tensors["model"][name], parameter))
        for entry, value in checkpoint.tensors["optimizer"].items():
            name, key = entry.rsplit("/", 1)
            parameter = self.parameters[name]
            # The step counter of the fused optimiser lives where the parameter does, like its moments.
            self.optimizer.state[parameter][key] = split_like(value, parameter)
        self.state = _State.from_json(checkpoint.state)

    def _record(self, kind: str, values: Metrics) -> None:
        if self.writer:
            with (self.out / "metrics.jsonl").open("a") as log:
                log.write(json.dumps({"kind": kind, "step": self.state.step, **values}) + "\n")
            for name, value in values.items():
                self.writer.add_scalar(f"{kind}/{name}", value, self.state.step)

    def _forget_later_metrics(self) -> None:
        """An interrupted run may have logged steps that its last checkpoint does not have; they come again."""
        path = self.out / "metrics.jsonl"
        if path.exists():
            rows = [line for line in path.read_text().splitlines() if line.endswith("}")]
            kept = [row for row in rows if json.loads(row)["step"] <= self.state.step and self.state.step]
            path.write_text("".join(row + "\n" for row in kept))

    def _raise_non_finite(self, planned: PlannedStep, is_finite: Sequence[bool]) -> NoReturn:
        where = f"step {self.state.step + 1}, epoch {planned.after.epoch}"
        bad = [part for part, fine in zip(planned.microbatches, is_finite, strict=True) if not fine]
        ids: list[str] = gather_object(self.objective.utterance_ids(bad[0]) if bad else [])  # the main process tells
        if not ids:
            raise NonFiniteLoss(f"{where}: the gradient is not finite; lower learning_rate")
        names = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
        raise NonFiniteLoss(f"{where}: the loss is not finite; lower learning_rate, or look at {names}")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """The step is finished first; a second Ctrl-C does not wait for it."""
        if number == signal.SIGINT and self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number

    def _forward(self, model: torch.nn.Module) -> Forward:
        return forward_in(self.config.precision, self.accelerator.device, model)

    def _on_device(self, batch: Batch) -> Batch:
        return to_device(batch, self.accelerator.device)

    def _reduce(self, values: Tensor) -> Tensor:
        reduced = self.accelerator.reduce(values.to(self.accelerator.device), reduction="sum")
        assert isinstance(reduced, Tensor)
        return reduced


def process_state() -> PartialState:
    """Which of a launcher's processes this is; the first call joins them."""
    return PartialState(cpu=not torch.cuda.is_available())


def evaluation_device() -> torch.device:
    """On which this process judges models."""
    device = process_state().device
    return device if device and torch.cuda.is_available() else torch.device("cpu")


def to_device(batch: Batch, device: torch.device) -> Batch:
    """What waits on the host in pinned memory need not be waited for."""
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def parameter_groups(
    model: torch.nn.Module, weight_decay: float, rate_scale: Callable[[str], float]
) -> list[dict[str, Any]]:
    """Parameters by weight decay and learning rate; those whose rate is 0 are taken out of training.

    Biases and LayerNorms are not decayed (BERT's convention).
    """
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        scale = rate_scale(name)
        if scale:
            groups.setdefault((weight_decay if parameter.ndim > 1 else 0.0, scale), []).append(parameter)
        else:
            parameter.requires_grad_(False)
    return [
        {"params": parameters, "weight_decay": decay, "rate_scale": scale}
        for (decay, scale), parameters in sorted(groups.items(), reverse=True, key=lambda group: group[0])
    ]
