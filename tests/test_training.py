"""The training loop: what a step computes, and what is left when a run ends, however it ends."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn

from conftest import NANO, CtalProcess, TinyCorpus, losses, pretrain_arguments
from ctal.batching import Corpus, Position
from ctal.checkpoint import checkpoint_path, list_checkpoints, load_checkpoint
from ctal.errors import InputError
from ctal.feature_extraction_ctal import CtalFeatureExtractor
from ctal.pretrain import PretrainingObjective, load_tokenizer, make_tokenizer, new_model
from ctal.processes import leave_processes
from ctal.processing_ctal import CtalProcessor
from ctal.recipes import PretrainConfig, make_config
from ctal.store import Store
from ctal.training import Batch, Forward, Metrics, NonFiniteLoss, Silence, parameter_groups, train


def config_of(**fields: Any) -> PretrainConfig:
    return make_config(PretrainConfig, NANO, fields)


def objective_of(
    tiny: TinyCorpus,
    config: PretrainConfig,
    kind: type[PretrainingObjective] = PretrainingObjective,
    **architecture: Any,
) -> PretrainingObjective:
    """A nano model, without dropout unless asked for."""
    processor = CtalProcessor(CtalFeatureExtractor(), load_tokenizer(tiny.tokenizer))
    torch.manual_seed(config.seed)
    model = new_model("nano", processor, {"frame_stack": 2, "hidden_dropout_prob": 0, **architecture})
    return kind(model, processor, Corpus([Store(tiny.store)]), config)


def run(tiny: TinyCorpus, out: Path, resume: bool = False, **fields: Any) -> dict[int, dict[str, float]]:
    """Step → losses of a run in this process."""
    config = config_of(**fields)
    train(objective_of(tiny, config), config, out, resume=resume)
    return losses(out)


def assert_same_losses(one: dict[int, dict[str, float]], other: dict[int, dict[str, float]]) -> None:
    """Within 1e-5, but for steps of the audio's, which is within that on average.

    Rounding is multiplied where a prediction all but meets its target: there the gradient of an L1 loss jumps.
    """
    assert one.keys() == other.keys()
    for name in next(iter(one.values())):
        differences = [abs(values[name] - other[step][name]) for step, values in one.items()]
        assert sum(differences) / len(differences) <= 1e-5, name
        assert max(differences) <= (1e-5 if name == "text_loss" else 1e-4), name


def final_tensors(out: Path) -> dict[str, Tensor]:
    groups = load_checkpoint(list_checkpoints(out / "checkpoints")[-1]).tensors
    return {f"{group}/{name}": tensor for group, named in groups.items() for name, tensor in named.items()}


def assert_same_run(one: Path, other: Path) -> None:
    """Bit for bit: weights, moments, losses, and which model was the best."""
    for kind in ("train", "validation"):
        assert losses(one, kind) == losses(other, kind)
    first, second = final_tensors(one), final_tensors(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    best = [(path / "model" / "model.safetensors").read_bytes() for path in (one, other)]
    assert best[0] == best[1]
    states = [load_checkpoint(list_checkpoints(path / "checkpoints")[-1]).state for path in (one, other)]
    assert states[0] == states[1]


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What a step computes ---------------------------------------------------------------------------------------------

WIDE: dict[str, Any] = {"batch_frames": 900, "steps": 50, "keep_checkpoints": 9}
"""Steps of at least 8 utterances, which suffice for 4 microbatches."""


@pytest.fixture(scope="module")
def undivided(tiny: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, float]]:
    """50 steps on one process without accumulation."""
    return run(tiny, tmp_path_factory.mktemp("undivided") / "run", **WIDE)


def test_it_learns(undivided: dict[int, dict[str, float]]) -> None:
    assert list(undivided) == list(range(1, 51))
    first, last = (sum(undivided[step]["loss"] for step in steps) / 5 for steps in (range(1, 6), range(46, 51)))
    assert last < first - 0.3


def test_accumulation_does_not_change_the_losses(
    tiny: TinyCorpus, tmp_path: Path, undivided: dict[int, dict[str, float]]
) -> None:
    assert_same_losses(run(tiny, tmp_path / "run", accumulation=4, **WIDE), undivided)


def test_the_number_of_workers_does_not_change_the_losses(
    tiny: TinyCorpus, tmp_path: Path, undivided: dict[int, dict[str, float]]
) -> None:
    assert run(tiny, tmp_path / "run", workers=2, **WIDE) == undivided


def test_computing_activations_again_changes_nothing(tiny: TinyCorpus, tmp_path: Path) -> None:
    """Not even dropout."""
    config, again = config_of(steps=5), config_of(steps=5, gradient_checkpointing=True)
    for each, out in ((config, "kept"), (again, "again")):
        objective = objective_of(tiny, each, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
        train(objective, each, tmp_path / out)
    assert_same_run(tmp_path / "again", tmp_path / "kept")


def test_activations_are_computed_again_when_asked(tiny: TinyCorpus) -> None:
    """What the backward pass finds kept."""

    def kept(gradient_checkpointing: bool) -> int:
        objective = objective_of(tiny, config_of())
        if gradient_checkpointing:
            objective.model.activation_checkpointing_enable()
        batch = objective.dataset[objective.validation_microbatches()[0]]
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: sizes.append(tensor.numel()) or tensor, lambda x: x
        ):
            objective.model.train()(**batch)
        return sum(sizes)

    assert kept(True) < kept(False) / 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to compile for")
def test_layers_are_not_compiled_where_it_does_not_pay(tiny: TinyCorpus, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="compile=true is for a GPU"):
        run(tiny, tmp_path / "run", compile=True)
    with pytest.raises(InputError, match="do not go together"):
        run(tiny, tmp_path / "run", compile=True, sharded=True)
    assert not (tmp_path / "run").exists()


def test_biases_and_layer_norms_are_not_decayed(tiny: TinyCorpus) -> None:
    model = objective_of(tiny, config_of()).model
    decayed, spared = parameter_groups(model, 0.01, lambda name: 1.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameter in spared["params"]:
        assert names[id(parameter)].endswith(("bias", "norm.weight", "token_type_embedding"))
    for parameter in decayed["params"]:
        assert not names[id(parameter)].endswith(("bias", "norm.weight"))
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.01, 0)
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


def launched(*launcher: str, arguments: list[str]) -> subprocess.Popen[str]:
    """`python -m LAUNCHER … -m ctal ARGUMENTS` on two gloo processes."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *launcher, "-m", "ctal", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ACCELERATE = (
    *("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
)
"""`--cpu` would be one process, whatever `--num_processes` says (accelerate 1.15, without MPI); without a GPU,
`--multi_gpu` means gloo."""


def test_two_ranks_under_torchrun_equal_one(
    tiny: TinyCorpus, tmp_path: Path, undivided: dict[int, dict[str, float]]
) -> None:
    arguments = pretrain_arguments(tiny, tmp_path / "run", accumulation=2, **WIDE)
    process = launched(*TORCHRUN, arguments=arguments)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert_same_losses(losses(tmp_path / "run"), undivided)
    assert (tmp_path / "run" / "evaluation.json").is_file()
    assert output.count("to train on") == 1, "only one process speaks"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def join_as(rank: int, port: int) -> None:
    """This process is one of two, as a launcher would have it."""
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})


def train_on_one_of_two(rank: int, port: int, tiny: TinyCorpus, out: Path, shares: Any) -> None:
    """With split weights; notes the share of them that this process holds."""
    join_as(rank, port)
    config = config_of(sharded=True, gradient_checkpointing=True, **WIDE)
    objective = objective_of(tiny, config)
    whole = objective.model.num_parameters()
    train(objective, config, out, resume=(out / "config.json").exists())
    assert isinstance(objective.model, FSDPModule)
    held = [
        parameter.to_local().numel() for parameter in objective.model.parameters() if isinstance(parameter, DTensor)
    ]
    shares[rank] = sum(held) / whole
    leave_processes()


def test_split_weights_change_nothing_and_move_between_one_process_and_two(
    tiny: TinyCorpus, tmp_path: Path, undivided: dict[int, dict[str, float]]
) -> None:
    out = tmp_path / "run"

    def forget_after(step: int) -> None:
        for path in list_checkpoints(out / "checkpoints"):
            if path > checkpoint_path(out / "checkpoints", step):
                shutil.rmtree(path)

    run(tiny, out, **WIDE)
    forget_after(10)
    shares = multiprocessing.get_context("spawn").Array("d", 2)
    spawn(train_on_one_of_two, (free_port(), tiny, out, shares), nprocs=2)
    assert [0.4 < share < 0.6 for share in shares] == [True, True]
    assert_same_losses(losses(out), undivided)
    forget_after(40)
    assert_same_losses(run(tiny, out, resume=True, **WIDE), undivided)


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_other_engines_of_accelerate_are_refused_with_the_mend(
    tiny: TinyCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    assert "--set sharded=true" in refusal(lambda: run(tiny, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_killed_rank_ends_the_job_with_the_reason_and_it_resumes(
    tiny: TinyCorpus, tmp_path: Path, undivided: dict[int, dict[str, float]]
) -> None:
    arguments = pretrain_arguments(tiny, tmp_path / "run", accumulation=2, checkpoint_every=10, **WIDE)
    process = launched(*TORCHRUN, arguments=arguments)
    while not list_checkpoints(tmp_path / "run" / "checkpoints") and process.poll() is None:
        time.sleep(0.05)
    ranks = [child for child in psutil.Process(process.pid).children() if "ctal" in child.cmdline()]
    second = next(child for child in ranks if child.environ()["RANK"] == "1")
    second.kill()
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert re.search(r"rank\s*:\s*1 ", output), output
    assert "SIGKILL" in output
    assert max(losses(tmp_path / "run")) < WIDE["steps"]

    run(tiny, tmp_path / "run", resume=True, accumulation=2, checkpoint_every=10, **WIDE)
    assert_same_losses(losses(tmp_path / "run"), undivided)


NARROW: dict[str, Any] = {"batch_frames": 300, "steps": 6, "seed": 5}
"""Steps of two utterances on average; one of them holds a single one."""


def test_a_step_of_fewer_utterances_than_processes_changes_nothing(tiny: TinyCorpus, tmp_path: Path) -> None:
    planned = list(objective_of(tiny, config_of(**NARROW)).step_plan().steps(0))
    assert 1 in [len(rows) for rows in planned[:6]]
    alone = run(tiny, tmp_path / "alone", **NARROW)
    process = launched(*TORCHRUN, arguments=pretrain_arguments(tiny, tmp_path / "run", frame_stack=2, **NARROW))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert_same_losses(losses(tmp_path / "run"), alone)
    assert_same_losses(run(tiny, tmp_path / "accumulated", accumulation=2, **NARROW), alone)


def test_sigterm_of_one_rank_under_accelerate_saves_and_the_run_goes_on_with_another_number_of_ranks(
    tiny: TinyCorpus, tmp_path: Path, undivided: dict[int, dict[str, float]]
) -> None:
    out = tmp_path / "run"
    process = launched(*ACCELERATE, arguments=pretrain_arguments(tiny, out, checkpoint_every=5, **WIDE))
    wait_until(lambda: (out / "metrics.jsonl").is_file() and len(losses(out)) >= 2, process)
    ranks = {rank_of(child): child for child in psutil.Process(process.pid).children(recursive=True)}
    ranks["1"].send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)

    stopped = [line for line in output.splitlines() if line.startswith("ctal: stopped by SIGTERM after step ")]
    assert len(stopped) == 1, output
    assert "143" in output, "the launcher reports the exit code of its worker"
    step = int(stopped[0].split("after step ")[1].split(";")[0])
    assert list_checkpoints(out / "checkpoints")[-1] == checkpoint_path(out / "checkpoints", step)
    resumed = run(tiny, out, resume=True, checkpoint_every=5, **WIDE)
    assert_same_losses(resumed, undivided)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    limit = time.monotonic() + 90
    while not condition():
        assert process is None or process.poll() is None, process.communicate()[0]
        assert time.monotonic() < limit
        time.sleep(0.02)


def rank_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("RANK")
    except psutil.Error:
        return None


# However a run ends -----------------------------------------------------------------------------------------------

KILLED: dict[str, Any] = {"steps": 10, "checkpoint_every": 2, "hidden_dropout_prob": 0.1}
"""Runs that are interrupted; with dropout, whose random numbers must come again too."""

FILE_EVENTS = 200
"""About so many times such a run opens, makes, moves or removes something."""


@pytest.fixture(scope="module")
def uninterrupted(tiny: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    finished = CtalProcess(pretrain_arguments(tiny, folder / "run", **KILLED), folder).wait()
    assert finished.code == 0, finished.errors
    return folder / "run"


def resume(tiny: TinyCorpus, folder: Path, **fields: Any) -> None:
    """Goes on with the run in `folder/run`, or starts it where nothing had been written yet."""
    out = folder / "run"
    flags = ["--resume"] if (out / "config.json").exists() else []
    finished = CtalProcess(pretrain_arguments(tiny, out, *flags, **{**KILLED, **fields}), folder).wait()
    assert finished.code == 0, finished.errors


def kills() -> list[tuple[str, int]]:
    """Five random points: after a step, and at any operation on a file, which is mostly within a checkpoint."""
    draw = random.Random(20211107)
    return [("step", draw.randint(1, 9)), ("step", draw.randint(1, 9))] + [
        ("file", draw.randint(10, FILE_EVENTS)) for _ in range(3)
    ]


@pytest.mark.parametrize("die_at", kills(), ids=lambda point: f"{point[0]}-{point[1]}")
def test_killed_with_sigkill_and_resumed_equals_uninterrupted_bit_for_bit(
    tiny: TinyCorpus, tmp_path: Path, uninterrupted: Path, die_at: tuple[str, int]
) -> None:
    killed = CtalProcess(pretrain_arguments(tiny, tmp_path / "run", **KILLED), tmp_path, die_at).wait()
    assert killed.code == -signal.SIGKILL, killed.errors
    resume(tiny, tmp_path)
    assert_same_run(tmp_path / "run", uninterrupted)


def test_killed_from_outside_with_workers_while_it_writes_equals_uninterrupted(
    tiny: TinyCorpus, tmp_path: Path, uninterrupted: Path
) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    process = CtalProcess(pretrain_arguments(tiny, tmp_path / "run", **{**KILLED, "workers": 1}), tmp_path)
    wait_until(lambda: any(checkpoints.glob("step-00000004*")))
    os.killpg(process.group, signal.SIGKILL)
    assert process.wait().code == -signal.SIGKILL
    resume(tiny, tmp_path)
    assert_same_run(tmp_path / "run", uninterrupted)


def test_sigterm_saves_exits_with_143_and_resume_goes_on_bit_for_bit(
    tiny: TinyCorpus, tmp_path: Path, uninterrupted: Path
) -> None:
    stopped = CtalProcess(pretrain_arguments(tiny, tmp_path / "run", **KILLED), tmp_path, ("term", 5)).wait()
    assert stopped.code == 143
    assert stopped.errors.splitlines()[-1].startswith("ctal: stopped by SIGTERM after step 6; go on with --resume")
    assert "Traceback" not in stopped.errors
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "step-00000006"
    resume(tiny, tmp_path)
    assert_same_run(tmp_path / "run", uninterrupted)


def test_a_signal_in_the_last_step_ends_the_run_once_it_is_saved(
    tiny: TinyCorpus, tmp_path: Path, uninterrupted: Path
) -> None:
    """What follows a training, such as judging the model or another training, may take long."""
    last = KILLED["steps"]
    stopped = CtalProcess(pretrain_arguments(tiny, tmp_path / "run", **KILLED), tmp_path, ("term", last)).wait()
    assert stopped.code == 143
    assert stopped.errors.splitlines()[-1].startswith(f"ctal: stopped by SIGTERM after step {last}; ")
    assert not (tmp_path / "run" / "report.html").exists()
    resume(tiny, tmp_path)
    assert (tmp_path / "run" / "report.html").exists()
    assert_same_run(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize(("number", "code", "name"), [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "Ctrl-C")])
def test_a_signal_to_the_whole_group_spares_the_workers_until_the_checkpoint_is_written(
    tiny: TinyCorpus, tmp_path: Path, number: signal.Signals, code: int, name: str
) -> None:
    """As `timeout`, systemd and Slurm send it, and a terminal on Ctrl-C."""
    out = tmp_path / "run"
    process = CtalProcess(pretrain_arguments(tiny, out, steps=1000, workers=2), tmp_path)
    wait_until(lambda: (out / "metrics.jsonl").is_file() and len(losses(out)) >= 2)
    os.killpg(process.group, number)
    stopped = process.wait(30)
    assert stopped.code == code, stopped.errors
    assert f"ctal: stopped by {name} after step" in stopped.errors.splitlines()[-1]
    assert list_checkpoints(out / "checkpoints")


class Impatient(Silence):
    """Presses Ctrl-C twice."""

    def step(self, done: int, speed: float, losses: Metrics) -> None:
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)


def test_a_second_ctrl_c_does_not_wait(tiny: TinyCorpus, tmp_path: Path) -> None:
    objective = objective_of(tiny, config_of(steps=50))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        train(objective, config_of(steps=50), tmp_path / "other", progress=Impatient())
    signal.signal(signal.SIGINT, before)


def test_resuming_a_finished_run_changes_nothing(tiny: TinyCorpus, tmp_path: Path) -> None:
    before = run(tiny, tmp_path / "run", steps=3)
    weights = final_tensors(tmp_path / "run")
    assert run(tiny, tmp_path / "run", resume=True, steps=3) == before
    after = final_tensors(tmp_path / "run")
    assert all(torch.equal(weights[name], after[name]) for name in weights)


class Graded(PretrainingObjective):
    """Whose validation says that step 3 is the best."""

    def evaluate(self, model: Forward, batches: Iterator[Batch], reduce: Callable[[Tensor], Tensor]) -> Metrics:
        self.asked = getattr(self, "asked", -1) + 1
        loss = float(abs(self.asked - 3) + 1)
        return {"loss": loss, "text_loss": loss, "audio_loss": 0.0}


def test_the_last_checkpoints_and_the_best_are_kept_and_the_best_is_the_model(tiny: TinyCorpus, tmp_path: Path) -> None:
    config = config_of(steps=7, checkpoint_every=1, keep_checkpoints=2)
    best = train(objective_of(tiny, config, Graded), config, tmp_path / "run")
    assert best["loss"] == 1
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == [
        "step-00000003",
        "step-00000006",
        "step-00000007",
    ]
    assert json.loads((tmp_path / "run" / "model" / "run.json").read_text())["step"] == 3
    from ctal import CtalForPreTraining

    model = CtalForPreTraining.from_pretrained(tmp_path / "run" / "model")
    saved = load_checkpoint(checkpoint_path(tmp_path / "run" / "checkpoints", 3)).tensors["model"]
    assert all(torch.equal(parameter, saved[name]) for name, parameter in model.named_parameters())


def test_a_run_s_folder_is_not_overwritten_nor_resumed_where_there_is_none(tiny: TinyCorpus, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert refusal(lambda: run(tiny, out, resume=True)) == f"{out}: no run to resume; leave --resume out to start one"
    run(tiny, out, steps=2)
    assert "holds a run already; add --resume" in refusal(lambda: run(tiny, out, steps=2))
    (tmp_path / "mine" / "model").mkdir(parents=True)
    assert "holds a model that is of no run" in refusal(lambda: run(tiny, tmp_path / "mine"))
    (tmp_path / "file").write_text("mine")
    assert f"{tmp_path / 'file'}: cannot be written" in refusal(lambda: run(tiny, tmp_path / "file"))


def test_a_resumed_run_must_have_the_same_settings_but_for_harmless_ones(tiny: TinyCorpus, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(tiny, out, steps=4, checkpoint_every=2)
    message = refusal(lambda: run(tiny, out, resume=True, steps=4, checkpoint_every=2, learning_rate=1e-4))
    assert message.startswith("--resume: learning_rate is 0.0001, but the run was started with 0.002")
    run(tiny, out, resume=True, steps=4, checkpoint_every=2, workers=1, log_every=3, keep_checkpoints=1)


@pytest.mark.parametrize(
    ("architecture", "name"),
    [({"num_hidden_layers": 3}, "num_hidden_layers"), ({"num_attention_heads": 4}, "num_attention_heads")],
)
def test_a_resumed_run_must_have_the_same_architecture(
    tiny: TinyCorpus, tmp_path: Path, architecture: dict[str, Any], name: str
) -> None:
    run(tiny, tmp_path / "run", steps=2)
    config = config_of(steps=2)
    other = objective_of(tiny, config, **architecture)
    assert name in refusal(lambda: train(other, config, tmp_path / "run", resume=True))


def test_a_resumed_run_must_have_the_same_tokenizer(tiny: TinyCorpus, tmp_path: Path) -> None:
    run(tiny, tmp_path / "run", steps=2)
    config = config_of(steps=2)
    other = objective_of(tiny, config)
    (tmp_path / "lines.txt").write_text("quite other words that make quite other pieces of words\n")
    make_tokenizer([tmp_path / "lines.txt"], tmp_path / "tokenizer", 290)
    other.processor.tokenizer = load_tokenizer(tmp_path / "tokenizer")
    assert "tokenizer is" in refusal(lambda: train(other, config, tmp_path / "run", resume=True))


def test_a_resumed_run_must_have_the_same_data(tiny: TinyCorpus, tmp_path: Path) -> None:
    run(tiny, tmp_path / "run", steps=2)
    saved = tmp_path / "run" / "config.json"
    saved.write_text(json.dumps({**json.loads(saved.read_text()), "data_hash": "another"}))
    objective = objective_of(tiny, config_of(steps=2))
    said = refusal(lambda: train(objective, config_of(steps=2), tmp_path / "run", resume=True))
    assert "the stores are not those of the run" in said


def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_serves_once_it_is_removed(
    tiny: TinyCorpus, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    whole = run(tiny, out, steps=4, checkpoint_every=2)
    newest = list_checkpoints(out / "checkpoints")[-1]
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    message = refusal(lambda: run(tiny, out, resume=True, steps=4, checkpoint_every=2))
    assert message.startswith(f"{weights}: does not match manifest.json; remove {newest}")
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    assert run(tiny, out, resume=True, steps=4, checkpoint_every=2) == whole


# A loss that is not a number --------------------------------------------------------------------------------------


class Diverging(PretrainingObjective):
    """Whose third step has no loss; remembers that step's utterances and the weights before it."""

    steps = 0

    def losses(self, model: Forward, batch: Batch, counts: Tensor) -> dict[str, Tensor]:
        found = super().losses(model, batch, counts)
        if torch.is_grad_enabled():
            self.steps += 1
            if self.steps == 3:
                self.before = {name: value.clone() for name, value in self.model.state_dict().items()}
                found["loss"] = found["loss"] * torch.nan
        return found


def test_a_loss_that_is_not_finite_stops_names_the_batch_and_leaves_the_weights(
    tiny: TinyCorpus, tmp_path: Path
) -> None:
    config = config_of(checkpoint_every=1)
    objective = objective_of(tiny, config, Diverging)
    assert isinstance(objective, Diverging)
    with pytest.raises(NonFiniteLoss) as caught:
        train(objective, config, tmp_path / "run")
    message = str(caught.value)
    assert message.startswith("step 3, epoch ")
    assert "\n" not in message
    *_, third = zip(range(3), objective.plan(Position(), 0, 1), strict=False)
    assert third[1].microbatches
    for name in objective.utterance_ids(third[1].microbatches[0])[:8]:
        assert name in message
    after = objective.model.state_dict()
    assert all(torch.equal(objective.before[name], after[name]) for name in after)
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "step-00000002"


def diverge_on_the_second_of_two(rank: int, port: int, tiny: TinyCorpus, out: Path) -> None:
    join_as(rank, port)
    config = config_of(**WIDE)
    objective = objective_of(tiny, config, Diverging if rank else PretrainingObjective)
    with pytest.raises(NonFiniteLoss) as caught:
        train(objective, config, out / "run")
    (out / f"said by {rank}").write_text(str(caught.value))
    assert "pt_gloo_runloop" in threads()
    traceback.clear_frames(caught.tb)
    del objective
    leave_processes()
    assert "pt_gloo_runloop" not in threads(), "one might outlive the interpreter"


def threads() -> list[str]:
    """Names of this process's threads."""
    return [thread.read_text().strip() for thread in Path("/proc/self/task").glob("*/comm")]


def test_the_main_process_names_the_batch_of_another_whose_loss_is_not_finite(tiny: TinyCorpus, tmp_path: Path) -> None:
    spawn(diverge_on_the_second_of_two, (free_port(), tiny, tmp_path), nprocs=2)
    objective = objective_of(tiny, config_of(**WIDE))
    *_, third = zip(range(3), objective.plan(Position(), 1, 2), strict=False)
    for rank in range(2):
        said = (tmp_path / f"said by {rank}").read_text()
        assert said.startswith("step 3, epoch ")
        for name in objective.utterance_ids(third[1].microbatches[0])[:8]:
            assert name in said


def test_a_gradient_that_is_not_finite_stops_too(tiny: TinyCorpus, tmp_path: Path) -> None:
    config = config_of()
    objective = objective_of(tiny, config)
    parameter = next(objective.model.parameters())
    parameter.register_hook(lambda gradient: gradient * torch.inf)
    before = parameter.detach().clone()
    with pytest.raises(NonFiniteLoss, match="the gradient is not finite"):
        train(objective, config, tmp_path / "run")
    assert torch.equal(parameter, before)


# What is told -----------------------------------------------------------------------------------------------------


class Listener(Silence):
    def __init__(self) -> None:
        self.heard: list[tuple[str, int]] = []

    def start(self, done: int, total: int) -> None:
        self.heard.append(("start", done))

    def step(self, done: int, speed: float, losses: Metrics) -> None:
        assert speed > 0
        assert losses.keys() == {"loss", "text_loss", "audio_loss"}
        self.heard.append(("step", done))

    def validated(self, step: int, metrics: Metrics) -> None:
        self.heard.append(("validated", step))


def test_progress_hears_of_every_step_and_validation_and_the_logs_have_them(tiny: TinyCorpus, tmp_path: Path) -> None:
    out, listener = tmp_path / "run", Listener()
    config = config_of(steps=4, checkpoint_every=2, log_every=3)
    train(objective_of(tiny, config), config, out, progress=listener)
    steps = [("step", 1), ("step", 2), ("validated", 2), ("step", 3), ("step", 4), ("validated", 4)]
    assert listener.heard == [("start", 0), ("validated", 0), *steps]
    assert list(losses(out)) == [3, 4]
    assert list(losses(out, "validation")) == [0, 2, 4]
    assert list((out / "tensorboard").iterdir())
