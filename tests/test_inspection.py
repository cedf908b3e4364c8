"""Looking inside a model: words have their places, neighbours are the nearest, and nothing that is wrong is shown."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from conftest import Cli, TinyCorpus, record
from ctal import CtalConfig, CtalFeatureExtractor, CtalForPreTraining, CtalForXVector, CtalProcessor
from ctal.audio import load_audio
from ctal.inference import load_any_model
from ctal.modeling_ctal import CtalForSequenceClassification
from ctal.pretrain import load_tokenizer
from ctal.report import inspection, write_inspection
from ctal.report.inspection import NEIGHBOURS, card_facts, nearest, span_seconds
from ctal.report.utterance import BLIND, Attended, Word, attend, words_of
from ctal.store import Store
from test_report import HOSTILE, Reader

MAX_FRAMES = 400
"""5 s, so that a long recording need not be long."""
CARD = f"---\nlibrary_name: ctal\n---\n# Card\n\n| | |\n|---|---|\n| parameters | `7` {HOSTILE} |\n| step | 1 of 2 |\n"


@pytest.fixture(scope="module")
def models(tiny: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nano models of random weights, of every kind."""
    folder = tmp_path_factory.mktemp("models")
    processor = CtalProcessor(CtalFeatureExtractor(max_frames=MAX_FRAMES), load_tokenizer(tiny.tokenizer))
    kinds = {
        "pretraining": (CtalForPreTraining, {}, "both"),
        "apart": (CtalForPreTraining, {"audio_sees_text": False}, "both"),
        "emotion": (CtalForSequenceClassification, {"num_labels": 3}, "both"),
        "sentiment": (CtalForSequenceClassification, {"num_labels": 1, "problem_type": "regression"}, "audio"),
        "verification": (CtalForXVector, {"num_labels": 4}, "both"),
        "words": (CtalForSequenceClassification, {"num_labels": 3, "fusion": "text"}, "text"),
    }
    for number, (name, (kind, more, inputs)) in enumerate(kinds.items()):
        torch.manual_seed(number)
        fields = {"vocab_size": len(processor.tokenizer), "frame_stack": 2, "initializer_range": 0.2}
        config = CtalConfig.of_size("nano", **fields)
        for field, value in more.items():
            setattr(config, field, value)
        kind(config).save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
        settings = {} if kind is CtalForPreTraining else {"inputs": inputs}
        (folder / name / "run.json").write_text(json.dumps({"config": settings, "corpus": ["tiny"]}))
        (folder / name / "README.md").write_text(CARD)
    return folder


@pytest.fixture
def page(tmp_path: Path) -> Callable[..., Reader]:
    """The page of `write_inspection`, which needs nothing else."""

    def write(model: Path, audio: Path, *, text: str | None = None, store: Path | None = None) -> Reader:
        notes = write_inspection(model, audio, tmp_path / "page.html", text=text, store=store)
        text = (tmp_path / "page.html").read_text(encoding="utf-8")
        reader = Reader(text)
        assert reader.open == []
        sources = [attributes.get(name) for _, attributes in reader.elements for name in ("src", "href", "srcset")]
        assert all(source.startswith("data:") for source in sources if source)
        assert not re.search(r"url\(|https?:", text)
        assert all(note in reader.words for note in notes)
        return reader

    return write


# Words and their spans --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0.01, 0.1, 1.0, 2.03])
@pytest.mark.parametrize("model", ["pretraining", "emotion"])
def test_every_word_has_a_span_inside_the_recording(models: Path, tmp_path: Path, model: str, seconds: float) -> None:
    loaded, wave = load_any_model(models / model), load_audio(record(tmp_path / "a.wav", seconds))
    features = loaded.processor.feature_extractor.features(wave)
    attended = attend(loaded.model, loaded.processor, features, "one, two THREE: zyzzyva!")

    assert [word.text for word in attended.words if not word.is_end] == ["one", "two", "three", "zyzzyva"]
    for word, span in zip(attended.words, attended.spans, strict=True):
        assert (span is None) == word.is_end
        if span:
            start, end = span_seconds(span, len(features), len(wave) / 16_000)
            assert 0 <= start < end <= len(wave) / 16_000
            assert span.contrast >= 1 - 1e-9


def test_a_span_lies_where_the_attention_is_and_how_much_a_word_gets_elsewhere_does_not_matter() -> None:
    shares_TW = np.full((200, 3), [0.6, 0.3, 0.1])
    shares_TW[80:120, 2] *= 2
    shares_TW[30:40, 1] *= 2
    words = [Word(name, [place], False) for place, name in enumerate(("flat", "early", "late"))]
    flat, early, late = Attended(words, shares_TW, frame_rate=80).spans

    assert flat and early and late  # noqa: PT018 (for the type checker)
    assert (late.first, late.end) == pytest.approx((80, 120), abs=1)
    assert (early.first, early.end) == pytest.approx((30, 40), abs=1)
    assert late.contrast == pytest.approx(2 / 1.2)
    assert (flat.first, flat.end, flat.is_clear) == (0, 200, False)
    assert early.is_clear
    assert late.is_clear


def test_attention_is_the_mean_of_all_layers_and_heads_added_up_into_words(tiny: TinyCorpus) -> None:
    tokenizer = load_tokenizer(tiny.tokenizer)
    ids = tokenizer("one zyzzyva")["input_ids"]
    layers = [torch.rand(1, 2, 3, len(ids)).softmax(-1) for _ in range(4)]
    attended = Attended.of(layers, words_of(ids, tokenizer), frames=5, frame_stack=2, frame_rate=80)

    expected = torch.stack(layers).mean((0, 1, 2))[[0, 0, 1, 1, 2]].double().numpy()
    assert [word.text for word in attended.words] == ["<s>", "one", "zyzzyva", "</s>"]
    assert attended.shares_TW.sum(1) == pytest.approx(1)
    assert attended.shares_TW[:, 0] == pytest.approx(expected[:, 0])
    first = len(tokenizer("one")["input_ids"]) - 1
    assert attended.shares_TW[:, 2] == pytest.approx(expected[:, first:-1].sum(1))


def test_all_words_and_their_spans_are_on_the_page(models: Path, tmp_path: Path, page: Callable[..., Reader]) -> None:
    audio = record(tmp_path / "a.wav", 1.5)
    (tmp_path / "a.txt").write_text("Seven, eight: milk!")
    reader = page(models / "emotion", audio)
    for word in ("seven", "eight", "milk"):
        start, end = re.search(rf"{word}([\d.]+)–([\d.]+) s", reader.words).groups()  # pyright: ignore[reportOptionalMemberAccess]
        assert 0 <= float(start) < float(end) <= 1.5
    assert "Seven, eight: milk!" in reader.words
    assert "This is attention and not an alignment" in reader.words
    spans = [each for each in reader.attributes("div") if "word-span" in (each.get("class") or "")]
    assert len(spans) == 3
    # One spectrogram, and the attention upon another.
    assert len(reader.attributes("img")) == 3
    assert all(each["alt"] for each in reader.attributes("img"))


# What else is shown -----------------------------------------------------------------------------------------------


def test_a_pretrained_model_fills_in_what_a_task_model_cannot(
    models: Path, tmp_path: Path, page: Callable[..., Reader]
) -> None:
    audio = record(tmp_path / "a.wav", 1.5)
    filled = page(models / "pretraining", audio, text="one two three four")
    assert "as the model filled it in" in filled.words
    assert len(filled.attributes("img")) == 6
    told = page(models / "emotion", audio, text="one two three four")
    assert "fine-tuned for emotion has no reconstruction head" in told.words
    assert "as the model filled it in" not in told.words


def test_the_same_input_gives_the_same_page(models: Path, tiny: TinyCorpus, tmp_path: Path) -> None:
    audio = record(tmp_path / "a.wav", 1.0)
    for number in (1, 2):
        torch.manual_seed(number)
        out = tmp_path / f"{number}.html"
        write_inspection(models / "pretraining", audio, out, text="one two", store=tiny.store)
    assert (tmp_path / "1.html").read_bytes() == (tmp_path / "2.html").read_bytes()


def test_text_from_data_and_card_is_never_markup(models: Path, tmp_path: Path, page: Callable[..., Reader]) -> None:
    audio = record(tmp_path / "<b>a.wav", 0.5)
    reader = page(models / "pretraining", audio, text=f"{HOSTILE} & one")
    assert not {"script", "i"} & {tag for tag, _ in reader.elements}
    assert "Looking inside: <b>a.wav" in reader.words
    assert f"{HOSTILE} & one" in reader.words
    assert f"7 {HOSTILE}" in reader.words


def test_a_card_is_read_as_its_facts() -> None:
    assert card_facts(CARD) == {"parameters": f"7 {HOSTILE}", "step": "1 of 2"}
    assert card_facts("# A card without a table\n\n| one | two | three |\n") == {}


def test_a_model_without_a_card_is_no_fault(models: Path, tmp_path: Path, page: Callable[..., Reader]) -> None:
    model = Path(shutil.copytree(models / "emotion", tmp_path / "model"))
    (model / "README.md").unlink()
    assert "has no card" in page(model, record(tmp_path / "a.wav", 0.5), text="one").words


# Neighbours -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["pretraining", "emotion", "sentiment", "verification", "words"])
@pytest.mark.parametrize("row", [0, 7])
def test_the_nearest_neighbour_of_a_store_s_own_utterance_is_itself(
    models: Path, tiny: TinyCorpus, tmp_path: Path, page: Callable[..., Reader], model: str, row: int
) -> None:
    stored = Store(tiny.store).read(row)
    audio = tmp_path / "own.flac"
    audio.write_bytes(stored.audio)
    reader = page(models / model, audio, text=stored.text, store=tiny.store)
    ranked = [re.escape(stored.id), r"cosine 1\.000" + (", the recording itself" if model != "words" else "")]
    assert re.search(rf"1\. {ranked[0]} \([\d.]+ s\){ranked[1]}", reader.words)
    assert str(stored.text) in reader.words
    assert f"speaker: {stored.speaker}" in reader.words
    assert len(reader.attributes("audio")) == 1 + NEIGHBOURS


def test_without_a_transcript_an_utterance_is_still_nearest_to_itself_though_the_store_has_its_words(
    models: Path, tiny: TinyCorpus, tmp_path: Path, page: Callable[..., Reader]
) -> None:
    stored = Store(tiny.store).read(3)
    assert stored.text
    (tmp_path / "own.flac").write_bytes(stored.audio)
    for model in ("pretraining", "verification"):
        reader = page(models / model, tmp_path / "own.flac", store=tiny.store)
        assert re.search(rf"1\. {re.escape(stored.id)} \([\d.]+ s\)cosine 1\.000, the recording itself", reader.words)
        assert "transcripts of the store are withheld too" in reader.words


def test_an_utterance_of_a_large_store_is_found_however_little_of_it_is_listened_to(
    models: Path, tiny: TinyCorpus, tmp_path: Path, page: Callable[..., Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "SEARCHED_SECONDS", 5.0)
    for row in range(0, 18, 5):
        stored = Store(tiny.store).read(row)
        (tmp_path / "own.flac").write_bytes(stored.audio)
        reader = page(models / "verification", tmp_path / "own.flac", text=stored.text, store=tiny.store)
        assert re.search(rf"1\. {re.escape(stored.id)} \(", reader.words)
        compared = re.search(r"Of (\d+) \(chosen by a hash of their names\) of 24 utterances", reader.words)
        assert compared
        assert 1 <= int(compared.group(1)) < 10


def test_batches_do_not_change_cosines(models: Path, tiny: TinyCorpus, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = inspection.open_corpus([tiny.store])
    loaded = load_any_model(models / "pretraining")
    stored = corpus.read(5)
    window = inspection._first_window(loaded, load_audio(stored.audio), stored.text)
    together = nearest(loaded, window, corpus)
    monkeypatch.setattr(inspection, "BATCH_FRAMES", {"cpu": 1})
    alone = nearest(loaded, window, corpus)
    assert together.rows == alone.rows
    assert together.cosines == pytest.approx(alone.cosines, abs=1e-5)
    assert together.median == pytest.approx(alone.median, abs=1e-5)


# What is missing, long, or wrong ----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [None, "", " ?! "])
def test_without_a_word_the_parts_of_audio_are_shown_and_said_to_be_all(
    models: Path, tmp_path: Path, page: Callable[..., Reader], text: str | None
) -> None:
    reader = page(models / "pretraining", record(tmp_path / "a.wav", 1.0), text=text)
    assert "no transcript" in reader.words if text is None else "the transcript has no word" in reader.words
    assert "the model has no words to attend to" in reader.words
    assert "as the model filled it in" in reader.words


def test_of_a_long_recording_the_first_window_is_looked_at(
    models: Path, tmp_path: Path, page: Callable[..., Reader]
) -> None:
    audio = record(tmp_path / "long.wav", 12.0)
    words = [f"word{number}" for number in range(24)]
    reader = page(models / "pretraining", audio, text=" ".join(words))
    said = re.search(r"only its first ([\d.]+) of 12\.0 s are looked at; they get words in proportion", reader.words)
    assert said
    assert float(said.group(1)) <= 5.0
    assert "word0" in reader.words
    assert "word23" not in reader.words
    (player,) = reader.attributes("audio")
    assert player["src"]


def test_a_model_of_one_modality_says_what_it_does_not_read(
    models: Path, tmp_path: Path, page: Callable[..., Reader]
) -> None:
    audio = record(tmp_path / "a.wav", 0.5)
    assert "trained on audio alone: the transcript is not read" in page(models / "sentiment", audio, text="one").words
    assert "reads text alone and does not listen" in page(models / "words", audio, text="one").words


def test_a_model_whose_audio_does_not_see_the_text_says_so_and_fills_in_the_rest(
    models: Path, tmp_path: Path, page: Callable[..., Reader]
) -> None:
    reader = page(models / "apart", record(tmp_path / "a.wav", 1.0), text="one zyzzyva")
    assert BLIND in reader.words
    assert "as the model filled it in" in reader.words


def test_a_recording_too_short_to_mask_is_no_fault(models: Path, tmp_path: Path, page: Callable[..., Reader]) -> None:
    assert "too short to mask" in page(models / "pretraining", record(tmp_path / "a.wav", 0.05), text="one").words


def test_wrong_input_is_one_line_and_exit_code_2(ctal: Cli, models: Path, tiny: TinyCorpus, tmp_path: Path) -> None:
    good, out = record(tmp_path / "good.wav", 0.3), tmp_path / "page.html"
    text = tmp_path / "text.wav"
    text.write_text("not a recording at all\n" * 50)
    several, single = tmp_path / "several.csv", tmp_path / "single.jsonl"
    several.write_text("audio\ngood.wav\ngood.wav\n")
    single.write_text('{"audio": "good.wav"}\n')
    model, nowhere = models / "emotion", tmp_path / "nowhere"
    refused = {
        (model, text): f"{text}: not audio",
        (model, nowhere): f"{nowhere}: no such file",
        (model, tmp_path): f"{tmp_path}: a folder; name one recording",
        (model, several): f"{several}: a list of recordings; name one recording",
        (model, several, "--text", "one"): f"{several}: a list of recordings; name one recording",
        (model, single): f"{single}: a list of recordings; name one recording",
        (model, tmp_path / "none.csv"): f"{tmp_path / 'none.csv'}: no such file",
        (nowhere, good): f"{nowhere}: no such folder",
        (tmp_path, good): f"{tmp_path}: not a model folder",
        (models / "words", good): f"{good}: the model reads text alone",
        (model, good, "--store", tmp_path): f"{tmp_path}: not a store",
        (model, good, "--store", nowhere): f"{nowhere}: no such store",
        (model, good, "--store", good): f"{good}: ",
        (model, good, "-o", tmp_path): f"{tmp_path}: cannot be written",
    }
    for arguments, start in refused.items():
        finished = ctal("inspect", "-o", out, *arguments)
        assert finished.code == 2, finished
        assert finished.errors.startswith(f"ctal: {start}"), finished.errors
        assert finished.errors.count("\n") == 1, finished.errors
        assert not out.exists()


def test_the_verb_writes_the_page_and_says_what_it_lacks(
    ctal: Cli, models: Path, tiny: TinyCorpus, tmp_path: Path
) -> None:
    audio, out = record(tmp_path / "a.wav", 0.3), tmp_path / "new" / "page.html"
    finished = ctal("inspect", models / "pretraining", audio, "--store", tiny.store, "-o", out)
    assert finished.code == 0, finished.errors
    assert finished.output == f"{out}: open it in a browser\n"
    assert finished.errors.startswith(f"{audio}: no transcript")
    assert "Nearest in the store" in out.read_text(encoding="utf-8")


def test_any_sampling_rate_is_read(models: Path, tmp_path: Path, page: Callable[..., Reader]) -> None:
    soundfile.write(tmp_path / "a.wav", 0.1 * np.random.default_rng(0).normal(size=22_050), 44_100)
    assert "0.50 s" in page(models / "emotion", tmp_path / "a.wav", text="one").words
