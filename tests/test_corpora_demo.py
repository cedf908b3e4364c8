"""The demo corpus: its labels follow from one table, its ceilings are exact, and making it is safe to interrupt."""

import json
import subprocess
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import pairwise, product
from multiprocessing import get_context
from pathlib import Path
from string import Formatter

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from ctal.corpora import demo, get_corpus
from ctal.corpora.demo import DemoConfig, experiment, lexicon, make_demo, plan, read_demo
from ctal.corpora.demo.experiment import CELLS, STYLES, ceilings, draw_cells, emotion, sentiment
from ctal.corpora.demo.grammar import SLOTS, TEMPLATES, sentence
from ctal.corpora.demo.synthesis import Job, draw_speaker, make_file
from ctal.errors import InputError

TINY = DemoConfig(train_speakers=2, validation_speakers=1, test_speakers=1, train_utterances=3, heldout_utterances=2)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 10 utterances; tests that change it copy it first."""
    root = tmp_path_factory.mktemp("demo") / "corpus"
    make_demo(root, TINY)
    return root


def snapshot(root: Path) -> dict[str, int]:
    return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


# The experiment


def test_the_table_is_a_distribution_over_all_cells():
    assert len(CELLS) == 5 * 2 * len(STYLES)
    assert min(CELLS.values()) > 0
    assert sum(CELLS.values()) == pytest.approx(1, abs=1e-12)


def test_with_a_marker_no_style_and_no_polarity_gives_the_emotion_away():
    marked = [cell for cell in CELLS if cell.marker]
    assert all(emotion(cell) != cell.style for cell in marked)
    for style in STYLES:
        assert len({emotion(cell) for cell in marked if cell.style == style}) == 3
    for word_class in experiment.WORD_CLASSES:
        assert {emotion(cell) for cell in marked if cell.word_class == word_class} == set(STYLES)


def test_sentiment_is_on_its_scale_and_is_the_word_class_without_a_marker():
    assert {sentiment(cell) for cell in CELLS} == set(range(-3, 4))
    assert all(sentiment(cell) == cell.word_class for cell in CELLS if not cell.marker)


def test_ceilings_equal_the_best_of_all_decision_rules_on_the_sound():
    prior: dict[str, float] = {y: sum(p for c, p in CELLS.items() if emotion(c) == y) for y in STYLES}
    accuracy, recall = 0.0, 0.0
    for rule in product(STYLES, repeat=len(STYLES)):
        hits: dict[str, float] = dict.fromkeys(STYLES, 0.0)
        for cell, p in CELLS.items():
            if rule[STYLES.index(cell.style)] == emotion(cell):
                hits[emotion(cell)] += p
        accuracy = max(accuracy, sum(hits.values()))
        recall = max(recall, sum(hits[y] / prior[y] for y in STYLES) / len(STYLES))
    mae = min(
        sum(p * abs(sentiment(cell) - rule[STYLES.index(cell.style)]) for cell, p in CELLS.items())
        for rule in product(range(-3, 4), repeat=len(STYLES))
    )
    assert ceilings()["audio alone"] == pytest.approx((accuracy, recall, mae))


def test_only_words_and_sound_together_tell_everything():
    best = ceilings()
    assert best["both"] == pytest.approx((1, 1, 0))
    for alone in ("text alone", "audio alone"):
        assert best["neither"].accuracy + 0.1 < best[alone].accuracy < 0.75
        assert best["neither"].ua + 0.1 < best[alone].ua < 0.75
        assert 0.25 < best[alone].mae < best["neither"].mae - 0.25


def test_styles_overlap_a_little_even_for_an_unknown_speaker():
    overlap = experiment.style_overlap(draws=20_000)
    assert 0 < overlap.known_speaker < overlap.unknown_speaker < 0.01


@given(count=st.integers(1, 3000), seed=st.integers(0, 10))
def test_every_cell_is_dealt_within_one_of_its_share(count: int, seed: int):
    cells = draw_cells(count, np.random.default_rng(seed))
    dealt = Counter(cells)
    assert len(cells) == count
    assert all(abs(dealt[cell] - count * p) < 1 for cell, p in CELLS.items())


# The sentences


def test_every_other_slot_has_200_items_and_key_words_are_nowhere_else():
    key_words = [word for words in lexicon.KEY_WORDS.values() for word in words]
    others = [*SLOTS.values(), lexicon.MARKERS, lexicon.PLAIN_OPENINGS]
    assert len(set(key_words)) == len(key_words) == 50
    for name, items in SLOTS.items():
        assert len(set(items)) == len(items) >= 200, name
    assert not set(key_words) & {word.lower() for items in others for item in items for word in item.split()}
    assert not set(lexicon.MARKERS) & set(lexicon.PLAIN_OPENINGS)


def test_templates_of_a_split_are_new_and_have_two_key_words():
    templates = [template for split in TEMPLATES.values() for template in split]
    assert len(set(templates)) == len(templates)
    for template in templates:
        slots = [slot for _, slot, _, _ in Formatter().parse(template) if slot is not None]
        assert slots.count("key") == 2, template
        assert set(slots) <= {*SLOTS, "key"}, template


def test_articles_fit_the_next_word():
    generator = np.random.default_rng(0)
    text = " ".join(sentence("test", c, True, generator) for c in lexicon.KEY_WORDS for _ in range(100))
    words = text.lower().split()
    after = {article: {b for a, b in pairwise(words) if a == article} for article in ("a", "an")}
    assert after["a"]
    assert all(word[0] not in "aeiou" or word == "useful" for word in after["a"])
    assert after["an"]
    assert all(word[0] in "aeiou" and word != "useful" for word in after["an"])


# The plan


def test_the_same_configuration_gives_the_same_plan_and_another_seed_another():
    assert plan(DemoConfig()) == plan(DemoConfig())
    assert [u.text for u in plan(TINY)] != [u.text for u in plan(replace(TINY, seed=1))]


def test_the_default_corpus_has_the_designed_speakers_and_every_cell_in_every_split():
    utterances = plan(DemoConfig())
    speakers = {split: {u.speaker.name for u in utterances if u.split == split} for split in TEMPLATES}
    assert [len(names) for names in speakers.values()] == [64, 16, 32]
    assert len(set().union(*speakers.values())) == 64 + 16 + 32
    assert len({u.id for u in utterances}) == len(utterances)
    assert min(Counter(u.speaker.name for u in utterances).values()) >= 8
    for split in TEMPLATES:
        assert {u.cell for u in utterances if u.split == split} == set(CELLS)


def test_words_in_a_sentence_agree_with_its_cell():
    classes = {word: c for c, words in lexicon.KEY_WORDS.items() for word in words}
    for utterance in plan(TINY):
        opening, _, rest = utterance.text.lower().rstrip(".").partition(", ")
        assert (opening in lexicon.MARKERS) == utterance.cell.marker
        keys = [word for word in rest.replace(",", "").split() if word in classes]
        assert len(set(keys)) == 2
        assert {classes[word] for word in keys} == {utterance.cell.word_class}


def test_a_configuration_below_one_names_the_field():
    with pytest.raises(InputError, match="test_speakers is 0"):
        DemoConfig(test_speakers=0)


# Making


def test_the_corpus_is_16_khz_flac_with_labels_and_a_card(tiny: Path):
    utterances = list(read_demo(tiny))
    assert [u.id for u in utterances] == [u.id for u in plan(TINY)]
    for utterance, planned in zip(utterances, plan(TINY), strict=True):
        info = soundfile.info(utterance.audio)
        assert (info.format, info.subtype, info.samplerate, info.channels) == ("FLAC", "PCM_16", 16_000, 1)
        assert 0.5 < info.duration < 8
        assert (utterance.text, utterance.split, utterance.speaker) == (
            planned.text,
            planned.split,
            planned.speaker.name,
        )
        assert utterance.labels == {"emotion": emotion(planned.cell), "sentiment": sentiment(planned.cell)}
    assert "SYNTHETIC" in (tiny / "card.md").read_text(encoding="utf-8").splitlines()[0]
    facts = json.loads((tiny / "card.json").read_text(encoding="utf-8"))
    assert facts["synthetic"] is True
    assert sum(size["utterances"] for size in facts["sizes"].values()) == len(utterances)


def test_a_second_call_only_reads_and_needs_no_espeak(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    before = snapshot(tiny)
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    make_demo(tiny, TINY)
    assert snapshot(tiny) == before


def test_an_interrupted_making_goes_on_and_another_configuration_replaces(tmp_path: Path):
    seen: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_demo(tmp_path, TINY, progress=stop)
    assert seen == [(n, 10) for n in range(1, 5)]
    with pytest.raises(InputError, match="no complete demo corpus"):
        list(read_demo(tmp_path))
    before = snapshot(tmp_path)
    make_demo(tmp_path, TINY)
    after = snapshot(tmp_path)
    audio = [name for name in before if name.endswith(".flac")]
    assert len(audio) >= 4
    assert all(after[name] == before[name] for name in audio)
    assert sum(name.endswith(".flac") for name in after) == 10

    smaller = replace(TINY, train_speakers=1, seed=1)
    make_demo(tmp_path, smaller)
    assert [u.id for u in read_demo(tmp_path)] == [u.id for u in plan(smaller)]
    assert sum(name.endswith(".flac") for name in snapshot(tmp_path)) == len(plan(smaller))


@pytest.mark.parametrize("name", ["thesis.txt", "card.json", "audio"])
def test_a_folder_with_anything_foreign_is_refused_and_left_alone(tmp_path: Path, name: str):
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match="empty folder") as error:
        make_demo(tmp_path, TINY)
    assert "\n" not in str(error.value)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "mine")]


def test_a_file_as_root_is_refused(tmp_path: Path):
    (tmp_path / "root").write_text("")
    with pytest.raises(InputError, match="empty folder"):
        make_demo(tmp_path / "root", TINY)


def test_without_the_extra_the_message_names_the_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(InputError, match=r"pip install 'ctal\[demo\]'"):
        make_demo(tmp_path / "new", TINY)
    assert not (tmp_path / "new").exists()


def test_a_sad_voice_takes_longer_than_an_angry_one(tmp_path: Path):
    speaker = draw_speaker("someone", "female", np.random.default_rng(0))
    jobs = [
        Job(tmp_path / f"{style}.flac", "By then, the lamp was green.", speaker, experiment.STYLE_MEANS[style], (0,))
        for style in ("sad", "angry")
    ]
    with ProcessPoolExecutor(1, get_context("spawn")) as worker:
        sad, angry = worker.map(make_file, jobs)
    assert sad > 1.3 * angry


def test_the_corpus_is_registered_and_does_not_import_torch():
    assert get_corpus("demo") is demo.CORPUS
    code = "import sys, ctal.corpora.demo; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
