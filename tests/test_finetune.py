"""Fine-tuning: what is trained, what is measured, and that neither depends on how the work is spread."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import BEYOND_THE_PAPER, NANO, CtalProcess, Labelled, losses, record
from ctal import CtalConfig, CtalForSequenceClassification, CtalForXVector
from ctal.audio import SAMPLING_RATE, load_audio
from ctal.batching import EVALUATION, Corpus, CorpusFeatures, Microbatch
from ctal.corpora import Utterance, get_corpus
from ctal.errors import InputError
from ctal.features import Cmvn
from ctal.finetune import FinetuneObjective, evaluate_task, finetune, judge_rows, load_model_for, make_dataset
from ctal.heard import Heard
from ctal.inference import Recording, pipeline
from ctal.masking import mask_blocks
from ctal.model_folders import load_processor
from ctal.modeling_ctal import SCORES
from ctal.pretrain import load_model, new_extractor, new_model
from ctal.processing_ctal import CtalProcessor
from ctal.recipes import FinetuneConfig, learning_rate, make_config
from ctal.report.tasks import write_task_report
from ctal.store import Store, prepare_store
from ctal.tasks import TASKS, read_targets
from ctal.text import spelling_of_tokens
from ctal.training import Silence, parameter_groups

QUICK: dict[str, Any] = {
    **{name: value for name, value in NANO.items() if name != "steps"},
    **{"epochs": 2, "checkpoint_every": 4},
}


def run(
    labelled: Labelled,
    out: Path,
    task: str = "emotion",
    *,
    store: Path | None = None,
    head: dict[str, Any] | None = None,
    resume: bool = False,
    **fields: Any,
) -> dict[str, Any]:
    config = make_config(FinetuneConfig, QUICK, fields)
    stores = [store or labelled.split]
    head = {"head_dropout_prob": 0.0, **(head or {})}
    evaluation = finetune(task, stores, out, config, start_from=labelled.pretrained, head=head, resume=resume)
    assert evaluation is not None
    return evaluation


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def runs(labelled: Labelled, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of each task."""
    folder = tmp_path_factory.mktemp("runs")
    for task in TASKS:
        run(labelled, folder / task, task)
    return {task: folder / task for task in TASKS}


# What a run leaves --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_a_run_leaves_a_model_its_card_and_what_it_was_measured_by(runs: dict[str, Path], task: str) -> None:
    evaluation = json.loads((runs[task] / "evaluation.json").read_text())
    card = (runs[task] / "model" / "README.md").read_text()
    predictions = [json.loads(line) for line in (runs[task] / "predictions.jsonl").read_text().splitlines()]

    assert evaluation["utterances"] == len(predictions) == 8
    assert {line["speaker"] for line in predictions} == {"s08", "s11"}
    for name, value in evaluation["metrics"].items():
        assert f"{name} {value:.4f}" in card
    for name in ("protocol", "data_hash", "versions", "config"):
        assert evaluation[name]


def test_classes_are_named_and_a_verification_model_carries_its_threshold(runs: dict[str, Path]) -> None:
    emotion = CtalForSequenceClassification.from_pretrained(runs["emotion"] / "model")
    verification = CtalForXVector.from_pretrained(runs["verification"] / "model")

    assert emotion.config.id2label == {0: "angry", 1: "happy", 2: "sad"}
    assert verification.config.num_labels == 8  # the training speakers alone
    threshold = verification.config.decision_threshold
    assert threshold is not None
    assert -1 <= threshold <= 1


def test_the_written_trials_are_all_pairs_of_the_test_part_and_can_be_given_back(
    labelled: Labelled, runs: dict[str, Path]
) -> None:
    run_folder = runs["verification"]
    evaluation = json.loads((run_folder / "evaluation.json").read_text())
    assert evaluation["trials"]["count"] == 8 * 7 // 2
    assert len((run_folder / "trials.txt").read_text().splitlines()) == 28

    again = evaluate_task("verification", [labelled.split], run_folder / "model", trials=run_folder / "trials.txt")

    assert again is not None
    assert again["metrics"] == evaluation["metrics"]
    assert again["over_speakers"] == evaluation["over_speakers"]
    interval = evaluation["over_speakers"]["eer"]
    assert interval["low"] <= evaluation["metrics"]["eer"] <= interval["high"]


@pytest.mark.parametrize("task", TASKS)
def test_evaluating_a_model_again_gives_the_numbers_of_its_run(
    labelled: Labelled, runs: dict[str, Path], task: str
) -> None:
    again = evaluate_task(task, [labelled.split], runs[task] / "model")

    assert again is not None
    assert again["metrics"] == json.loads((runs[task] / "evaluation.json").read_text())["metrics"]


def test_stores_of_a_run_are_evaluated_alone_and_all_together_or_not_at_all(
    labelled: Labelled, runs: dict[str, Path], tmp_path: Path
) -> None:
    new = other_store(tmp_path)
    more = refusal(lambda: evaluate_task("emotion", [labelled.split, new], runs["emotion"] / "model"))
    assert f"evaluate it on {new} apart from those" in more

    config = make_config(FinetuneConfig, QUICK, {"epochs": 1})
    finetune("emotion", [labelled.split, new], tmp_path / "both", config, start_from=labelled.pretrained)
    assert "give all of them" in refusal(
        lambda: evaluate_task("emotion", [labelled.split], tmp_path / "both" / "model")
    )


def test_a_list_of_trials_says_who_is_who_where_the_store_does_not(
    labelled: Labelled, runs: dict[str, Path], tmp_path: Path
) -> None:
    other_store(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "new.jsonl").read_text().splitlines()]
    for line in lines:
        del line["speaker"]
    (tmp_path / "nameless.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    nameless = tmp_path / "nameless"
    prepare_store(get_corpus("manifest").prepare(tmp_path / "nameless.jsonl"), nameless, corpus="new", workers=1)
    trials, model = tmp_path / "trials.txt", runs["verification"] / "model"
    trials.write_text("1 new00 new04\n0 new00 new01\n0 new04 new03\n")

    evaluation = evaluate_task("verification", [nameless], model, trials=trials)

    named = evaluate_task("verification", [tmp_path / "new"], model, trials=trials)
    assert evaluation is not None
    assert named is not None
    assert evaluation["metrics"] == named["metrics"]
    assert "no utterance of the store has a speaker" in refusal(
        lambda: evaluate_task("verification", [nameless], model)
    )


def test_an_evaluation_says_where_pretraining_has_heard_what_is_tested(
    labelled: Labelled, runs: dict[str, Path], tmp_path: Path
) -> None:
    new = other_store(tmp_path)
    trials = tmp_path / "trials.txt"
    trials.write_text("1 new00 new04\n0 new00 new01\n0 new04 new03\n")
    model = Path(shutil.copytree(runs["verification"] / "model", tmp_path / "model"))
    before = evaluate_task("verification", [new], model, trials=trials)
    Heard.of(model).and_sounds(Corpus([Store(new)]).recordings).save(model)
    after = evaluate_task("verification", [new], model, trials=trials)
    assert before is not None
    assert after is not None
    heard = "; pre-training has heard the test part's audio, without labels"
    assert after["measured_on"] == before["measured_on"] + heard


def test_an_interval_over_speakers_is_left_out_where_a_list_names_other_speakers_than_the_store(
    labelled: Labelled, runs: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "trials.txt").write_text("0 u08 u20\n1 u08 u11\n")
    model = runs["verification"] / "model"

    evaluation = evaluate_task("verification", [labelled.split], model, trials=tmp_path / "trials.txt")

    assert evaluation is not None
    assert "eer" in evaluation["metrics"]
    assert "over_speakers" not in evaluation


def other_store(folder: Path) -> Path:
    """12 utterances of 4 speakers that no model here has heard, all of a training part."""
    lines = []
    for number in range(12):
        audio = record(folder / f"new{number:02d}.flac", 0.5, 150 + 90 * (number % 4), 100 + number)
        labels = {"emotion": ["angry", "happy", "sad"][number % 3], "split": "train"}
        lines.append({"audio": audio.name, "text": "it was so", "speaker": f"new {number % 4}", **labels})
    (folder / "new.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare_store(get_corpus("manifest").prepare(folder / "new.jsonl"), folder / "new", corpus="new", workers=1)
    return folder / "new"


def test_recordings_that_a_model_was_trained_on_are_left_out_in_whatever_store_they_come_again(
    labelled: Labelled, runs: dict[str, Path]
) -> None:
    again = evaluate_task("emotion", [labelled.store], runs["emotion"] / "model")

    assert again is not None
    assert again["utterances"] == 8
    assert again["metrics"] == json.loads((runs["emotion"] / "evaluation.json").read_text())["metrics"]
    assert "without 40 that the model was trained on" in again["measured_on"]


def test_a_list_of_trials_may_name_any_utterance_that_the_model_was_not_trained_on(
    labelled: Labelled, runs: dict[str, Path], tmp_path: Path
) -> None:
    model, trials = runs["verification"] / "model", tmp_path / "trials.txt"
    new = other_store(tmp_path)

    trials.write_text("1 new00.flac new04.flac\n\n0 new00.flac new01.flac\n0 new04.flac new03.flac\n")
    elsewhere = evaluate_task("verification", [new], model, trials=trials)
    assert elsewhere is not None
    assert elsewhere["trials"] == {"count": 3, "targets": 1}
    assert elsewhere["utterances"] == 4

    for store in (labelled.split, labelled.store):
        trials.write_text("1 u08 u20\n0 u08 u11\n")
        named = evaluate_task("verification", [store], model, trials=trials)
        assert named is not None
        assert named["over_speakers"].keys() == {"eer"}
        trials.write_text("1 u08 u20\n0 u08 u00\n")
        message = refusal(lambda store=store: evaluate_task("verification", [store], model, trials=trials))
        assert "was trained on, such as 'u00'" in message


def test_the_test_part_is_judged_in_the_precision_of_validation(labelled: Labelled, tmp_path: Path) -> None:
    # A process of its own: accelerate has one precision a process.
    settings = [part for name, value in QUICK.items() for part in ("--set", f"{name}={value}")]
    start = ["--from", str(labelled.pretrained), "--out", str(tmp_path / "run"), "--set", "precision=bf16"]
    ended = CtalProcess(["finetune", "sentiment", str(labelled.split), *start, *settings], tmp_path).wait()
    assert ended.code == 0, ended.errors

    task, corpus = TASKS["sentiment"], Corpus([Store(labelled.split)])
    model, processor, saved = load_model_for(task, tmp_path / "run" / "model")
    rows = np.flatnonzero([split == "validation" for split in corpus.splits])
    config = make_config(FinetuneConfig, saved["config"])
    judge = partial(judge_rows, task, model, processor, corpus, read_targets(task, corpus), rows, inputs="both")

    assert judge(config=config)["metrics"]["mae"] == saved["metrics"]["mae"]
    others = {precision: judge(config=config, precision=precision) for precision in ("fp32", "int8")}
    assert {name: judged["precision"] for name, judged in others.items()} == {"fp32": "fp32", "int8": "int8"}
    errors = [saved["metrics"]["mae"], *(judged["metrics"]["mae"] for judged in others.values())]
    assert len(set(errors)) == 3
    assert max(errors) - min(errors) < 0.1


@pytest.mark.parametrize("speaker_loss", ["softmax", "aam"])
def test_speakers_are_compared_in_any_precision_whatever_their_classifier_is(
    labelled: Labelled, tmp_path: Path, speaker_loss: str
) -> None:
    run(labelled, tmp_path / "run", task="verification", epochs=1, head={"speaker_loss": speaker_loss})
    model = tmp_path / "run" / "model"

    exact, *others = (
        evaluate_task("verification", [labelled.split], model, precision=precision)
        for precision in ("fp32", "bf16", "int8")
    )

    assert exact is not None
    for each in others:
        assert each is not None
        assert abs(each["metrics"]["eer"] - exact["metrics"]["eer"]) < 0.2


class Notes(Silence):
    """What the user is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def test_few_updates_are_told_before_they_are_made(
    labelled: Labelled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(FinetuneConfig, QUICK, {"epochs": 1})
    told: list[list[str]] = []
    for number, few in enumerate((300, 1)):
        monkeypatch.setattr("ctal.finetune.FEW_UPDATES", few)
        notes, out = Notes(), tmp_path / str(number)
        finetune("sentiment", [labelled.split], out, config, start_from=labelled.pretrained, progress=notes)
        told.append([note for note in notes.notes if "updates" in note])
    steps = json.loads((tmp_path / "0" / "config.json").read_text())["steps"]
    assert told == [[f"only {steps} updates: on few recordings more passes are worth it (--epochs, --steps)"], []]


def test_with_folds_every_utterance_is_predicted_once_by_a_model_that_has_not_heard_its_speaker(
    labelled: Labelled, tmp_path: Path
) -> None:
    evaluation = run(
        labelled, tmp_path / "run", store=labelled.store, protocol="5-fold", epochs=1, modality_dropout=0.3
    )

    assert "pre-training has heard the test part's audio" in evaluation["protocol"]["description"]
    folds = [json.loads(path.read_text()) for path in (tmp_path / "run").glob("folds/*/evaluation.json")]
    for given in ("audio", "text"):
        means = evaluation["missing_modality"][given]
        assert means["ua"] == pytest.approx(np.mean([fold["missing_modality"][given]["ua"] for fold in folds]))
        assert f"{given} alone | wa {means['wa']:.4f}" in (tmp_path / "run" / "model" / "README.md").read_text()
    predictions = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert sorted(line["id"] for line in predictions) == [f"u{number:02d}" for number in range(48)]
    assert len(evaluation["folds"]) == 5
    for name, interval in evaluation["over_folds"].items():
        assert interval["mean"] == pytest.approx(np.mean([fold[name] for fold in evaluation["folds"].values()]))
    right = [line["label"] == line["prediction"] for line in predictions]
    assert evaluation["pooled_metrics"]["wa"] == pytest.approx(np.mean(right))
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_folds_can_train_on_all_speakers_but_the_tested_ones_and_take_the_last_epoch(
    labelled: Labelled, tmp_path: Path
) -> None:
    evaluation = run(labelled, tmp_path / "run", store=labelled.store, protocol="5-fold", epochs=1, validation_share=0)

    assert "the last epoch is taken" in evaluation["protocol"]["description"]
    assert evaluation["utterances"] == 48
    folds = {
        path.parent.name: json.loads(path.read_text()) for path in (tmp_path / "run").glob("folds/*/evaluation.json")
    }
    assert all(fold["step"] == fold["steps"] for fold in folds.values())
    assert evaluation["model_fold"] == folds[min(folds)]["fold"]
    assert "holds a run of several folds" in refusal(lambda: run(labelled, tmp_path / "run"))
    assert "chose the epoch" not in (tmp_path / "run" / "model" / "README.md").read_text()


def test_speakers_are_judged_without_a_threshold_where_nothing_was_held_out_to_choose_it(
    labelled: Labelled, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    fields = {"protocol": "5-fold", "epochs": 1, "validation_share": 0}
    evaluation = run(labelled, out, "verification", store=labelled.store, **fields)

    assert "eer" in evaluation["metrics"]
    assert "at_threshold" not in evaluation
    write_task_report(out, [labelled.store], tmp_path / "report.html", title="Speakers")
    assert "the model has none of its own" in (tmp_path / "report.html").read_text()


def test_everything_can_be_trained_on_and_then_nothing_is_measured(labelled: Labelled, tmp_path: Path) -> None:
    evaluation = run(labelled, tmp_path / "run", "verification", protocol="all", epochs=1)

    assert "metrics" not in evaluation
    assert evaluation["step"] == evaluation["steps"]
    write_task_report(tmp_path / "run", [labelled.split], tmp_path / "report.html", title="Everything")
    assert "another store" in refusal(
        lambda: evaluate_task("verification", [labelled.split], tmp_path / "run" / "model")
    )
    elsewhere = evaluate_task("verification", [other_store(tmp_path)], tmp_path / "run" / "model")
    assert elsewhere is not None
    assert elsewhere["utterances"] == 12


# What is trained ----------------------------------------------------------------------------------------------------


def test_it_learns_what_the_sound_and_the_words_tell(labelled: Labelled, tmp_path: Path) -> None:
    emotion = run(labelled, tmp_path / "emotion", epochs=40)
    sentiment = run(labelled, tmp_path / "sentiment", "sentiment", epochs=40)

    assert emotion["metrics"]["ua"] > 0.75
    assert sentiment["metrics"]["mae"] < 0.9


def test_pools_are_measured_once_by_the_first_weights_and_what_continues_a_model_keeps_its_constants(
    labelled: Labelled, tmp_path: Path
) -> None:
    def constants(folder: Path) -> list[torch.Tensor]:
        weights = load_file(folder / "model" / "model.safetensors")
        return [weights[f"head.standardisation.{name}"] for name in ("mean_4D", "deviation_4D")]

    short, long, more = tmp_path / "short", tmp_path / "long", tmp_path / "more"
    run(labelled, short, head=BEYOND_THE_PAPER, epochs=1)
    run(labelled, long, head=BEYOND_THE_PAPER, epochs=4)
    settings = make_config(FinetuneConfig, QUICK, {"epochs": 1})
    finetune("emotion", [labelled.split], more, settings, start_from=long / "model")

    for one, other, third in zip(*map(constants, (short, long, more)), strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, third)
    assert not torch.equal(constants(short)[1], torch.ones(4, 64))


@pytest.mark.parametrize("fusion", ["text", "concat"])
def test_pools_of_what_a_model_was_not_given_are_measured_where_it_is_continued_with_it(
    labelled: Labelled, tmp_path: Path, fusion: str
) -> None:
    run(labelled, tmp_path / "words", head={"fusion": fusion, "standardise_pools": True}, epochs=1, inputs="text")
    settings, start = make_config(FinetuneConfig, QUICK, {"epochs": 1}), tmp_path / "words" / "model"
    finetune("emotion", [labelled.split], tmp_path / "both", settings, start_from=start, head={"fusion": "concat"})
    before, after = (
        load_file(tmp_path / name / "model" / "model.safetensors")["head.standardisation.deviation_4D"][2:]
        for name in ("words", "both")
    )
    assert torch.equal(before, torch.ones_like(before))
    assert (after < 1).all()


def test_pools_are_measured_anew_where_a_model_is_continued_with_another_pooling(
    labelled: Labelled, tmp_path: Path
) -> None:
    run(labelled, tmp_path / "maxima", head={"standardise_pools": True}, epochs=1)
    settings, start = make_config(FinetuneConfig, QUICK, {"epochs": 1}), tmp_path / "maxima" / "model"
    head = {"audio_pooling": "statistics"}
    finetune("emotion", [labelled.split], tmp_path / "deviations", settings, start_from=start, head=head)
    before, after = (
        load_file(tmp_path / name / "model" / "model.safetensors")["head.standardisation.mean_4D"][3]
        for name in ("maxima", "deviations")
    )
    assert (after >= 0).all()
    assert not torch.allclose(before, after)


def test_a_head_that_hears_prosody_keeps_what_it_measured_and_gives_in_use_what_it_was_judged_by(
    labelled: Labelled, tmp_path: Path
) -> None:
    processor = load_processor(labelled.pretrained)
    processor = CtalProcessor(new_extractor({"pitch": True, "cmvn": "fixed"}), processor.tokenizer)
    start = tmp_path / "start"
    new_model("nano", processor, {"frame_stack": 2}).save_pretrained(start)
    processor.save_pretrained(start)
    head = {"fusion": "tensor", "audio_pooling": "prosody", "label_smoothing": 0.2, "regression_loss": "histogram"}
    config = make_config(FinetuneConfig, QUICK, {"epochs": 1, "weights": "random"})
    finetune("emotion", [labelled.split], tmp_path / "emotion", config, start_from=start, head=head)
    config, start = make_config(FinetuneConfig, QUICK, {"epochs": 1}), tmp_path / "emotion" / "model"
    finetune("sentiment", [labelled.split], tmp_path / "sentiment", config, start_from=start, head=head)

    kept = ("letters_V", "begins_word_V", "mean_P", "deviation_P")
    before, after = (
        [load_file(tmp_path / task / "model" / "model.safetensors")[f"head.prosody.{name}"] for name in kept]
        for task in ("emotion", "sentiment")
    )
    assert before[0].tolist() == spelling_of_tokens(processor.tokenizer)[0]
    assert before[3].min() > 0
    assert (before[3] != 1).all()
    assert all(torch.equal(*each) for each in zip(before, after, strict=True))

    hear, store = pipeline("sentiment", tmp_path / "sentiment" / "model", device="cpu"), Store(labelled.split)
    place = {name: number for number, name in enumerate(store.index.ids)}
    for line in (tmp_path / "sentiment" / "predictions.jsonl").read_text().splitlines():
        judged = json.loads(line)
        stored = store.read(place[judged["id"]])
        result = hear(load_audio(stored.audio, stored.id), text=stored.text, sampling_rate=SAMPLING_RATE)
        assert result.score == judged["prediction"]
        assert judged["prediction"] in SCORES


def test_words_are_as_fast_in_a_window_as_in_the_whole_recording(labelled: Labelled) -> None:
    processor = load_processor(labelled.pretrained)
    processor = CtalProcessor(new_extractor({"pitch": True}), processor.tokenizer)
    fields = {**new_model("nano", processor, {}).config.to_dict(), "audio_pooling": "prosody"}
    model = CtalForSequenceClassification(CtalConfig.from_dict(fields)).eval()
    assert model.head.prosody is not None
    model.head.prosody.count_letters(*spelling_of_tokens(processor.tokenizer))
    found: list[Tensor] = []
    model.head.prosody.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    corpus = Corpus([Store(labelled.split)])
    targets = read_targets(TASKS["emotion"], corpus)
    for max_frames in (3000, 40):
        config = make_config(FinetuneConfig, QUICK, {"max_frames": max_frames})
        batch = make_dataset(corpus, processor, config, targets, model.config, inputs="both")[Microbatch(0, (0, 1, 2))]
        model(**{name: value for name, value in batch.items() if name not in ("rows", "labels")})
    whole, window = found
    assert (whole[:, :-2] - window[:, :-2]).abs().max() > 0.01
    torch.testing.assert_close(whole[:, -2:], window[:, -2:])


@pytest.mark.parametrize("frozen", ["text", "audio", "both"])
def test_a_frozen_encoder_stays_as_it_is(labelled: Labelled, tmp_path: Path, frozen: str) -> None:
    run(labelled, tmp_path / "run", frozen=frozen, epochs=1)

    before = load_file(labelled.pretrained / "model.safetensors")
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    for modality in ("text", "audio"):
        name = f"ctal.{modality}_encoder.layers.0.feed_forward.dense.weight"
        assert torch.equal(before[name], after[name]) == (frozen in (modality, "both")), name


@pytest.mark.parametrize("fusion", ["orthogonal", "text", "audio"])
@pytest.mark.parametrize("audio_sees_text", [True, False])
def test_what_is_trained_gets_a_gradient_in_every_pass(
    labelled: Labelled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fusion: str, audio_sees_text: bool
) -> None:
    """Which DDP insists on."""
    start = tmp_path / "start"
    shutil.copytree(labelled.pretrained, start)
    config = json.loads((start / "config.json").read_text())
    (start / "config.json").write_text(json.dumps({**config, "audio_sees_text": audio_sees_text}))
    made: list[FinetuneObjective] = []

    class Made(Exception):
        pass

    def stop(objective: FinetuneObjective, *arguments: object, **more: object) -> None:
        made.append(objective)
        raise Made

    monkeypatch.setattr("ctal.finetune.train", stop)
    settings = make_config(FinetuneConfig, QUICK)
    with pytest.raises(Made):
        finetune("emotion", [labelled.split], tmp_path / "run", settings, start_from=start, head={"fusion": fusion})
    objective = made[0]
    parameter_groups(objective.model, 0.0, objective.rate_scale)
    batch = objective.dataset[Microbatch(0, tuple(objective.train_rows[:6].tolist()))]
    objective.losses(objective.model, batch, torch.tensor([6]))["loss"].backward()

    named = dict(objective.model.named_parameters())
    assert {name for name, each in named.items() if each.grad is None} == {
        name for name, each in named.items() if not each.requires_grad
    }
    assert any(each.requires_grad for each in named.values())


def test_layers_learn_more_slowly_the_further_they_are_from_the_head(labelled: Labelled, tmp_path: Path) -> None:
    run(labelled, tmp_path / "run", layer_decay=0.1, epochs=1, warmup_ratio=0.0, weight_decay=0.0)

    before = load_file(labelled.pretrained / "model.safetensors")
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    moved = [
        (after[name] - before[name]).abs().max().item()
        for name in (
            "ctal.audio_encoder.dense.weight",
            *(f"ctal.audio_encoder.layers.{layer}.feed_forward.dense.weight" for layer in (0, 1)),
        )
    ]
    assert moved[0] < 0.3 * moved[1] < 0.1 * moved[2]


def test_a_model_of_another_task_is_a_start_too(labelled: Labelled, runs: dict[str, Path], tmp_path: Path) -> None:
    config = make_config(FinetuneConfig, QUICK, {"epochs": 1})

    evaluation = finetune(
        "verification", [labelled.split], tmp_path / "run", config, start_from=runs["emotion"] / "model"
    )

    assert evaluation is not None
    assert 0 <= evaluation["metrics"]["eer"] <= 1


def test_a_model_of_another_task_is_no_start_where_it_was_trained_on_what_would_be_judged(
    labelled: Labelled, runs: dict[str, Path], tmp_path: Path
) -> None:
    config, start = make_config(FinetuneConfig, QUICK, {"protocol": "5-fold"}), runs["emotion"] / "model"

    message = refusal(lambda: finetune("sentiment", [labelled.store], tmp_path / "run", config, start_from=start))

    assert "start from the pre-trained model" in message


def test_a_model_that_was_trained_on_everything_may_learn_another_task_from_everything(
    labelled: Labelled, runs: dict[str, Path], tmp_path: Path
) -> None:
    config, start = make_config(FinetuneConfig, QUICK, {"protocol": "all", "epochs": 1}), runs["emotion"] / "model"

    evaluation = finetune("sentiment", [labelled.split], tmp_path / "run", config, start_from=start)

    assert evaluation is not None
    assert "metrics" not in evaluation


@pytest.mark.parametrize("damage", ["named as a compiled model's", "of fewer layers"])
def test_weights_that_lack_part_of_the_encoders_are_no_start(labelled: Labelled, tmp_path: Path, damage: str) -> None:
    start = tmp_path / "start"
    shutil.copytree(labelled.pretrained, start)
    weights = load_file(start / "model.safetensors")
    if damage == "of fewer layers":
        weights = {name: value for name, value in weights.items() if "audio_encoder.layers.1." not in name}
    else:
        weights = {f"_orig_mod.{name}": value for name, value in weights.items()}
    save_file(weights, start / "model.safetensors", metadata={"format": "pt"})

    config = make_config(FinetuneConfig, QUICK)
    message = refusal(lambda: finetune("emotion", [labelled.split], tmp_path / "run", config, start_from=start))

    assert message.startswith(f"--from {start}: model.safetensors lacks ctal.")


def test_what_tells_classes_apart_is_new_where_they_are_others_and_kept_where_they_are_the_same(
    labelled: Labelled, runs: dict[str, Path], tmp_path: Path
) -> None:
    start = tmp_path / "start"
    shutil.copytree(runs["emotion"] / "model", start)
    still = {"epochs": 1, "learning_rate": 1e-9, "protocol": "all"}

    def continued(name: str) -> Tensor:
        config = make_config(FinetuneConfig, QUICK, still)
        finetune("emotion", [labelled.split], tmp_path / name, config, start_from=start)
        return load_file(tmp_path / name / "model" / "model.safetensors")["classifier.weight"]

    before = load_file(start / "model.safetensors")["classifier.weight"]
    torch.testing.assert_close(continued("same"), before, atol=1e-5, rtol=0)
    config = json.loads((start / "config.json").read_text())
    config["id2label"] = {number: f"other {name}" for number, name in config["id2label"].items()}
    config["label2id"] = {name: int(number) for number, name in config["id2label"].items()}
    (start / "config.json").write_text(json.dumps(config))
    assert (continued("others") - before).abs().max() > 1e-3


def test_random_weights_keep_the_architecture_alone(labelled: Labelled, tmp_path: Path) -> None:
    run(labelled, tmp_path / "run", weights="random", epochs=1, learning_rate=1e-9)

    before = load_file(labelled.pretrained / "model.safetensors")
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    name = "ctal.audio_encoder.layers.0.feed_forward.dense.weight"
    assert before[name].shape == after[name].shape
    assert (before[name] - after[name]).abs().max() > 1e-3


def test_balanced_classes_weigh_the_same_in_all(labelled: Labelled, tmp_path: Path) -> None:
    from ctal.finetune import FinetuneObjective

    seen: list[tuple[torch.Tensor, np.ndarray]] = []
    original = FinetuneObjective._class_weights

    def spy(self: FinetuneObjective) -> torch.Tensor | None:
        weights = original(self)
        assert weights is not None
        seen.append((weights, np.bincount(self.targets.values[self.train_rows])))
        return weights

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FinetuneObjective, "_class_weights", spy)
        run(labelled, tmp_path / "run", class_weights="balanced", epochs=1)
    ((weights, counts),) = seen
    shares = weights.numpy() * counts
    np.testing.assert_allclose(shares, shares[0], rtol=1e-5)
    assert shares.sum() == pytest.approx(counts.sum(), rel=1e-5)


def test_the_reference_schedule_goes_up_and_down_and_the_cosine_falls_to_0() -> None:
    reference, cosine = (
        make_config(FinetuneConfig, {"schedule": kind, "epochs": 5, "steps": 40, "learning_rate": 1.0})
        for kind in ("reference", "cosine")
    )

    assert [round(learning_rate(reference, step), 6) for step in (0, 5, 10, 15)] == [1, 0, 1, 0]
    rates = [learning_rate(cosine, step) for step in range(3, 40)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.01


# What is given to the model -----------------------------------------------------------------------------------------


def dataset_of(labelled: Labelled, inputs: str = "both", mean_rows: np.ndarray | None = None, **fields: Any) -> Any:
    corpus = Corpus([Store(labelled.split)])
    config = make_config(FinetuneConfig, QUICK, fields)
    model = CtalForSequenceClassification.from_pretrained(labelled.pretrained)
    targets = read_targets(TASKS["emotion"], corpus)
    processor = load_processor(labelled.pretrained)
    return make_dataset(corpus, processor, config, targets, model.config, inputs=inputs, mean_rows=mean_rows)


def test_a_withheld_input_is_not_there(labelled: Labelled) -> None:
    rows = Microbatch(EVALUATION, (0, 1, 2))

    both, audio, text = (dataset_of(labelled, inputs)[rows] for inputs in ("both", "audio", "text"))

    assert audio["attention_mask"].sum(1).tolist() == [2, 2, 2]
    assert torch.equal(audio["input_features"], both["input_features"])
    assert not text["feature_attention_mask"].any()
    assert torch.equal(text["input_ids"], both["input_ids"])


def test_recordings_that_are_withheld_are_not_decoded(labelled: Labelled, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a recording was decoded")

    monkeypatch.setattr("ctal.batching.load_audio", refuse)
    assert not dataset_of(labelled, "text")[Microbatch(0, (0, 1))]["feature_attention_mask"].any()
    with pytest.raises(AssertionError, match="decoded"):
        dataset_of(labelled, "audio")[Microbatch(0, (0, 1))]


def test_modality_dropout_drops_either_as_often_never_both_and_nothing_in_evaluation(labelled: Labelled) -> None:
    dataset = dataset_of(labelled, modality_dropout=0.5)

    drawn = [dataset.utterance(row, epoch) for row in range(20) for epoch in range(20)]
    without_text = np.array([len(each["input_ids"]) == 2 for each in drawn])
    without_audio = np.array([len(each["input_features"]) == 0 for each in drawn])

    assert not (without_text & without_audio).any()
    assert without_text.mean() == pytest.approx(0.25, abs=0.07)
    assert without_audio.mean() == pytest.approx(0.25, abs=0.07)
    evaluated = [dataset.utterance(row, EVALUATION) for row in range(20)]
    assert all(len(each["input_ids"]) > 2 and len(each["input_features"]) for each in evaluated)


def test_what_is_left_of_utterances_without_a_transcript_is_said(labelled: Labelled, tmp_path: Path) -> None:
    other_store(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "new.jsonl").read_text().splitlines()]
    for line in lines[:5]:
        del line["text"]
    (tmp_path / "part.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare_store(get_corpus("manifest").prepare(tmp_path / "part.jsonl"), tmp_path / "part", corpus="part", workers=1)
    config = make_config(FinetuneConfig, QUICK, {"epochs": 1, "protocol": "all"})
    for fusion, left in (("concat", "the sound alone is left"), ("text", "nothing is left"), ("audio", None)):
        notes, how = Notes(), {"start_from": labelled.pretrained, "head": {"fusion": fusion}}
        finetune("emotion", [tmp_path / "part"], tmp_path / fusion, config, progress=notes, **how)
        said = [note for note in notes.notes if "no transcript" in note]
        expected = [f"5 of 12 training utterances have no transcript: of these {left}"] if left else []
        assert said == expected


def test_modality_dropout_leaves_a_transcript_without_words_its_recording(labelled: Labelled) -> None:
    dataset = dataset_of(labelled, modality_dropout=0.9)
    dataset.encode = lambda _: [0, 2]
    assert all(len(dataset.utterance(row, 0)["input_features"]) for row in range(20))


def test_blanked_blocks_are_the_same_for_static_features_and_deltas_and_never_in_evaluation(
    labelled: Labelled,
) -> None:
    dataset, plain = dataset_of(labelled, frequency_masks=2, time_masks=1), dataset_of(labelled)

    distorted, whole = dataset.utterance(0, 3)["input_features"], plain.utterance(0, 3)["input_features"]

    static, delta = (distorted != whole).split(80, 1)
    assert torch.equal(static, delta)
    assert static.any()
    evaluated = dataset.utterance(0, EVALUATION)["input_features"]
    assert torch.equal(evaluated, plain.utterance(0, EVALUATION)["input_features"])


def test_blanked_bands_spare_the_pitch_and_blanked_stretches_do_not() -> None:
    features = torch.ones(50, 163)

    bands = mask_blocks(features, 0, 20, torch.Generator().manual_seed(0))
    stretches = mask_blocks(features, 3, 0, torch.Generator().manual_seed(0))

    assert (bands[:, :160] == 0).any()
    assert torch.equal(bands[:, 160:], features[:, 160:])
    blank = (stretches == 0).any(1)
    assert blank.any()
    assert not stretches[blank].any()


def test_a_model_trained_with_modality_dropout_says_what_it_loses(labelled: Labelled, tmp_path: Path) -> None:
    evaluation = run(labelled, tmp_path / "run", modality_dropout=0.3, epochs=1)

    assert evaluation["missing_modality"].keys() == {"audio", "text"}
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "test part, audio alone" in card


# However the work is spread -----------------------------------------------------------------------------------------


def test_accumulation_and_workers_do_not_change_the_losses(labelled: Labelled, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"batch_frames": 900, "head": BEYOND_THE_PAPER}
    one = run(labelled, tmp_path / "one", **fields)
    other = run(labelled, tmp_path / "other", accumulation=3, workers=2, **fields)

    differences = [
        abs(value - losses(tmp_path / "other")[step][name])
        for step, values in losses(tmp_path / "one").items()
        for name, value in values.items()
    ]
    assert max(differences) <= 1e-5
    assert one["metrics"] == pytest.approx(other["metrics"], abs=1e-6)


def arguments(labelled: Labelled, out: Path, *more: str) -> list[str]:
    fields = {**QUICK, "epochs": 1, "protocol": "5-fold"}
    settings = [part for name, value in fields.items() for part in ("--set", f"{name}={value}")]
    fixed = ["finetune", "emotion", str(labelled.store), "--from", str(labelled.pretrained), "--out", str(out)]
    return [*fixed, *settings, *more]


def test_a_killed_run_of_folds_goes_on_and_equals_an_uninterrupted_one(labelled: Labelled, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert CtalProcess(arguments(labelled, whole), tmp_path / "a").wait().code == 0
    for number, step in enumerate(random.Random(5).sample(range(1, 5), 2)):
        more = arguments(labelled, killed, *(["--resume"] if number else []))
        ended = CtalProcess(more, tmp_path / f"b{number}", ("step", step)).wait()
        assert ended.code == -9, ended.errors

    ended = CtalProcess(arguments(labelled, killed, "--resume"), tmp_path / "c").wait()

    assert ended.code == 0, ended.errors
    assert (whole / "predictions.jsonl").read_bytes() == (killed / "predictions.jsonl").read_bytes()
    for name in ("metrics", "folds", "pooled_metrics"):
        first, second = (json.loads((path / "evaluation.json").read_text())[name] for path in (whole, killed))
        assert first == second


def test_two_ranks_train_and_evaluate_as_one(labelled: Labelled, tmp_path: Path, runs: dict[str, Path]) -> None:
    settings = {**QUICK, "batch_frames": 900, "epochs": 1}
    pairs = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    head = {"head_dropout_prob": 0, **BEYOND_THE_PAPER}
    pairs += [part for name, value in head.items() for part in ("--set", f"{name}={value}")]
    command = ["finetune", "sentiment", str(labelled.split), "--from", str(labelled.pretrained), *pairs]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    how: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 240}
    how["env"] = {**os.environ, "OMP_NUM_THREADS": "1"}
    for ranks in ("1", "2"):
        out = ["--out", str(tmp_path / ranks)]
        done = subprocess.run([*launcher, ranks, "-m", "ctal", *command, *out], check=False, **how)
        assert done.returncode == 0, done.stderr

    one, two = (json.loads((tmp_path / ranks / "evaluation.json").read_text()) for ranks in ("1", "2"))
    assert two["metrics"] == pytest.approx(one["metrics"], abs=1e-4)
    for step, values in losses(tmp_path / "1").items():
        assert losses(tmp_path / "2")[step] == pytest.approx(values, abs=1e-5)

    evaluate = ["evaluate", "emotion", str(labelled.split), "--model", str(runs["emotion"] / "model"), "--json"]
    shared = subprocess.run([*launcher, "2", "-m", "ctal", *evaluate], check=False, **how)
    assert shared.returncode == 0, shared.stderr
    alone = evaluate_task("emotion", [labelled.split], runs["emotion"] / "model")
    assert alone is not None
    together = json.loads(shared.stdout)
    assert together["metrics"] == pytest.approx(alone["metrics"], abs=1e-9)
    assert together["utterances"] == alone["utterances"]


def test_what_pretraining_has_heard_is_known_by_its_recordings_in_whatever_store(
    labelled: Labelled, tmp_path: Path
) -> None:
    sounds = Heard.of(labelled.pretrained).sounds
    assert set(sounds.tolist()) <= set(Corpus([Store(labelled.store)]).recordings.tolist())
    unheard = run(labelled, tmp_path / "unheard", store=other_store(tmp_path), protocol="5-fold", epochs=1)
    assert "pre-training has heard" not in unheard["protocol"]["description"]
    heard = run(labelled, tmp_path / "heard", epochs=1)  # in another store than that of the pre-training
    assert "pre-training has heard the test part's audio" in heard["protocol"]["description"]


def test_training_and_evaluation_take_windows_that_the_processor_takes(labelled: Labelled, tmp_path: Path) -> None:
    shutil.copytree(labelled.pretrained, tmp_path / "model")
    path = tmp_path / "model" / "processor_config.json"
    settings = json.loads(path.read_text())
    settings["feature_extractor"]["max_frames"] = 40
    path.write_text(json.dumps(settings))
    corpus, config = Corpus([Store(labelled.split)]), make_config(FinetuneConfig, QUICK)
    processor, architecture = load_processor(tmp_path / "model"), CtalConfig.from_pretrained(tmp_path / "model")
    dataset = make_dataset(
        corpus, processor, config, read_targets(TASKS["emotion"], corpus), architecture, inputs="both"
    )
    assert corpus.frames.max() > 40
    assert dataset.max_frames == dataset.train_frames == 40


# Wrong input --------------------------------------------------------------------------------------------------------


def test_wrong_input_is_one_line_that_names_it_and_the_mend(
    labelled: Labelled, runs: dict[str, Path], tmp_path: Path
) -> None:
    split, pretrained = [labelled.split], labelled.pretrained
    config = make_config(FinetuneConfig, QUICK)

    def of(task: str = "emotion", start: Path = pretrained, **more: Any) -> Callable[[], Any]:
        return lambda: finetune(task, split, tmp_path / "run", config, start_from=start, **more)

    assert "did you mean 'emotion'" in refusal(of("emotoin"))
    assert "not a model folder" in refusal(of(start=tmp_path))
    assert "use orthogonal, orthogonal_attended, concat" in refusal(of(head={"fusion": "sum"}))
    few = make_config(FinetuneConfig, QUICK, {"protocol": "ge2e"})
    ge2e = refusal(lambda: finetune("verification", split, tmp_path / "run", few, start_from=pretrained))
    assert "fold test tests 2 speakers, and it draws 4" in ge2e
    assert "add --resume" in refusal(lambda: run(labelled, runs["emotion"]))
    one = {"head": {"fusion": "text"}, "modality_dropout": 0.3}
    assert "is for fusions of both" in refusal(lambda: run(labelled, tmp_path / "run", **one))
    model = runs["emotion"] / "model"
    capitals, wordless = tmp_path / "capitals", tmp_path / "wordless"
    for store, labels in ((capitals, ("happy", "sad", "Happy")), (wordless, ("happy", "sad", "sad"))):
        prepare_store(
            [
                Utterance(str(number), record(tmp_path / f"{number}.wav", 0.3), labels={"emotion": label})
                for number, label in enumerate(labels)
            ],
            store,
            corpus=store.name,
            workers=1,
        )
    words = refusal(lambda: run(labelled, tmp_path / "run", store=wordless, protocol="all", head={"fusion": "text"}))
    assert "nothing in the stores has one; prepare them with transcripts" in words
    assert "prepare them with transcripts" in refusal(
        lambda: evaluate_task("emotion", [wordless], model, inputs="text")
    )
    assert "'Happy' and 'happy' differ in capitals alone" in refusal(
        lambda: finetune("emotion", [capitals], tmp_path / "run", config, start_from=pretrained)
    )
    occupied = record(tmp_path / "occupied.wav", 0.1)
    assert f"{occupied}: cannot be written" in refusal(lambda: run(labelled, occupied))
    nowhere = tmp_path / "nowhere" / "scores.jsonl"
    assert "its folder does not exist" in refusal(lambda: evaluate_task("emotion", split, model, scores=nowhere))
    assert "cannot be written" in refusal(lambda: evaluate_task("emotion", split, model, scores=tmp_path))
    assert "a model for emotion, not for sentiment" in refusal(lambda: evaluate_task("sentiment", split, model))
    assert "fine-tune it first" in refusal(lambda: evaluate_task("emotion", split, pretrained))
    assert "--inputs words" in refusal(lambda: evaluate_task("emotion", split, model, inputs="words"))
    trials = tmp_path / "trials.txt"
    assert "only verification" in refusal(lambda: evaluate_task("emotion", split, model, trials=trials))
    verification = runs["verification"] / "model"
    assert "cannot be read" in refusal(lambda: evaluate_task("verification", split, verification, trials=trials))


def relabelled(labelled: Labelled, folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    """A store in `folder` of the same recordings, each line of the manifest as `change` has it."""
    lines = [json.loads(line) for line in labelled.store.with_suffix(".jsonl").read_text().splitlines()]
    lines = [change({**line, "audio": str(labelled.store.parent / line["audio"])}) for line in lines]
    (folder / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare_store(get_corpus("manifest").prepare(folder / "m.jsonl"), folder / "store", corpus="one", workers=1)
    return folder / "store"


def normalised_by(labelled: Labelled, cmvn: Cmvn, folder: Path) -> Labelled:
    """The same with a pre-trained model in `folder` whose features are normalised so."""
    processor, model = load_model(labelled.pretrained)
    processor.feature_extractor.cmvn = model.config.audio.cmvn = cmvn
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return replace(labelled, pretrained=folder)


def test_speakers_means_vary_from_epoch_to_epoch_where_that_is_asked_for_and_never_in_evaluation(
    labelled: Labelled, tmp_path: Path
) -> None:
    centred = normalised_by(labelled, "speaker", tmp_path / "start")
    varied, plain = dataset_of(centred, random_speaker_mean=True), dataset_of(centred)
    epochs = [varied.utterance(0, epoch)["input_features"] for epoch in range(8)]
    assert any(not torch.equal(epochs[0], each) for each in epochs)
    assert torch.equal(epochs[3], varied.utterance(0, 3)["input_features"])
    assert torch.equal(*(each.utterance(0, EVALUATION)["input_features"] for each in (varied, plain)))
    refused = refusal(lambda: run(labelled, tmp_path / "run", random_speaker_mean=True))
    assert "random_speaker_mean" in refused
    assert "pre-train with cmvn=speaker" in refused


def test_a_swapped_speakers_mean_is_one_of_the_training_speakers_and_none_is_swapped_in_evaluation(
    labelled: Labelled, tmp_path: Path
) -> None:
    fixed = normalised_by(labelled, "fixed", tmp_path / "fixed")
    plain, rows = dataset_of(fixed), np.arange(24)
    always, sometimes = (dataset_of(fixed, mean_rows=rows, speaker_swap=share) for share in (1.0, 0.5))
    heard: dict[str, list[torch.Tensor]] = {}
    for row in rows.tolist():
        stored = plain.corpus.read(row)
        heard.setdefault(stored.speaker, []).append(plain.features.read(row, stored).float())
    means = torch.stack([torch.cat(each).mean(0) for each in heard.values()])
    shifts = means - means[list(heard).index(plain.corpus.speakers[0])]
    before = plain.utterance(0, 0)["input_features"]
    chosen = set()
    for epoch in range(80):
        after = always.utterance(0, epoch)["input_features"].float()
        distances = (after - before.float() - shifts[:, None]).abs().amax((1, 2))
        assert distances.min() < 0.01  # float16
        chosen.add(int(distances.argmin()))
    assert chosen == set(range(len(heard)))
    unchanged = [torch.equal(sometimes.utterance(0, epoch)["input_features"], before) for epoch in range(20)]
    assert 0 < sum(unchanged) < 20
    assert torch.equal(*(each.utterance(0, EVALUATION)["input_features"] for each in (always, plain)))


def test_voices_are_those_of_the_training_part_alone(
    labelled: Labelled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: set[int] = set()
    original = CorpusFeatures.mean_of

    def spy(features: CorpusFeatures, speaker: str) -> torch.Tensor:
        heard.update(features.speaker_rows[speaker].tolist())
        return original(features, speaker)

    monkeypatch.setattr(CorpusFeatures, "mean_of", spy)
    fixed = normalised_by(labelled, "fixed", tmp_path / "fixed")
    run(fixed, tmp_path / "run", epochs=2, speaker_swap=1.0)
    splits = np.array(Corpus([Store(labelled.split)]).splits)
    assert heard == set(np.flatnonzero(splits == "train").tolist())


def test_speakers_are_not_swapped_where_that_would_take_away_what_is_asked_or_changes_nothing(
    labelled: Labelled, tmp_path: Path
) -> None:
    known, fixed = (normalised_by(labelled, cmvn, tmp_path / cmvn) for cmvn in ("speaker", "fixed"))
    assert "is to tell apart" in refusal(lambda: run(fixed, tmp_path / "a", "verification", speaker_swap=0.5))
    for start, cmvn in ((known, "speaker"), (labelled, "utterance")):
        assert f"its cmvn is {cmvn}" in refusal(lambda start=start: run(start, tmp_path / "b", speaker_swap=0.5))
    store = relabelled(labelled, tmp_path, lambda line: {**line, "speaker": None})
    of_nobody = {"store": store, "protocol": "5-fold", "speaker_swap": 0.5}
    assert "trains on 0 speakers that are named" in refusal(lambda: run(fixed, tmp_path / "c", **of_nobody))


def test_a_model_of_known_speakers_says_so_and_cannot_tell_speakers_apart(labelled: Labelled, tmp_path: Path) -> None:
    centred = normalised_by(labelled, "speaker", tmp_path / "start")
    evaluation = run(centred, tmp_path / "run")
    assert "features less each speaker's mean" in evaluation["protocol"]["description"]
    (tmp_path / "other").mkdir()
    nobody = Utterance("of nobody", record(tmp_path / "a.wav", 0.7), labels={"emotion": "sad"})
    prepare_store([nobody], tmp_path / "nameless", corpus="nameless", workers=1)
    stores = [other_store(tmp_path / "other"), tmp_path / "nameless"]
    said = evaluate_task("emotion", stores, tmp_path / "run" / "model")
    assert said is not None
    assert "features less each speaker's mean" in said["measured_on"]
    assert "(1 of 13 utterances, whose speaker is not known, less their own)" in said["measured_on"]
    refused = refusal(lambda: run(centred, tmp_path / "verification", "verification"))
    assert "pre-train with another cmvn to tell them apart" in refused
    by_words = run(centred, tmp_path / "words", head={"fusion": "text"}, inputs="text")
    assert "speaker's mean" not in by_words["protocol"]["description"]
    # In use, with the same recordings of the speaker, the same is said.
    lines = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    corpus = Corpus([Store(labelled.split)])
    stored = {each.id: each for each in map(corpus.read, range(len(corpus)))}
    speaker = lines[0]["speaker"]
    waves = {name: load_audio(each.audio, "") for name, each in stored.items() if each.speaker == speaker}
    known = [Recording(wave, None, SAMPLING_RATE) for wave in waves.values()]
    hear = pipeline("emotion", tmp_path / "run" / "model", device="cpu", speaker=known)
    for line in (each for each in lines if each["speaker"] == speaker):
        result = hear(waves[line["id"]], text=stored[line["id"]].text, sampling_rate=SAMPLING_RATE)
        assert result.probabilities == pytest.approx(line["probabilities"], abs=2e-3)


def test_a_folder_of_something_else_is_not_called_a_run(labelled: Labelled, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not to be lost")
    message = refusal(lambda: run(labelled, tmp_path, store=labelled.store, protocol="5-fold"))
    assert message == f"{tmp_path}: is not empty and holds no run of folds; choose another --out"


def test_a_store_without_labels_is_refused(labelled: Labelled, tmp_path: Path) -> None:
    record(tmp_path / "a.wav", 1.0)
    (tmp_path / "m.jsonl").write_text('{"audio": "a.wav"}\n')
    prepare_store(get_corpus("manifest").prepare(tmp_path / "m.jsonl"), tmp_path / "store", corpus="one", workers=1)

    for task, what in (("emotion", "label 'emotion'"), ("verification", "speaker")):
        message = refusal(lambda task=task: run(labelled, tmp_path / "run", task, store=tmp_path / "store"))
        assert f"has a {what}" in message


def test_a_fold_of_neutral_sentiment_alone_is_refused_before_anything_trains(
    labelled: Labelled, tmp_path: Path
) -> None:
    store = relabelled(
        labelled, tmp_path, lambda line: {**line, "sentiment": 0.0} if line["speaker"] == "s05" else line
    )

    how = {"store": store, "protocol": "leave-one-speaker-out"}
    nowhere = refusal(lambda: run(labelled, tmp_path / "run", store=labelled.store, protocol="5-fold", resume=True))
    assert nowhere == f"{tmp_path / 'run'}: no run to resume; leave --resume out to start one"
    message = refusal(lambda: run(labelled, tmp_path / "run", "sentiment", **how))

    assert message.startswith("fold s05: every label of its test part is 0")
    assert not (tmp_path / "run").exists()


def test_a_label_that_a_model_does_not_know_is_named(labelled: Labelled, runs: dict[str, Path], tmp_path: Path) -> None:
    record(tmp_path / "a.wav", 1.0)
    (tmp_path / "m.jsonl").write_text('{"audio": "a.wav", "emotion": "hapy"}\n')
    prepare_store(get_corpus("manifest").prepare(tmp_path / "m.jsonl"), tmp_path / "store", corpus="one", workers=1)

    message = refusal(lambda: evaluate_task("emotion", [tmp_path / "store"], runs["emotion"] / "model"))

    assert "no emotion 'hapy' (did you mean 'happy'?)" in message
