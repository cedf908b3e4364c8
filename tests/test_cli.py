"""The command line: what it says to wrong input, its help, and the wheel that brings it."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

from conftest import REPOSITORY, Cli, CtalProcess, Finished, Labelled, TinyCorpus, pretrain_arguments, record
from ctal.cli import app
from ctal.configuration_ctal import settable_fields
from ctal.files import sha256_of
from ctal.recipes import MODEL_DEFAULTS, PRETRAINING, PretrainConfig
from ctal.store import Store

VERBS = sorted(command.name or command.callback.__name__ for command in app.registered_commands if command.callback)


def refusal(finished: Finished) -> str:
    """The one line, without its `ctal: `."""
    assert finished.code == 2, finished
    assert finished.errors.startswith("ctal: ")
    assert finished.errors.count("\n") == 1, finished.errors
    return finished.errors.removeprefix("ctal: ").rstrip("\n")


# Wrong input: one line and exit code 2 ------------------------------------------------------------------------------


def broken(folder: Path, kind: str) -> Path:
    """A recording called x.wav or x.flac that cannot be used."""
    folder.mkdir(exist_ok=True)
    path = folder / "x.wav"
    if kind == "text":
        path.write_text("not a recording at all\n" * 50)
    elif kind == "truncated":
        path = record(folder / "x.flac", 2.0)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "no samples":
        soundfile.write(path, np.zeros(0), 16_000)
    else:
        soundfile.write(path, np.full(16_000, np.nan), 16_000, subtype="FLOAT")
    return path


def test_a_missing_path_is_named(ctal: Cli, tmp_path: Path) -> None:
    for corpus in ("folder", "manifest", "librispeech"):
        message = refusal(ctal("prepare", corpus, tmp_path / "nowhere", tmp_path / "store"))
        assert message.startswith(f"{tmp_path / 'nowhere'}: no such ")


def test_an_empty_folder_is_named(ctal: Cli, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    message = refusal(ctal("prepare", "folder", tmp_path / "empty", tmp_path / "store"))
    assert message.startswith(f"{tmp_path / 'empty'}: no recording in it")


@pytest.mark.parametrize("kind", ["text", "truncated", "no samples", "NaN"])
def test_a_bad_recording_is_named_when_strict_and_left_out_with_its_reason_else(
    ctal: Cli, tmp_path: Path, kind: str
) -> None:
    bad = broken(tmp_path / "audio", kind)
    record(tmp_path / "audio" / "good.wav", 0.5)
    strict = refusal(ctal("prepare", "folder", tmp_path / "audio", tmp_path / "strict", "--strict"))
    assert f"{bad}: " in strict

    lenient = ctal("prepare", "folder", tmp_path / "audio", tmp_path / "store")
    assert lenient.code == 0
    assert f"left out x: {bad}: " in lenient.errors
    assert "1 utterances" in lenient.output


def test_a_manifest_of_which_every_file_is_bad_is_an_error_without_strict(ctal: Cli, tmp_path: Path) -> None:
    files = [broken(tmp_path / kind, kind) for kind in ("no samples", "NaN")]
    manifest = tmp_path / "all.csv"
    manifest.write_text("audio,text\n" + "".join(f"{file},hello\n" for file in files))
    message = refusal(ctal("prepare", "manifest", manifest, tmp_path / "store"))
    assert message.startswith(f"no usable recording: {files[0]}: has no samples")
    assert "(and 1 other)" in message


def test_a_manifest_without_the_column_is_named_with_the_nearest(ctal: Cli, tmp_path: Path) -> None:
    manifest = tmp_path / "all.csv"
    manifest.write_text("audios,text\na.wav,hello\n")
    message = refusal(ctal("prepare", "manifest", manifest, tmp_path / "store"))
    assert message.startswith(f"{manifest}: no column 'audio' (did you mean 'audios'?)")


@pytest.mark.parametrize(
    ("arguments", "start"),
    [
        (["--set", "learning_rat=1"], "--set learning_rat: unknown field (did you mean 'learning_rate'?)"),
        (["--set", "frame_stak=2"], "--set frame_stak: unknown field (did you mean 'frame_stack'?)"),
        (["--set", "learning_rate"], "--set learning_rate: write it as field=value"),
        (["--set", "learning_rate=fast"], "learning_rate='fast': "),
        (["--set", "precision=fp8"], "precision='fp8': "),
        (["--set", "min_span=80"], ""),
        (["--set", "frame_stack=3"], ""),
        (["--set", "frame_stack=two"], ""),
        (["--set", "num_attention_heads=3"], ""),
        (["--size", "bas"], "--size bas: unknown (did you mean 'base'?)"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_wrong_setting_is_named(
    ctal: Cli, tiny: TinyCorpus, tmp_path: Path, arguments: list[str], start: str
) -> None:
    message = refusal(ctal(*pretrain_arguments(tiny, tmp_path / "run"), *arguments))
    assert message.startswith(start)
    assert arguments[-1].split("=")[0] in message
    assert not (tmp_path / "run").exists()


def test_unknown_corpora_and_tasks_are_named_with_the_nearest(ctal: Cli, tiny: TinyCorpus, tmp_path: Path) -> None:
    assert "'folder'" in refusal(ctal("prepare", "foldr", tmp_path, tmp_path / "store"))
    assert "'pretraining'" in refusal(ctal("evaluate", "pretrainin", tiny.store, "--model", tmp_path))


def test_what_is_not_a_store_a_tokenizer_or_a_model_is_named(ctal: Cli, tiny: TinyCorpus, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for path, said in ((tmp_path, "not a model folder"), (tmp_path / "nowhere", "no such folder")):
        fixed = ["--out", out]
        assert refusal(ctal("pretrain", path, "--tokenizer", tiny.tokenizer, *fixed)).startswith(f"{path}: ")
        assert refusal(ctal("pretrain", tiny.store, "--tokenizer", path, *fixed)).startswith(f"{path}: no tokenizer")
        assert refusal(ctal("pretrain", tiny.store, "--from", path, *fixed)).startswith(f"{path}: {said}")
        assert refusal(ctal("evaluate", "pretraining", tiny.store, "--model", path)).startswith(f"{path}: {said}")
    for option in ("--trials", "--inputs", "--scores"):
        message = refusal(ctal("evaluate", "pretraining", tiny.store, "--model", tmp_path, option, "audio"))
        assert message.startswith(f"{option}: is for tasks")
        assert refusal(ctal("tokenizer", path, tmp_path / "made", "--vocab-size", 300)).startswith(f"{path}: ")
    assert refusal(ctal("pretrain", tiny.store, *fixed)).startswith("--tokenizer is missing")
    assert refusal(ctal("pretrain", tiny.store, *fixed, "--resume")).startswith(
        "--resume: repeat the command that began"
    )
    both = ("--tokenizer", tiny.tokenizer, *fixed)
    assert (
        refusal(ctal("pretrain", tiny.store, tiny.store, *both))
        == f"{tiny.store}: is given twice; name each store once"
    )
    once = ("finetune", "emotion", tiny.store, "--from", tmp_path, *fixed)
    assert refusal(ctal(*once, "--steps", 1, "--epochs", 1)) == "--steps and --epochs: give one of the two"
    assert refusal(ctal("ablate", "nope.yaml", tiny.store, *fixed)).startswith("nope.yaml: no such file")
    assert not out.exists()


def test_the_architecture_of_a_continued_model_cannot_be_set(ctal: Cli, tiny: TinyCorpus, tmp_path: Path) -> None:
    message = refusal(ctal("pretrain", tiny.store, "--from", tmp_path, "--out", "run", "--set", "frame_stack=2"))
    assert message.startswith("--set frame_stack: the architecture is that of --from")


@pytest.mark.parametrize(
    ("task", "field", "whose"),
    [
        ("emotion", "regression_loss=mse", "sentiment"),
        ("verification", "regression_loss=mse", "sentiment"),
        ("emotion", "speaker_loss=aam", "verification"),
        ("sentiment", "speaker_margin=0.1", "verification"),
    ],
)
def test_a_setting_that_is_for_another_task_is_refused(
    ctal: Cli, tiny: TinyCorpus, tmp_path: Path, task: str, field: str, whose: str
) -> None:
    arguments = ("finetune", task, tiny.store, "--from", tmp_path, "--out", tmp_path / "run", "--set", field)
    name = field.split("=")[0]
    assert refusal(ctal(*arguments)) == f"--set {name}: changes {whose} alone, not {task}; leave it out"


def test_smoothed_labels_of_a_score_need_its_histogram(ctal: Cli, labelled: Labelled, tmp_path: Path) -> None:
    start = ("finetune", "sentiment", labelled.store, "--from", labelled.pretrained, "--out", tmp_path / "run")
    message = refusal(ctal(*start, "--set", "label_smoothing=0.2"))
    assert message.endswith("--set regression_loss=histogram with it")


def test_a_tokenizer_folder_is_not_overwritten_and_too_few_entries_are_refused(
    ctal: Cli, tiny: TinyCorpus, tmp_path: Path
) -> None:
    message = refusal(ctal("tokenizer", tiny.store, tiny.tokenizer))
    assert message.startswith(f"{tiny.tokenizer}: exists and is not empty")
    assert "vocab_size 10" in refusal(ctal("tokenizer", tiny.store, tmp_path / "made", "--vocab-size", 10))


def last_refusal(finished: Finished) -> str:
    """The one line of the error, below notes on the data."""
    assert finished.code == 2, finished
    assert "Traceback" not in finished.errors
    (message,) = [line for line in finished.errors.splitlines() if line.startswith("ctal: ")]
    assert finished.errors.endswith(message + "\n")
    return message.removeprefix("ctal: ")


def test_a_run_that_cannot_be_taken_up_is_told_why(ctal: Cli, tiny: TinyCorpus, tmp_path: Path) -> None:
    out = tmp_path / "run"
    small = {"steps": 2, "checkpoint_every": 1}
    first = ctal(*pretrain_arguments(tiny, out, **small))
    assert first.code == 0
    assert f"{out / 'model'}: the best model by text_loss × audio_loss, " in first.output
    assert (out / "report.html").is_file()

    assert "add --resume" in last_refusal(ctal(*pretrain_arguments(tiny, out, **small)))
    changed = ctal(*pretrain_arguments(tiny, out, "--resume", **{**small, "seed": 3}))
    assert last_refusal(changed).startswith("--resume: seed is 3, but the run was started with 0")

    state = out / "checkpoints" / "step-00000002" / "state.json"
    state.write_text(state.read_text().replace('"step": 2', '"step": 1'))
    damaged = ctal(*pretrain_arguments(tiny, out, "--resume", **small))
    assert last_refusal(damaged).startswith(f"{state}: does not match manifest.json; remove {state.parent}")


def test_a_diverged_run_is_one_line_and_exit_code_1(tiny: TinyCorpus, tmp_path: Path) -> None:
    wild = {"learning_rate": 1e30, "max_grad_norm": 1e30, "warmup_ratio": 0}
    # With workers, which must not keep the process from ending.
    finished = CtalProcess(pretrain_arguments(tiny, tmp_path / "run", workers=2, **wild), tmp_path).wait(60)
    assert finished.code == 1
    assert "Traceback" not in finished.errors
    last = finished.errors.splitlines()[-1]
    assert last.startswith("ctal: step ")
    assert "not finite" in last


# What works -------------------------------------------------------------------------------------------------------


def test_the_journey_from_a_folder_to_a_measured_model(ctal: Cli, tmp_path: Path) -> None:
    audio = tmp_path / "audio"
    audio.mkdir()
    for number in range(8):
        record(audio / f"{number}.wav", 0.5 + number / 10, seed=number)
        (audio / f"{number}.txt").write_text("hello hello world" + " again" * number)
    prepared = ctal("prepare", "folder", audio, tmp_path / "store")
    assert prepared.code == 0
    assert "8 utterances" in prepared.output
    assert "up to date" in ctal("prepare", "folder", audio, tmp_path / "store").output
    made = ctal("tokenizer", tmp_path / "store", tmp_path / "tokenizer", "--vocab-size", 270)
    assert made.code == 0

    settings = ["--set", "batch_frames=400", "--set", "workers=0", "--set", "validation_share=0.3"]
    options = ["--tokenizer", tmp_path / "tokenizer", "--out", tmp_path / "run", "--size", "nano", "--steps", 2]
    trained = ctal("pretrain", tmp_path / "store", *options, *settings)
    assert trained.code == 0, trained.errors

    evaluated = ctal("evaluate", "pretraining", tmp_path / "store", "--model", tmp_path / "run" / "model", "--json")
    assert evaluated.code == 0
    measured = json.loads(evaluated.output)
    assert measured == json.loads((tmp_path / "run" / "evaluation.json").read_text())


def test_continuing_takes_the_recipe_of_the_model_s_size_and_its_own_tokenizer(
    ctal: Cli, tiny: TinyCorpus, tmp_path: Path
) -> None:
    options = ["--set", "batch_frames=400", "--set", "workers=0", "--set", "validation_share=0.3", "--steps", "2"]
    first = ("--tokenizer", tiny.tokenizer, "--size", "nano", "--out", tmp_path / "one")
    assert ctal("pretrain", tiny.store, *first, *options).code == 0
    model = tmp_path / "one" / "model"
    assert ctal("pretrain", tiny.store, "--from", model, "--out", tmp_path / "two", *options).code == 0
    saved = [json.loads((tmp_path / run / "config.json").read_text()) for run in ("one", "two")]
    assert saved[1].pop("start_from") == sha256_of(model / "model.safetensors")
    assert saved[0] == saved[1]
    other = ctal("pretrain", tiny.store, "--from", model, "--out", tmp_path / "three", "--tokenizer", tiny.tokenizer)
    assert "a continued model keeps its own; leave it out with --from" in refusal(other)


def test_settings_are_those_of_the_recipe_of_a_size_and_say_what_they_mean(ctal: Cli) -> None:
    def shown(*arguments: str) -> dict[str, list[str]]:
        lines = [line.split("│") for line in ctal("settings", *arguments).output.splitlines()]
        return {cells[1].strip(): [cell.strip() for cell in cells[2:4]] for cells in lines if len(cells) > 3}

    assert shown("--size", "mini")["learning_rate"][0] == str(PRETRAINING["mini"]["learning_rate"])
    assert shown()["frame_stack"][0] == "1"
    assert shown("--size", "mini")["frame_stack"][0] == str(MODEL_DEFAULTS["mini"]["frame_stack"])
    assert shown()["max_position_embeddings"][0] == "512 / 3000"
    fusion = shown("finetune", "--size", "mini")["fusion"]
    assert fusion[0] == '"orthogonal"'
    assert fusion[1].startswith("head: How a task's head combines text and audio: `orthogonal`")


def test_settings_lists_every_field_in_one_piece(ctal: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    listed = ctal("settings")
    assert listed.code == 0
    for name in [*PretrainConfig.model_fields, *settable_fields()]:
        assert name in listed.output


# Help -------------------------------------------------------------------------------------------------------------


def test_every_verb_s_help_has_an_example(ctal: Cli) -> None:
    assert VERBS
    for verb in VERBS:
        shown = ctal(verb, "--help")
        assert shown.code == 0
        lines = [line.strip() for line in shown.output.splitlines()]
        assert any(line.startswith(f"Example: ctal {verb}") for line in lines), shown.output


def test_the_help_names_every_verb(ctal: Cli) -> None:
    shown = ctal("--help")
    assert shown.code == 0
    assert all(verb in shown.output for verb in VERBS)


def test_an_unknown_verb_or_option_is_exit_code_2_without_a_traceback(ctal: Cli) -> None:
    for arguments in (["pretrian"], ["pretrain", "store", "--outt", "run"], ["prepare"]):
        finished = ctal(*arguments)
        assert finished.code == 2
        assert "Traceback" not in finished.errors
        assert finished.errors


@pytest.mark.skipif(sys.platform != "linux", reason="torch has GNU's OpenMP on Linux alone")
@pytest.mark.parametrize(("variables", "spins"), [({}, "1000"), ({"OMP_WAIT_POLICY": "passive"}, "0")])
def test_waiting_threads_give_up_their_cores_unless_told_otherwise(variables: dict[str, str], spins: str) -> None:
    code = "from ctal import cli; cli.app = lambda: __import__('torch'); cli.main()"
    known = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    variables = {**known, **variables, "OMP_DISPLAY_ENV": "verbose"}
    shown = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
    assert f"GOMP_SPINCOUNT = '{spins}'" in shown.stderr


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives memory back as soon as it is freed")
@pytest.mark.parametrize(
    ("variables", "kept"), [({}, True), ({"MALLOC_MMAP_MAX_": "9"}, False), ({"GLIBC_TUNABLES": "glibc.malloc"}, False)]
)
def test_memory_that_is_freed_is_kept_for_what_comes_next_unless_told_otherwise(
    variables: dict[str, str], kept: bool
) -> None:
    code = "from ctal import cli; cli.app = lambda: (bytes(1) * 200_000_000) and None; import psutil\n"
    code += "try: cli.main()\nfinally: print(psutil.Process().memory_info().rss)"
    known = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    shown = subprocess.run(
        [sys.executable, "-c", code], env=known | variables, capture_output=True, text=True, check=True
    )
    assert (int(shown.stdout) > 200_000_000) is kept


def test_help_waits_for_nothing_heavy() -> None:
    """What takes the time; how long it is depends on the machine (`python -m benchmarks startup`)."""
    heavy = {"torch", "transformers", "datasets", "accelerate", "numpy", "scipy", "sklearn", "pyarrow", "pydantic"}
    code = "import atexit, sys; sys.argv = ['ctal', '--help']; from ctal.cli import main\n"
    code += f"atexit.register(lambda: print({heavy} & sys.modules.keys())); main()"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.endswith("set()\n")


# The wheel --------------------------------------------------------------------------------------------------------


def test_the_wheel_works_outside_the_checkout(tmp_path: Path) -> None:
    if importlib.util.find_spec("hatchling"):
        build = ["build", "--wheel", "--no-isolation", "--outdir", str(tmp_path)]
    else:
        build = ["pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(tmp_path)]
    built = subprocess.run([sys.executable, "-m", *build, str(REPOSITORY)], capture_output=True, text=True, check=False)
    if built.returncode and "Could not find a version that satisfies the requirement hatchling" in built.stderr:
        pytest.skip("hatchling is not installed and no package index can be reached")
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("ctal-*.whl")

    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("ctal/")}
        assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
    source = REPOSITORY / "src"
    files = {path.relative_to(source).as_posix() for path in (source / "ctal").rglob("*") if path.is_file()}
    assert packed == {file for file in files if "__pycache__" not in file}

    install = ["pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "site"), str(wheel)]
    subprocess.run([sys.executable, "-m", *install], check=True)
    # -S would hide the dependencies; a path of its own in front hides the checkout.
    code = "import ctal, sys; print(ctal.__file__); from ctal.cli import main; sys.argv = ['ctal', '--help']; main()"
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin"}
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert shown.stdout.startswith(str(tmp_path / "site" / "ctal"))
    assert "pretrain" in shown.stdout


# Parts that lie in different folders --------------------------------------------------------------------------------


def test_a_store_can_be_put_into_one_part_as_a_whole(ctal: Cli, tmp_path: Path):
    (tmp_path / "sound").mkdir()
    record(tmp_path / "sound" / "a.wav", 0.5)
    assert ctal("prepare", "folder", tmp_path / "sound", tmp_path / "store", "--split", "test").code == 0
    assert Store(tmp_path / "store").index.splits == ["test"]
    assert "did you mean 'test'" in refusal(
        ctal("prepare", "folder", tmp_path / "sound", tmp_path / "other", "--split", "tset")
    )
