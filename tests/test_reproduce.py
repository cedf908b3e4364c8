"""From raw corpora to the report, on tiny trees in their layouts; killed once in every stage."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from rich.console import Console

from ctal.corpora import get_corpus
from ctal.errors import InputError
from ctal.recipes import FinetuneConfig, make_config
from ctal.reproduce import TASK_CORPORA, Clock, Scale, dry_run
from test_corpora_labelled import iemocap, sound, write_csv

PLAN = """\
base: orthogonal
seeds: 1
variants:
  orthogonal: {}
  no pre-training: {pretraining: {steps: 0}, expected: worse}
"""
SUBSETS = {"train-clean-100": (11, 12, 13, 14), "dev-clean": (21, 22), "test-clean": (31, 32)}


def librispeech(root: Path) -> Path:
    """Three subsets; two utterances a speaker."""
    rng = np.random.default_rng(0)
    for subset, speakers in SUBSETS.items():
        for speaker in speakers:
            chapter = root / subset / str(speaker) / "7"
            chapter.mkdir(parents=True)
            ids = [f"{speaker}-7-{number:04d}" for number in range(2)]
            for id in ids:
                soundfile.write(chapter / f"{id}.flac", rng.normal(0, 0.1, 12_000), 16_000)
            lines = [f"{id} {' '.join(rng.choice(['TEA', 'MILK', 'RED', 'GREEN'], 4))}\n" for id in ids]
            (chapter / f"{speaker}-7.trans.txt").write_text("".join(lines))
    return root


def mosei(root: Path) -> Path:
    """Clips of six videos, two in each part."""
    parts = ("train", "train", "valid", "valid", "test", "test")
    rows = [
        {"video_id": f"v{video}", "clip_id": clip, "text": "so it is", "label": clip - 1.5, "mode": mode}
        for video, mode in enumerate(parts)
        for clip in range(4)
    ]
    write_csv(root / "label.csv", *rows)
    sound(*(root / "Raw" / str(row["video_id"]) / f"{row['clip_id']}.wav" for row in rows), seconds=0.3)
    return root


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("raw")
    made = {"librispeech": librispeech, "iemocap": iemocap, "mosei": mosei}
    return {name: make(folder / name) for name, make in made.items()}


def arguments(roots: dict[str, Path], out: Path) -> list[str]:
    given = [part for name, root in roots.items() for part in (f"--{name}", str(root))]
    sizes = ["--size", "nano", "--steps", "8", "--epochs", "1", "--seeds", "1", "--vocab-size", "280"]
    return ["reproduce", "paper-base", *given, "--out", str(out), *sizes]


def test_subsets_of_librispeech_beside_each_other_are_its_split(roots: dict[str, Path]):
    found = list(get_corpus("librispeech").prepare(roots["librispeech"]))
    assert {each.split: each.speaker for each in found} == {"train": "14", "validation": "22", "test": "32"}
    alone = get_corpus("librispeech").prepare(roots["librispeech"] / "test-clean")
    assert {each.split for each in alone} == {None}


def test_the_plan_names_every_corpus_and_task_and_makes_nothing(roots: dict[str, Path], tmp_path: Path):
    console = Console(width=200, record=True)
    console.print(dry_run(Scale.of("paper-base"), roots))
    shown = console.export_text()
    for name in ("prepare", "tokenizer", "pre-train", "report", *TASK_CORPORA, *roots):
        assert name in shown
    assert "5 base models of 1,000,000 steps" in shown
    assert "5 folds of 20 epochs" in shown
    assert list(tmp_path.iterdir()) == []


def test_the_plan_estimates_hours_for_every_training_and_says_for_which_machine(roots: dict[str, Path]):
    console = Console(width=300, record=True)
    table = dry_run(Scale.of("paper-base", "nano", steps=1000), roots)
    console.print(table)
    hours = dict(zip(table.columns[0]._cells, table.columns[-1]._cells, strict=True))
    assert all(bool(estimate) == (stage in ("pre-train", "fine-tune")) for stage, estimate in hours.items())
    assert "estimated by the cost model" in console.export_text().replace("\n", " ")


def test_hours_grow_with_steps_and_with_the_size(roots: dict[str, Path]):
    nano, mini = (Clock.of(size, 300) for size in ("nano", "mini"))
    mini = replace(mini, machine=nano.machine)
    few, many = (mini.pretraining([3.0, 12.0], steps, 6000) for steps in (10, 1000))
    assert many == pytest.approx(100 * few)
    assert nano.pretraining([3.0, 12.0], 10, 6000) < few
    recipe = make_config(FinetuneConfig)
    assert mini.finetuning([3.0, 12.0], 2, recipe) == pytest.approx(2 * mini.finetuning([3.0, 12.0], 1, recipe))
    assert mini.finetuning([0.0], 2, recipe) == 0, "no recording could be read"


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(InputError, match="did you mean 'paper-base'"):
        Scale.of("paper-bas")


STAGES = (
    "stores/librispeech/shards",
    "ablations/tokenizer-*/*",
    "ablations/pretraining/*/metrics.jsonl",
    "ablations/finetuning/*/*",
)


def test_killed_in_every_stage_it_still_ends_with_every_row_once_and_a_report(
    roots: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plan = tmp_path / "small.yaml"
    plan.write_text(PLAN)
    out = tmp_path / "out"
    program = f"import ctal.reproduce; ctal.reproduce.PLANS = ({str(plan)!r},); from ctal.cli import main; main()"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", program, *arguments(roots, out)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    for stage in STAGES:
        process = start()
        while not any(out.glob(stage)):
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    process = start()
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    rows = [json.loads(line) for line in (out / "ablations" / "results.jsonl").read_text().splitlines()]
    found = sorted((row["task"], row["variant"]) for row in rows)
    assert found == sorted((task, variant) for task in TASK_CORPORA for variant in ("orthogonal", "no pre-training"))
    page = (out / "report.html").read_text()
    for task in TASK_CORPORA:
        assert task in page.lower()
