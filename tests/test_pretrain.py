"""Pre-training from stores to a model folder."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from transformers import AutoModelForPreTraining, AutoProcessor

from conftest import NANO, Cli, TinyCorpus, losses, pretrain_arguments
from ctal import CtalConfig, CtalForPreTraining, CtalModel, CtalProcessor, objective
from ctal.batching import Corpus, hold_out
from ctal.console import TrainingProgress
from ctal.corpora import Utterance
from ctal.errors import InputError
from ctal.heard import Heard
from ctal.model_folders import load_processor
from ctal.pretrain import (
    Evaluation,
    PretrainingObjective,
    evaluate_model,
    load_model,
    load_tokenizer,
    make_tokenizer,
    pretrain,
)
from ctal.recipes import PretrainConfig, make_config
from ctal.store import Store, prepare_store
from ctal.training import Silence


class Notes(Silence):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def run(stores: list[Path], out: Path, *, fields: dict[str, Any] | None = None, **more: Any) -> Evaluation:
    config = make_config(PretrainConfig, NANO, {"steps": 2}, fields or {})
    architecture = {"frame_stack": 2, "hidden_dropout_prob": 0}
    evaluation = pretrain(stores, out, config, size="nano", architecture=architecture, **more)
    assert evaluation is not None
    return evaluation


@pytest.fixture(scope="module")
def trained(tiny: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    run([tiny.store], out, tokenizer=tiny.tokenizer, fields={"steps": 8, "checkpoint_every": 4})
    return out


def refusal(error: pytest.ExceptionInfo[InputError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# The model folder -------------------------------------------------------------------------------------------------


def test_the_model_folder_is_loaded_by_auto_classes_and_takes_raw_input(trained: Path) -> None:
    processor = AutoProcessor.from_pretrained(trained / "model")
    assert isinstance(processor, CtalProcessor)
    assert isinstance(AutoModelForPreTraining.from_pretrained(trained / "model"), CtalForPreTraining)
    wave = np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32)
    states = CtalModel.from_pretrained(trained / "model")(**processor(text=["one"], audio=[wave], sampling_rate=16_000))
    assert states.audio_hidden_state is not None


def test_the_card_and_the_provenance_say_what_the_model_is(tiny: TinyCorpus, trained: Path) -> None:
    saved = json.loads((trained / "model" / "run.json").read_text())
    store = Store(tiny.store)
    assert saved["corpus"] == ["tiny"]
    assert saved["data_hash"] == Corpus([store]).content_hash
    assert saved["config"]["steps"] == 8
    assert make_config(PretrainConfig, saved["config"]).learning_rate == NANO["learning_rate"]
    assert saved["metrics"] == losses(trained, "validation")[saved["step"]]
    card = (trained / "model" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: ctal\n")
    assert f"{saved['metrics']['audio_loss']:.4f}" in card
    assert "synthetic" not in card


def test_the_evaluation_is_that_of_the_saved_model_and_can_be_had_again(tiny: TinyCorpus, trained: Path) -> None:
    saved = json.loads((trained / "evaluation.json").read_text())
    again = json.loads(json.dumps(evaluate_model([tiny.store], trained / "model")))
    assert again is not None
    for part in ("comparisons", "step", "held_out", "data_hash"):
        assert again[part] == saved[part]
    assert "speakers held out" in saved["held_out"]


def test_on_other_data_it_says_how_much_was_trained_on_and_a_part_of_its_own_is_refused(
    ctal: Cli, tiny: TinyCorpus, trained: Path, tmp_path: Path
) -> None:
    audio = sorted(tiny.manifest.parent.glob("*.flac"))[:6]
    other = tmp_path / "other"
    texts = [Utterance(path.stem, path, text="hello world") for path in audio]
    prepare_store(texts, other, corpus="other", workers=1)
    evaluation = evaluate_model([other], trained / "model")
    assert evaluation is not None
    held = hold_out(Corpus([Store(other)]), 0.1).validation
    known = np.isin(Corpus([Store(other)]).recordings[held], Heard.of(trained / "model").sounds).sum()
    assert known
    assert evaluation["held_out"].endswith(f"; {known} of their utterances were trained on before")
    shown = ctal("evaluate", "pretraining", other, "--model", trained / "model").output
    assert shown.startswith(f"pretraining: {evaluation['held_out']}\n")
    with pytest.raises(InputError) as caught:
        evaluate_model([tiny.store, other], trained / "model")
    assert f"evaluate it on {other} apart from those" in refusal(caught)
    run([tiny.store, other], tmp_path / "both", tokenizer=tiny.tokenizer)
    with pytest.raises(InputError) as caught:
        evaluate_model([tiny.store], tmp_path / "both" / "model")
    assert "give all of them in the order of its run" in refusal(caught)


def test_of_a_model_of_elsewhere_it_is_said_that_it_may_have_been_trained_on_anything(
    ctal: Cli, tiny: TinyCorpus, trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained / "model", tmp_path / "model")
    for name in ("run.json", "heard.safetensors"):
        (tmp_path / "model" / name).unlink()
    evaluation = evaluate_model([tiny.store], tmp_path / "model")
    assert evaluation is not None
    assert evaluation["held_out"].endswith("; training may have heard it")
    shown = ctal("evaluate", "pretraining", tiny.store, "--model", tmp_path / "model").output
    assert shown.startswith(f"pretraining: {evaluation['held_out']}\n")
    assert "zeroed frames" in shown


# Continuing a model -----------------------------------------------------------------------------------------------


def test_continuing_a_model_starts_from_its_losses(tiny: TinyCorpus, trained: Path, tmp_path: Path) -> None:
    run([tiny.store], tmp_path / "run", start_from=trained / "model")
    step = json.loads((trained / "model" / "run.json").read_text())["step"]
    before = losses(trained, "validation")[step]
    assert losses(tmp_path / "run", "validation")[0] == pytest.approx(before, abs=1e-6)


def test_a_continued_run_knows_what_its_start_has_heard_and_is_resumed_from_that_start_alone(
    tiny: TinyCorpus, trained: Path, tmp_path: Path
) -> None:
    audio = sorted(tiny.manifest.parent.glob("*.flac"))
    prepare_store([Utterance(path.stem, path) for path in audio], tmp_path / "other", corpus="other", workers=1)
    out = tmp_path / "run"
    evaluation = run([tmp_path / "other"], out, start_from=trained / "model")
    assert "of their utterances were trained on before" in evaluation["held_out"]
    first, second = (set(Heard.of(path / "model").sounds.tolist()) for path in (trained, out))
    assert first < second

    with pytest.raises(InputError) as caught:
        run([tmp_path / "other"], out, tokenizer=tiny.tokenizer, resume=True)
    assert "start_from" in refusal(caught)


def test_a_model_without_heads_of_pretraining_and_a_damaged_one_are_refused(trained: Path, tmp_path: Path) -> None:
    CtalModel.from_pretrained(trained / "model").save_pretrained(tmp_path / "bare")
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(trained / "model" / name, tmp_path / "bare")
    shutil.copytree(trained / "model", tmp_path / "damaged")
    weights = tmp_path / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    for name, said in (("bare", "has no heads of pre-training"), ("damaged", "cannot be loaded")):
        with pytest.raises(InputError) as caught:
            load_model(tmp_path / name)
        assert said in refusal(caught)


DAMAGED = [
    *((name, "{") for name in ("config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json")),
    ("tokenizer.json", "{}"),
    ("tokenizer_config.json", "[]"),
]


@pytest.mark.parametrize(("name", "content"), DAMAGED)
def test_a_damaged_file_of_a_model_or_tokenizer_is_one_line_that_names_its_folder(
    trained: Path, tmp_path: Path, name: str, content: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(trained / "model", model)
    (model / name).write_text(content)
    for load in (load_model, load_processor, *([load_tokenizer] if name.startswith("tokenizer") else [])):
        with pytest.raises(InputError) as caught:
            load(model)
        assert refusal(caught).startswith(str(model))


def test_the_commit_is_that_of_a_checkout_of_ctal_alone_and_git_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert objective._commit_of(Path(objective.__file__).parent) is None  # below one, as an installed package may be
    monkeypatch.setenv("PATH", "")
    assert objective.environment()["commit"] is None


def test_a_model_with_fewer_positions_gets_inputs_that_fit(tiny: TinyCorpus, tmp_path: Path) -> None:
    config = make_config(PretrainConfig, NANO, {"steps": 1})
    fields = {"frame_stack": 2, "max_position_embeddings": 12}
    pretrain([tiny.store], tmp_path / "run", config, size="nano", architecture=fields, tokenizer=tiny.tokenizer)
    processor, model = load_model(tmp_path / "run" / "model")
    assert processor.tokenizer.model_max_length == model.config.text.max_tokens == 10
    assert processor.feature_extractor.max_frames == model.config.audio.max_frames == 24


def test_a_continued_model_keeps_its_architecture_tokenizer_and_features(
    tiny: TinyCorpus, trained: Path, tmp_path: Path
) -> None:
    run([tiny.store], tmp_path / "run", start_from=trained / "model")
    for name in ("tokenizer.json", "processor_config.json"):
        assert (tmp_path / "run" / "model" / name).read_text() == (trained / "model" / name).read_text()
    continued, original = (CtalConfig.from_pretrained(path / "model") for path in (tmp_path / "run", trained))
    for part in ("text", "audio"):
        before = getattr(original, part).to_diff_dict()
        assert {**getattr(continued, part).to_diff_dict(), "dtype": before.get("dtype")} == {"dtype": None, **before}


def test_what_features_are_normalised_by_travels_with_the_model(ctal: Cli, tiny: TinyCorpus, tmp_path: Path) -> None:
    assert ctal(*pretrain_arguments(tiny, tmp_path / "run", steps=2, cmvn="fixed")).code == 0
    processor, model = load_model(tmp_path / "run" / "model")
    assert processor.feature_extractor.cmvn == model.config.audio.cmvn == "fixed"
    other = ctal(*pretrain_arguments(tiny, tmp_path / "run", "--resume", steps=2))
    assert other.code == 2
    assert "the run was started with" in other.errors
    assert (
        "use utterance, level, fixed, speaker"
        in ctal(*pretrain_arguments(tiny, tmp_path / "other", cmvn="none")).errors
    )


def test_pitch_is_seen_by_a_model_that_is_told_to_and_is_one_of_the_things_that_it_is_measured_on(
    ctal: Cli, tiny: TinyCorpus, tmp_path: Path
) -> None:
    assert ctal(*pretrain_arguments(tiny, tmp_path / "run", steps=2, pitch="true")).code == 0
    processor, model = load_model(tmp_path / "run" / "model")
    assert processor.feature_extractor.pitch
    assert model.config.audio.pitch
    assert processor.feature_extractor.feature_size == model.config.audio.feature_size == 163
    compared = json.loads((tmp_path / "run" / "evaluation.json").read_text())["comparisons"]
    assert any(each["name"].startswith("zeroed frames, pitch dimensions") for each in compared)
    wrong = ctal(*pretrain_arguments(tiny, tmp_path / "other", pitch="loud"))
    assert "pitch='loud': must be true or false" in wrong.errors


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "processor_config.json", "tokenizer.json"])
def test_a_model_folder_without_one_of_its_files_is_refused(trained: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(trained / "model", tmp_path / "model")
    (tmp_path / "model" / name).unlink()
    with pytest.raises(InputError) as error:
        load_model(tmp_path / "model")
    assert f"({name} is missing)" in refusal(error)


# The data ---------------------------------------------------------------------------------------------------------


def test_the_user_is_told_of_the_split_of_missing_transcripts_and_of_long_recordings(
    tiny: TinyCorpus, tmp_path: Path
) -> None:
    heard = Notes()
    run([tiny.store], tmp_path / "run", tokenizer=tiny.tokenizer, fields={"max_frames": 100}, progress=heard)
    split, untranscribed, longer = heard.notes
    assert split.startswith("20 utterances (")
    assert "1 speakers held out" in split
    assert untranscribed.startswith("5 utterances without a transcript take part in acoustic modelling only")
    assert "recordings are longer than 1.2 s" in longer


def test_recordings_without_any_transcript_train_the_audio_alone(tiny: TinyCorpus, tmp_path: Path) -> None:
    store = tmp_path / "store"
    audio = sorted(tiny.manifest.parent.glob("*.flac"))[:10]
    prepare_store([Utterance(path.stem, path) for path in audio], store, corpus="mute", workers=1)
    run([store], tmp_path / "run", tokenizer=tiny.tokenizer, fields={"batch_frames": 300})
    for values in (losses(tmp_path / "run") | losses(tmp_path / "run", "validation")).values():
        assert values["text_loss"] == 0
        assert values["audio_loss"] > 0
        assert values["loss"] == values["audio_loss"]
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert any("zeroed frames" in each["name"] for each in evaluation["comparisons"])
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "| held-out MLM cross-entropy | not measured: nothing was masked |" in card
    assert "| held-out MCAM L1 | 0." in card


@pytest.mark.parametrize("has_text", [True, False])
def test_a_run_that_masks_nothing_is_refused_before_it_begins(tiny: TinyCorpus, tmp_path: Path, has_text: bool) -> None:
    audio = sorted(tiny.manifest.parent.glob("*.flac"))[:4]
    utterances = [Utterance(path.stem, path, text="one two" if has_text else None) for path in audio]
    prepare_store(utterances, tmp_path / "store", corpus="some", workers=1)
    fields = {"audio_mask_ratio": 0, **({"text_mask_ratio": 0} if has_text else {})}
    heard = Notes()
    with pytest.raises(InputError) as caught:
        run([tmp_path / "store"], tmp_path / "run", tokenizer=tiny.tokenizer, fields=fields, progress=heard)
    assert refusal(caught).startswith(", ".join(f"{name}=0" for name in reversed(fields)) + ": ")
    assert not (tmp_path / "run").exists()
    assert heard.notes == []


def test_stores_are_trained_on_together_and_untranscribed_ones_do_not_change_what_is_held_out(
    tiny: TinyCorpus, trained: Path, tmp_path: Path
) -> None:
    mute, copies = tmp_path / "mute", tmp_path / "copies"
    audio = sorted(tiny.manifest.parent.glob("*.flac"))[:4]
    others = [tmp_path / path.name for path in audio]
    for path, other in zip(audio, others, strict=True):
        wave, rate = soundfile.read(path)
        soundfile.write(other, wave[::-1], rate)
    for paths, store in ((others, mute), (audio, copies)):
        prepare_store([Utterance(f"{store.name}-{path.stem}", path) for path in paths], store, corpus="mute", workers=1)
    processor, model = load_model(trained / "model")
    config = make_config(PretrainConfig, NANO)
    alone, both, twice = (
        PretrainingObjective(model, processor, Corpus([Store(path) for path in paths]), config)
        for paths in ([tiny.store], [tiny.store, mute], [tiny.store, copies])
    )
    assert both.split.validation.tolist() == alone.split.validation.tolist()
    assert len(both.split.train) == len(alone.split.train) + 4
    heard, held_out = (set(twice.corpus.recordings[rows]) for rows in (twice.split.train, twice.split.validation))
    assert not heard & held_out
    assert len(twice.split.train) + len(twice.split.validation) == len(twice.corpus)


def test_validation_sees_every_held_out_utterance_once_however_many_processes_share_it(
    tiny: TinyCorpus, trained: Path
) -> None:
    processor, model = load_model(trained / "model")
    config = make_config(PretrainConfig, NANO, {"batch_frames": 100, "validation_share": 0.5})
    objective = PretrainingObjective(model, processor, Corpus([Store(tiny.store)]), config)
    rows = [row for microbatch in objective.validation_microbatches() for row in microbatch.rows]
    assert len(objective.validation_microbatches()) > 2
    assert sorted(rows) == sorted(objective.split.validation.tolist())


def test_bf16_trains_as_fp32_does_but_for_rounding(tiny: TinyCorpus, tmp_path: Path) -> None:
    """One after the other in one process, as an ablation may have them."""
    found = {}
    for precision in ("fp32", "bf16"):
        fields = {"precision": precision, "steps": 6, "checkpoint_every": 6}
        run([tiny.store], tmp_path / precision, tokenizer=tiny.tokenizer, fields=fields)
        found[precision] = losses(tmp_path / precision)
    for step, values in found["fp32"].items():
        assert found["bf16"][step] == pytest.approx(values, rel=0.02)
    assert found["bf16"] != found["fp32"]
    saved = CtalForPreTraining.from_pretrained(tmp_path / "bf16" / "model")
    assert all(parameter.dtype == torch.float32 for parameter in saved.parameters())


# Tokenizers -------------------------------------------------------------------------------------------------------


def test_a_tokenizer_of_a_store_equals_that_of_its_text_and_its_test_part_is_left_out(
    tiny: TinyCorpus, tmp_path: Path
) -> None:
    audio = sorted(tiny.manifest.parent.glob("*.flac"))[:4]
    texts = [("hello hello world", "train"), ("secret secret secret", "test"), ("world again", None), (None, "train")]
    utterances = [
        Utterance(path.stem, path, text=text, split=split) for path, (text, split) in zip(audio, texts, strict=True)
    ]
    prepare_store(utterances, tmp_path / "store", corpus="split", workers=1)
    (tmp_path / "lines.txt").write_text("hello hello world\nworld again\n")
    size = make_tokenizer([tmp_path / "store"], tmp_path / "one", 290)
    assert make_tokenizer([tmp_path / "lines.txt"], tmp_path / "other", 290) == size
    one, other = (load_tokenizer(tmp_path / name) for name in ("one", "other"))
    assert one.get_vocab() == other.get_vocab()
    assert not any("secre" in token for token in one.get_vocab())


def test_a_tokenizer_of_several_sources_is_that_of_all_their_text(tiny: TinyCorpus, tmp_path: Path, ctal: Cli) -> None:
    texts = [json.loads(line)["text"] for line in tiny.manifest.read_text().splitlines()]
    (tmp_path / "more.txt").write_text("zebra zebra zebras " * 9)
    (tmp_path / "all.txt").write_text("\n".join([*filter(None, texts), "zebra zebra zebras " * 9]))
    for sources, out in (((tiny.store, tmp_path / "more.txt"), "of two"), ((tmp_path / "all.txt",), "of one")):
        assert ctal("tokenizer", *sources, tmp_path / out, "--vocab-size", 290).code == 0
    two, one = (load_tokenizer(tmp_path / name) for name in ("of two", "of one"))
    assert two.get_vocab() == one.get_vocab()
    assert any("zeb" in token for token in two.get_vocab())


def test_a_tokenizer_counts_no_source_twice_and_names_one_that_is_not_there(
    tiny: TinyCorpus, tmp_path: Path, ctal: Cli
) -> None:
    for sources, said in (
        ((tiny.store, tiny.store), f"{tiny.store}: is given twice; name each store once"),
        ((tiny.store, tmp_path / "nope.txt"), f"{tmp_path / 'nope.txt'}: no such store or text file"),
    ):
        finished = ctal("tokenizer", *sources, tmp_path / "tokenizer", "--vocab-size", 290)
        assert finished.code == 2
        assert finished.errors.startswith(f"ctal: {said}")
        assert not (tmp_path / "tokenizer").exists()


def test_a_tokenizer_never_goes_where_the_last_of_the_stores_is(tiny: TinyCorpus, ctal: Cli) -> None:
    finished = ctal("tokenizer", tiny.store, tiny.store, "--vocab-size", 290)
    assert finished.code == 2
    assert finished.errors.startswith(f"ctal: {tiny.store}: exists and is not empty; choose another folder")


def test_a_tokenizer_with_other_special_ids_is_refused(tiny: TinyCorpus, tmp_path: Path) -> None:
    shutil.copytree(tiny.tokenizer, tmp_path / "tokenizer")
    file = tmp_path / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["<pad>"], vocabulary["</s>"] = vocabulary["</s>"], vocabulary["<pad>"]
    for token in content["added_tokens"]:
        token["id"] = vocabulary[token["content"]]
    file.write_text(json.dumps(content))
    with pytest.raises(InputError) as error:
        load_tokenizer(tmp_path / "tokenizer")
    assert "<pad> must have id 1" in refusal(error)


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "noise").write_bytes(bytes(range(256)))
    with pytest.raises(InputError) as error:
        make_tokenizer([tmp_path / "noise"], tmp_path / "tokenizer", 300)
    assert "not a text file in UTF-8" in refusal(error)


def test_a_share_of_the_training_part_is_the_same_utterances_for_every_seed(tiny: TinyCorpus, trained: Path) -> None:
    processor, model = load_model(trained / "model")
    corpus = Corpus([Store(tiny.store)])
    parts = [
        PretrainingObjective(model, processor, corpus, make_config(PretrainConfig, NANO, fields)).split
        for fields in ({}, {"train_share": 0.5}, {"train_share": 0.5, "seed": 1})
    ]
    assert set(parts[1].train) < set(parts[0].train)
    assert len(parts[1].train) == round(len(parts[0].train) / 2)
    assert np.array_equal(parts[1].train, parts[2].train)
    assert np.array_equal(parts[1].validation, parts[0].validation)


@pytest.mark.parametrize("ratio", ["text_mask_ratio", "audio_mask_ratio"])
def test_one_proxy_task_alone_trains(tiny: TinyCorpus, tmp_path: Path, ratio: str) -> None:
    fields = {"steps": 2, ratio: 0}
    run([tiny.store], tmp_path / "run", tokenizer=tiny.tokenizer, fields=fields)
    silent, heard = ("text_loss", "audio_loss") if ratio == "text_mask_ratio" else ("audio_loss", "text_loss")
    for step in losses(tmp_path / "run").values():
        assert step[silent] == 0
        assert step[heard] > 0
    rows = (tmp_path / "run" / "model" / "README.md").read_text().splitlines()
    measured = {name: next(row for row in rows if name in row) for name in ("MLM", "MCAM")}
    said = {name: "not measured: nothing was masked" in row for name, row in measured.items()}
    assert said == {"MLM": silent == "text_loss", "MCAM": silent == "audio_loss"}


def test_a_per_cent_of_either_loss_counts_as_much_in_the_best_checkpoint(tiny: TinyCorpus, trained: Path) -> None:
    processor, model = load_model(trained / "model")
    objective = PretrainingObjective(model, processor, Corpus([Store(tiny.store)]), make_config(PretrainConfig, NANO))
    start = objective.score({"loss": 5.7, "text_loss": 5.0, "audio_loss": 0.7})
    assert objective.score({"loss": 5.743, "text_loss": 5.05, "audio_loss": 0.693}) < start, (
        "+1 % of text, -1 % of audio"
    )
    assert objective.score({"loss": 5.8, "text_loss": 5.1, "audio_loss": 0.693}) > start
    assert not objective.score({"loss": math.nan, "text_loss": math.nan, "audio_loss": math.nan}) <= start
    assert objective.score({"loss": 0.6, "text_loss": 0.0, "audio_loss": 0.6}) < objective.score(
        {"loss": 0.7, "text_loss": 0.0, "audio_loss": 0.7}
    )


def test_a_loss_of_nothing_that_was_masked_is_not_told(capfd: pytest.CaptureFixture[str]) -> None:
    progress = TrainingProgress()
    progress.start(0, 1)
    progress.step(1, 10.0, {"loss": 0.5, "text_loss": 0.0, "audio_loss": 0.5})
    progress.validated(1, {"loss": 0.0, "text_loss": 0.0, "error": 0.0})
    progress.stop()
    said = capfd.readouterr().err
    assert "loss 0.5000, audio_loss 0.5000, 10 s of audio a second" in said
    assert "held out after step 1: loss 0.0000, error 0.0000" in said
    assert "text_loss" not in said
