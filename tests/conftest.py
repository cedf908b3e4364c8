"""Shared facts of the tests: where the optional recordings lie, one thread a worker, no network, a tiny corpus."""

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parents[1]
REFERENCE = REPOSITORY.parent / "shared" / "reference"
REAL = REPOSITORY.parent / "shared" / "real"

needs_reference = pytest.mark.skipif(
    not REFERENCE.is_dir(), reason="recorded outputs of the authors' code (../shared/reference) are absent"
)
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="real recordings (../shared/real) are absent")


@pytest.fixture(autouse=True, scope="session")
def _one_thread_a_worker():
    """pytest-xdist runs one worker a core; more threads would only fight, and would make timings jump."""
    import torch

    torch.set_num_threads(1)


# A tiny corpus, and `ctal` run on it ------------------------------------------------------------------------------

WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "red", "green", "blue", "tea", "milk")
SPEAKERS = 6


@dataclass(frozen=True)
class TinyCorpus:
    """24 tones in noise of 0.3–2.5 s: 6 speakers, 4 utterances each, of which every speaker's last has no text."""

    manifest: Path
    store: Path
    tokenizer: Path


def record(path: Path, seconds: float, pitch: float = 200.0, seed: int = 0) -> Path:
    """A tone that rises, in noise, at 16 kHz."""
    import numpy as np
    import soundfile

    rng = np.random.default_rng(seed)
    time = np.arange(int(16_000 * seconds)) / 16_000
    wave = 0.3 * np.sin(2 * np.pi * pitch * (1 + 0.5 * time) * time) + rng.normal(0, 0.02, len(time))
    soundfile.write(path, wave, 16_000)
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyCorpus:
    import numpy as np

    from ctal.corpora import get_corpus
    from ctal.pretrain import make_tokenizer
    from ctal.store import prepare_store

    folder = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(7)
    lines = []
    for number in range(24):
        speaker = number % SPEAKERS
        seconds = float(rng.uniform(0.3, 2.5))
        audio = record(folder / f"u{number:02d}.flac", seconds, pitch=120 + 40 * speaker, seed=number)
        text = " ".join(rng.choice(WORDS, 1 + int(3 * seconds))) if number < 18 else None
        lines.append({"audio": audio.name, "text": text, "speaker": f"speaker {speaker}"})
    manifest = folder / "tiny.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    store, tokenizer = folder / "store", folder / "tokenizer"
    prepare_store(get_corpus("manifest").prepare(manifest), store, corpus="tiny", workers=1)
    make_tokenizer([store], tokenizer, 280)
    return TinyCorpus(manifest, store, tokenizer)


BEYOND_THE_PAPER: dict[str, Any] = {
    "use_weighted_layer_sum": True,
    "standardise_pools": True,
    "audio_pooling": "statistics",
}
"""What a task's head can have."""

NANO = {"steps": 20, "batch_frames": 400, "learning_rate": 2e-3, "checkpoint_every": 10, "log_every": 1, "workers": 0}
"""A run of seconds: about 6 utterances a step, 4 steps an epoch."""


def pretrain_arguments(tiny: TinyCorpus, out: Path, *more: str, **settings: object) -> list[str]:
    """Arguments of `ctal` for a nano run without dropout; `settings` win over `NANO`."""
    fields = {**NANO, "hidden_dropout_prob": 0, **settings}
    pairs = [part for name, value in fields.items() for part in ("--set", f"{name}={value}")]
    fixed = ["pretrain", str(tiny.store), "--out", str(out), "--tokenizer", str(tiny.tokenizer), "--size", "nano"]
    return [*fixed, *pairs, *more]


PITCH = {"angry": 300, "happy": 500, "sad": 120}
SCORE = {"bad": -2.0, "so": 0.0, "good": 2.5}


@dataclass(frozen=True)
class Labelled:
    """48 utterances of 12 speakers: the pitch gives the emotion, a word the sentiment; with and without splits."""

    store: Path
    """Without splits: 5 folds."""
    split: Path
    """With train, validation and test part."""
    pretrained: Path


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Labelled:
    import numpy as np

    from ctal.corpora import get_corpus
    from ctal.pretrain import make_tokenizer, pretrain
    from ctal.recipes import PretrainConfig, make_config
    from ctal.store import prepare_store

    folder = tmp_path_factory.mktemp("labelled")
    rng = np.random.default_rng(3)
    lines = []
    for number in range(48):
        speaker = number % 12
        emotion, word = (str(rng.choice(list(names))) for names in (PITCH, SCORE))
        pitch, seconds = PITCH[emotion] + 5 * speaker, float(rng.uniform(0.4, 1.2))
        audio = record(folder / f"u{number:02d}.flac", seconds, pitch, number)
        labels = {"emotion": emotion, "sentiment": SCORE[word]}
        text = f"it was {word} {rng.choice(['today', 'tomorrow', 'tea'])}"
        lines.append({"audio": audio.name, "text": text, "speaker": f"s{speaker:02d}", **labels})
    for name, split in (("store", {}), ("split", {9: "validation", 10: "validation"} | {11: "test", 8: "test"})):
        manifest = folder / f"{name}.jsonl"
        rows = [
            {**line, "split": split.get(number % 12, "train")} if split else line for number, line in enumerate(lines)
        ]
        manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
        prepare_store(get_corpus("manifest").prepare(manifest), folder / name, corpus="tones", workers=1)
    make_tokenizer([folder / "store"], folder / "tokenizer", 280)
    config = make_config(PretrainConfig, NANO, {"steps": 4})
    architecture = {"frame_stack": 2, "hidden_dropout_prob": 0}
    pretrain(
        [folder / "store"],
        folder / "pretrained",
        config,
        size="nano",
        architecture=architecture,
        tokenizer=folder / "tokenizer",
    )
    return Labelled(folder / "store", folder / "split", folder / "pretrained" / "model")


@dataclass(frozen=True)
class Finished:
    """A process of `ctal` that has ended."""

    code: int
    """Its exit code, or minus the signal that killed it."""
    output: str
    errors: str


class CtalProcess:
    """`ctal ARGUMENTS` in a process of its own: a fork of a server that has imported everything, so it starts at once.

    `die_at` makes it kill itself: `("step", n)` when step n is done, `("file", n)` at the n-th time that it opens,
    makes, moves or removes something in its run, and `("term", n)` is SIGTERM to itself after step n.
    """

    def __init__(self, arguments: Sequence[str], folder: Path, die_at: tuple[str, int] | None = None) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["ctal.cli", "ctal.pretrain", "ctal.console"])
        folder.mkdir(parents=True, exist_ok=True)
        self.files = folder / "stdout", folder / "stderr"
        self.process = context.Process(target=_run_ctal, args=(list(arguments), self.files, die_at))
        self.process.start()

    @property
    def group(self) -> int:
        assert self.process.pid
        return self.process.pid

    def wait(self, seconds: float = 120) -> Finished:
        self.process.join(seconds)
        if self.process.is_alive():
            os.killpg(self.group, signal.SIGKILL)
            raise TimeoutError(f"ctal did not end within {seconds} s: {self.files[1].read_text()}")
        assert self.process.exitcode is not None
        return Finished(self.process.exitcode, *(file.read_text() for file in self.files))


Cli = Callable[..., Finished]


@pytest.fixture
def ctal(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cli:
    """`ctal ARGUMENTS` in this process, on a terminal wide enough for its tables."""

    def run(*arguments: object) -> Finished:
        from ctal.cli import main

        monkeypatch.setattr(sys, "argv", ["ctal", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        assert isinstance(code, int)
        shown = capfd.readouterr()
        return Finished(code, shown.out, shown.err)

    return run


def _run_ctal(arguments: list[str], files: tuple[Path, Path], die_at: tuple[str, int] | None) -> None:
    import torch

    from ctal.cli import main
    from ctal.console import TrainingProgress

    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job does not have
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # the loader's workers start as they do outside the tests
    for number, file in enumerate(files, start=1):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.argv = ["ctal", *arguments]
    if die_at and die_at[0] == "file":
        run = arguments[arguments.index("--out") + 1]
        _kill_at_file_event(run, die_at[1])
    elif die_at:
        original, fatal = TrainingProgress.step, signal.SIGTERM if die_at[0] == "term" else signal.SIGKILL

        def step(self: TrainingProgress, done: int, speed: float, losses: Mapping[str, float]) -> None:
            original(self, done, speed, losses)
            if done == die_at[1]:
                os.kill(os.getpid(), fatal)

        TrainingProgress.step = step
    main()


def _kill_at_file_event(folder: str, number: int) -> None:
    """Python tells audit hooks of every file operation, before it is done."""
    seen = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event.startswith(("open", "os.", "shutil.")) and arguments and str(arguments[0]).startswith(folder):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def losses(run: Path, kind: str = "train") -> dict[int, dict[str, float]]:
    """Step → the losses that `run` logged."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        row["step"]: {name: value for name, value in row.items() if name.endswith("loss")}
        for row in rows
        if row["kind"] == kind
    }
