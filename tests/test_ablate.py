"""Ablations: nothing is run twice, an interruption changes no row, and a mistake in a plan is said before any work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from conftest import Labelled, TinyCorpus
from ctal import ablate
from ctal.ablate import Plan, _Rows, load_plan, plan_names, run_plan
from ctal.errors import InputError
from ctal.processes import Terminated, nth_device, training_pool
from ctal.training import Silence

PLAN = """\
about: a test
size: nano
vocab_size: 280
tasks: [emotion]
seeds: 2
base: both
pretraining: {steps: 20, batch_frames: 400, checkpoint_every: 5, workers: 0, precision: fp32}
finetuning: {epochs: 3, batch_frames: 400, checkpoint_every: 3, precision: fp32}
variants:
  both: {}
  scratch: {pretraining: {steps: 0}, expected: worse}
  concat: {finetuning: {fusion: concat}}
  second: {pretraining: {steps: 0}, after: sentiment}
"""


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("plan") / "small.yaml"
    file.write_text(PLAN)
    return file


def run(plan: Plan, store: Path, out: Path, **more: Any) -> Path:
    stores = {task: [store] for task in plan.tasks}
    return run_plan(plan, out, [store], stores, jobs=1, progress=Silence(), show=lambda done, total: None, **more)


def rows(file: Path) -> dict[tuple[str, int], dict[str, Any]]:
    read = [json.loads(line) for line in file.read_text().splitlines()]
    assert len({(row["variant"], row["seed"]) for row in read}) == len(read), "a result stands there twice"
    return {(row["variant"], row["seed"]): row for row in read}


def results(file: Path) -> dict[tuple[str, int], tuple[str, dict[str, float]]]:
    """What an interruption must not change."""
    return {name: (row["run_key"], row["metrics"]) for name, row in rows(file).items()}


@pytest.fixture(scope="module")
def done(plan_file: Path, labelled: Labelled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which the plan has run."""
    out = tmp_path_factory.mktemp("ablation") / "work"
    run(load_plan(str(plan_file)), labelled.split, out)
    return out


def test_every_variant_and_seed_has_one_row_that_says_what_it_is(done: Path):
    found = rows(done / "results.jsonl")
    assert set(found) == {(variant, seed) for variant in ("both", "scratch", "concat", "second") for seed in (0, 1)}
    for (variant, seed), row in found.items():
        assert row["config"]["seed"] == seed
        assert row["head"]["fusion"] == ("concat" if variant == "concat" else "orthogonal")
        assert (row["pretraining"] is None) == (variant in ("scratch", "second"))
        assert 0 <= row["metrics"]["ua"] <= 1
        assert row["seconds"] > 0
        assert row["peak_memory_mb"] > 100
        assert not row["synthetic"]
    one, other = found["both", 0], found["both", 1]
    assert one["run_key"] != other["run_key"]


def test_variants_that_differ_in_fine_tuning_share_a_pre_training_and_no_weights_of_fine_tunings_stay(done: Path):
    found = rows(done / "results.jsonl")
    trained = {row["pretraining"]["key"] for row in found.values() if row["pretraining"]}
    assert len(trained) == 1
    assert len(list((done / "pretraining").glob("*/model"))) == 2  # with the one that is not trained
    assert not list((done / "finetuning").rglob("*.safetensors"))


def test_a_second_run_computes_nothing(done: Path, plan_file: Path, labelled: Labelled):
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*") if path.is_file()}
    run(load_plan(str(plan_file)), labelled.split, done)
    assert {path: path.stat().st_mtime_ns for path in done.rglob("*") if path.is_file()} == before


def test_shards_are_parts_of_the_whole(done: Path, plan_file: Path, labelled: Labelled):
    plan = load_plan(str(plan_file))
    parts = [results(run(plan, labelled.split, done, shard=(number, 2))) for number in (1, 2)]
    for number in (1, 2):
        (done / f"results-{number}-of-2.jsonl").unlink()
    assert not set(parts[0]) & set(parts[1])
    assert {**parts[0], **parts[1]} == results(done / "results.jsonl")


def test_what_was_begun_on_one_kind_of_machine_goes_on_in_the_same_precision_on_another(
    labelled: Labelled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "any.yaml").write_text(PLAN.replace(", precision: fp32", "").replace("seeds: 2", "seeds: 1"))
    plan, out = load_plan(str(tmp_path / "any.yaml")), tmp_path / "work"
    plan = plan.model_copy(update={"variants": {"both": plan.variants["scratch"]}})
    monkeypatch.setattr(ablate, "fast_precision", lambda: "fp32")
    before = run(plan, labelled.split, out).read_bytes()
    monkeypatch.setattr(ablate, "fast_precision", lambda: "bf16")
    assert run(plan, labelled.split, out).read_bytes() == before
    assert json.loads(before)["config"]["precision"] == "fp32"


def test_a_row_that_was_cut_short_is_written_again(done: Path, plan_file: Path, labelled: Labelled):
    file = done / "results.jsonl"
    expected, text = results(file), file.read_text()
    file.write_text(text[:-40])
    run(load_plan(str(plan_file)), labelled.split, done)
    assert results(file) == expected


IN_PRETRAINING = "pretraining/*/checkpoints/*"
IN_FINETUNING = "finetuning/*/checkpoints/*"
IN_A_FIRST_TASK = "finetuning/*/first/checkpoints/*"
BEHIND_A_FIRST_TASK = "finetuning/*/first/evaluation.json"
AFTER_A_RESULT = "results.jsonl"


@pytest.mark.parametrize(
    ("end", "reached"),
    [
        (signal.SIGKILL, IN_PRETRAINING),
        (signal.SIGKILL, IN_FINETUNING),
        (signal.SIGKILL, AFTER_A_RESULT),
        (signal.SIGTERM, IN_FINETUNING),
        (signal.SIGTERM, IN_A_FIRST_TASK),
        (signal.SIGKILL, BEHIND_A_FIRST_TASK),
    ],
)
def test_an_interruption_changes_no_row(
    done: Path,
    plan_file: Path,
    labelled: Labelled,
    tmp_path: Path,
    end: signal.Signals,
    reached: str,
):
    out = tmp_path / "work"
    command = ["ablate", str(plan_file), str(labelled.split), "--out", str(out), "--jobs", "1"]
    process = subprocess.Popen([sys.executable, "-m", "ctal", *command], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not any(out.glob(reached)):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, end)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (143 if end == signal.SIGTERM else -end), errors
    kept = results(out / "results.jsonl") if (out / "results.jsonl").is_file() else {}
    assert len(kept) < 8
    run(load_plan(str(plan_file)), labelled.split, out)
    assert results(out / "results.jsonl") == results(done / "results.jsonl")
    resumed = [row["resumed"] for row in rows(out / "results.jsonl").values()]
    assert sum(resumed) <= 1, "a run that was not interrupted says that it was"


def test_two_plans_that_write_to_one_file_at_a_time_lose_no_row(plan_file: Path, tmp_path: Path) -> None:
    def row(plan: str, key: str) -> dict[str, Any]:
        return {"plan": plan, "variant": "v", "task": "emotion", "seed": 0, "run_key": key, "data_hash": "d"}

    file, plan = tmp_path / "results.jsonl", load_plan(str(plan_file))
    file.write_text(json.dumps(row(plan.name, "outdated")) + "\n")
    one, other = _Rows(file), _Rows(file)
    one.add(row("another", "new"))
    other.drop_outdated(plan, [], {"emotion": "d"})
    other.add(row("another", "new"))
    assert [json.loads(line) for line in file.read_text().splitlines()] == [row("another", "new")]


def test_a_disk_that_is_full_is_one_line_and_rows_survive(
    done: Path,
    plan_file: Path,
    labelled: Labelled,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    import ctal.ablate

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    expected = results(done / "results.jsonl")
    monkeypatch.setattr(ctal.ablate, "_run_missing", refuse)
    with pytest.raises(InputError, match="No space left on device; free space"):
        run(load_plan(str(plan_file)).model_copy(update={"seeds": 3}), labelled.split, done)
    assert results(done / "results.jsonl") == expected


def test_a_changed_plan_replaces_its_rows(
    done: Path, plan_file: Path, labelled: Labelled, monkeypatch: pytest.MonkeyPatch
):
    import ctal.ablate

    before = (done / "results.jsonl").read_text()
    plan = load_plan(str(plan_file))
    changed = {**plan.variants, "concat": plan.variants["concat"].model_copy(update={"finetuning": {"fusion": "text"}})}
    with monkeypatch.context() as patch:
        patch.setattr(ctal.ablate, "_run_missing", lambda *_: None)
        run(plan.model_copy(update={"variants": changed}), labelled.split, done)
        assert {variant for variant, _ in rows(done / "results.jsonl")} == {"both", "scratch", "second"}
    run(plan, labelled.split, done)
    assert sorted((done / "results.jsonl").read_text().splitlines()) == sorted(before.splitlines())


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("finetuning: {fusion: concat}", "finetuning: {fusoin: concat}", "variant 'concat': .*did you mean 'fusion'"),
        ("finetuning: {fusion: concat}", "finetuning: {fusion: mean}", "variant 'concat': fusion='mean'"),
        ("pretraining: {steps: 0}", "pretraining: {frame_stak: 4}", "variant 'scratch': .*did you mean 'frame_stack'"),
        ("expected: worse", "expectd: worse", "expectd.*did you mean 'expected'"),
        ("expected: worse", "after: sentimnt", "did you mean 'sentiment'"),
        ("expected: worse", "after: emotion", "variant 'scratch': is fine-tuned for emotion first"),
        ("size: nano", "size: nanno", "did you mean 'nano'"),
        ("base: both", "base: bot", "did you mean 'both'"),
        ("tasks: [emotion]", "tasks: [emotions]", "did you mean 'emotion'"),
        ("seeds: 2", "seeds: 0", "seeds: Input should be greater"),
        ("about: a test", "about: [", "not YAML"),
        (PLAN, "- a list", "a plan has the fields"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_plan_names_it(tmp_path: Path, right: str, wrong: str, message: str):
    file = tmp_path / "plan.yaml"
    assert right in PLAN
    file.write_text(PLAN.replace(right, wrong))
    with pytest.raises(InputError, match=message) as error:
        load_plan(str(file))
    assert "\n" not in str(error.value)


def test_plans_that_come_with_ctal_are_sound_and_others_are_named():
    assert plan_names() == [
        "heads",
        "known-speaker",
        "known-voices",
        "model",
        "paper-claims",
        "paper-fusion",
        "paper-pretraining",
        "quirks",
        "real-emotion",
        "real-verification",
        "sentiment",
        "tone",
        "tone-sentiment",
    ]
    for name in plan_names():
        assert load_plan(name).about
    with pytest.raises(InputError, match="did you mean 'quirks'"):
        load_plan("quirk")


def test_a_plan_of_a_large_size_takes_the_paper_s_steps(
    labelled: Labelled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "large.yaml"
    file.write_text("{size: base, vocab_size: 280, tasks: [emotion], seeds: 1, base: ours, variants: {ours: {}}}")
    wanted: list[Any] = []
    monkeypatch.setattr("ctal.ablate._run_missing", lambda missing, *others: wanted.extend(missing))
    run(load_plan(str(file)), labelled.split, tmp_path / "work")
    assert [each.pretraining.config["steps"] for each in wanted] == [1_000_000]


def test_a_training_that_the_system_kills_is_one_line():
    said = "a training was killed, perhaps for lack of memory"
    with pytest.raises(InputError, match=said), training_pool(1) as submit:
        submit(partial(os._exit, 9)).result()


def test_ctrl_c_says_how_to_go_on() -> None:
    def interrupted() -> None:
        with training_pool(1) as submit:
            submit(partial(time.sleep, 0)).result()
            raise KeyboardInterrupt

    with pytest.raises(Terminated, match="stopped by Ctrl-C; run the same command again to go on") as caught:
        interrupted()
    assert caught.value.exit_code == 130


def test_a_store_that_is_not_there_is_one_line(plan_file: Path, tmp_path: Path):
    with pytest.raises(InputError, match="nowhere"):
        run(load_plan(str(plan_file)), tmp_path / "nowhere", tmp_path / "work")


def test_a_variant_after_another_task_starts_from_the_model_for_it(done: Path) -> None:
    """Also one without pre-training, whose second stage must not start from scratch again."""
    row = rows(done / "results.jsonl")["second", 0]
    folder = done / row["run"]
    first, second = (json.loads((where / "evaluation.json").read_text()) for where in (folder / "first", folder))
    assert (first["task"], second["task"], row["after"]) == ("sentiment", "emotion", "sentiment")
    assert second["start_from"]["path"] == str(folder / "first" / "model")
    assert second["start_from"]["sha256"] != first["start_from"]["sha256"]
    assert (first["config"]["weights"], second["config"]["weights"]) == ("random", "pretrained")
    assert not list(folder.rglob("*.safetensors"))


def test_a_first_task_that_would_see_what_the_second_is_judged_on_is_refused_at_once(
    plan_file: Path, labelled: Labelled, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"variant 'second': after sentiment: .*a split of its own"):
        run(load_plan(str(plan_file)), labelled.store, tmp_path / "out")
    assert not (tmp_path / "out" / "pretraining").exists()


def test_a_plan_that_would_measure_nothing_is_refused_before_anything_is_trained(
    plan_file: Path, labelled: Labelled, tmp_path: Path
) -> None:
    plan = load_plan(str(plan_file))
    plan = plan.model_copy(update={"finetuning": {**plan.finetuning, "protocol": "all"}})
    with pytest.raises(InputError, match=r"variant 'both': protocol=all has no test part for emotion"):
        run(plan, labelled.store, tmp_path / "out")
    assert not (tmp_path / "out" / "pretraining").exists()


def test_speakers_are_not_told_apart_by_what_knows_them_and_that_is_said_before_anything_is_trained(
    tmp_path: Path, labelled: Labelled
) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(PLAN.replace("[emotion]", "[verification]").replace("{steps: 20,", "{steps: 20, cmvn: speaker,"))
    with pytest.raises(InputError, match=r"variant 'both': verification: .*pre-train with another cmvn"):
        run(load_plan(str(file)), labelled.split, tmp_path / "out")
    assert not (tmp_path / "out" / "pretraining").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"class_weights": "balanced"}, "class_weights=balanced: sentiment has no classes"),
        ({"modality_dropout": 0.3, "fusion": "text"}, "is for fusions of both"),
        ({"inputs": "audio", "fusion": "text"}, "nothing would be left to judge by"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_before_anything_is_trained(
    tmp_path: Path, labelled: Labelled, changed: dict[str, Any], message: str
) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(PLAN.replace("sentiment", "emotion").replace("[emotion]", "[sentiment]"))
    plan = load_plan(str(file))
    plan = plan.model_copy(update={"finetuning": {**plan.finetuning, **changed}})
    with pytest.raises(InputError, match=message):
        run(plan, labelled.split, tmp_path / "out")
    assert not (tmp_path / "out" / "pretraining").exists()


def test_trainings_take_turns_on_the_gpus_that_the_user_has_chosen() -> None:
    assert [nth_device(number, 2, "2,GPU-5a, 7") for number in range(3)] == ["2", "GPU-5a", "2"]
    assert [nth_device(number, 3, None) for number in range(4)] == ["0", "1", "2", "0"]


def test_labels_are_looked_for_before_anything_is_trained(plan_file: Path, tiny: TinyCorpus, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no utterance of the store has a label 'emotion'"):
        run(load_plan(str(plan_file)), tiny.store, tmp_path / "out")
    assert not (tmp_path / "out" / "pretraining").exists()
