"""The report holds what the run left, stands alone, and lets no text become markup."""

from __future__ import annotations

import base64
import json
import re
import shutil
from dataclasses import asdict
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from matplotlib.image import imread

from ctal.corpora import Utterance
from ctal.diagnostics import Comparison, Interval
from ctal.errors import InputError
from ctal.pretrain import pretrain
from ctal.recipes import PretrainConfig
from ctal.report import LISTENING, write_pretraining_report
from ctal.report.utterance import BLIND
from ctal.store import prepare_store
from ctal.text import train_tokenizer

RATE = 16_000
HOSTILE = "<script>alert(1)</script>"
SENTENCES = (
    "the quick brown fox jumps over the lazy dog again and again",
    "a script of alerts & five < six words that nobody ever reads aloud",
    "she sells sea shells by the sea shore while it's raining on the boats",
)
STEPS = 2


def tones(seconds: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * RATE)) / RATE
    voice = sum(np.sin(2 * np.pi * rng.uniform(100, 3000) * time) * (rng.random() > 0.3) for _ in range(6))
    return 0.1 * voice + 0.01 * rng.standard_normal(len(time))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    utterances = []
    for i in range(8):
        soundfile.write(folder / f"{i}.wav", tones(1.0 + 0.1 * i, seed=i), RATE)
        held_out = i >= 4
        utterances.append(
            Utterance(
                id=f"{HOSTILE}-{i}",
                audio=folder / f"{i}.wav",
                text=SENTENCES[i % 3] if i != 6 else None,
                speaker=f"<b>{'held' if held_out else 'train'}</b>",
                split="validation" if held_out else "train",
            )
        )
    prepare_store(utterances, folder / "store", corpus="demo", workers=1)
    return folder / "store"


def comparison(name: str, gain: Interval) -> Comparison:
    return Comparison(name, "L1", Interval(0.7, 0.6, 0.8), Interval(0.8, 0.7, 0.9), gain, utterances=4)


def trained(store: Path, folder: Path, **architecture: object) -> Path:
    train_tokenizer(SENTENCES, 300).save_pretrained(folder / "tokenizer")
    config = PretrainConfig(
        steps=STEPS, batch_frames=400, log_every=1, checkpoint_every=1, workers=0, text_mask_ratio=0.3
    )  # pyright: ignore[reportCallIssue]
    pretrain(
        [store],
        folder / "run",
        config,
        size="nano",
        architecture={"frame_stack": 2, **architecture},
        tokenizer=folder / "tokenizer",
    )
    comparisons = [
        comparison("zeroed frames: <i>median</i>", Interval(0.1, 0.05, 0.15)),
        comparison("zeroed frames: line", Interval(-0.1, -0.15, -0.05)),
        comparison("zeroed frames: another line", Interval(0.1, float("nan"), float("nan"))),
        comparison(f"{LISTENING} of the same length", Interval(0.001, -0.02, 0.022)),
    ]
    evaluation = {"step": STEPS, "comparisons": [asdict(each) for each in comparisons]}
    (folder / "run" / "evaluation.json").write_text(json.dumps(evaluation))
    return folder / "run"


@pytest.fixture(scope="module")
def run(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(store, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def page(run: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("out") / "new" / "report.html"
    write_pretraining_report(run, [store], out, title=f"Nano {HOSTILE}")
    return out.read_text(encoding="utf-8")


class Reader(HTMLParser):
    """Elements with their attributes, text, and whether every element was closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "col"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data if "style" not in self.open else ""

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def reader(page: str) -> Reader:
    return Reader(page)


def data_of(url: str | None) -> BytesIO:
    assert url is not None
    return BytesIO(base64.b64decode(url.split("base64,")[1]))


def test_every_element_is_closed(reader: Reader) -> None:
    assert reader.open == []


def test_text_from_data_is_shown_and_never_markup(reader: Reader) -> None:
    assert not {"script", "b", "i"} & {tag for tag, attributes in reader.elements if "class" not in attributes}
    assert all(
        not name.startswith("on") and "javascript" not in (value or "")
        for _, attributes in reader.elements
        for name, value in attributes.items()
    )
    for text in (f"Nano {HOSTILE}", f"{HOSTILE}-4", "speaker <b>held</b>", "<i>median</i>", "<mask>"):
        assert text in reader.words


def test_nothing_is_fetched_from_elsewhere(page: str, reader: Reader) -> None:
    sources = [
        attributes.get(name) for _, attributes in reader.elements for name in ("src", "href", "srcset", "action")
    ]
    assert all(source.startswith("data:") for source in sources if source)
    assert "url(" not in page
    assert "http:" not in page
    assert "https:" not in page
    assert "default-src 'none'" in page


def test_pictures_have_alternative_texts_and_one_column_a_frame(reader: Reader) -> None:
    pictures = reader.attributes("img")
    # The sound in three states; the attention, and the sound once more behind it.
    assert len(pictures) == 3 * 5
    for picture in pictures:
        assert picture["alt"]
    # The held-out recordings that have a transcript last 1.4, 1.5 and 1.7 s, the one nearest to the median first.
    shapes = [imread(data_of(picture["src"])).shape[:2] for picture in pictures]
    assert shapes[0] == shapes[1] == shapes[2] == (80, 1 + int(1.5 * 80))
    assert shapes[3] == shapes[0]
    assert shapes[4][1] == shapes[0][1]
    assert all(
        attributes["role"] == "img" for attributes in reader.attributes("svg") if "aria-hidden" not in attributes
    )


def test_recordings_can_be_heard_at_16_khz(reader: Reader) -> None:
    durations = []
    for player in reader.attributes("audio"):
        wave, rate = soundfile.read(data_of(player["src"]))
        assert rate == RATE
        durations.append(len(wave) / rate)
    assert durations == pytest.approx([1.5, 1.4, 1.7])


def test_a_masked_picture_is_blank_in_its_spans_and_the_other_two_differ_only_there(reader: Reader) -> None:
    original, masked, reconstructed = (imread(data_of(picture["src"])) for picture in reader.attributes("img")[:3])
    changed = (original != reconstructed).any(axis=(0, 2))
    hidden = (original != masked).any(axis=(0, 2))

    assert changed.any()
    assert not (hidden & ~changed).any()
    assert changed.mean() < 0.5


def test_transcripts_are_whole_with_their_masked_tokens_marked(page: str) -> None:
    # The three held-out recordings with a transcript have the last two sentences.
    transcripts = re.findall(r'<p class="transcript">(.*?)</p>', page)
    shown = {" ".join(Reader(each).words.split()) for each in transcripts}

    assert shown == {" ".join(re.sub(r"[^a-z' ]", " ", sentence).split()) for sentence in SENTENCES[1:]}
    assert all("<mark>" in each for each in transcripts)


def test_each_masked_token_has_three_predictions(page: str) -> None:
    cards = re.findall(r"<ol>(.*?)</ol>", page)
    assert cards
    assert all(card.count("<li") == 3 for card in cards)


def test_verdicts_follow_the_interval(reader: Reader) -> None:
    verdicts = re.findall(r"(Better|Worse|Undecided)(?=:)", reader.words)
    assert verdicts == ["Better", "Worse", "Undecided", "Undecided"]
    assert "too few utterances" in reader.words


def test_the_demo_corpus_is_called_synthetic(reader: Reader) -> None:
    assert "SYNTHETIC SPEECH" in reader.words


def test_both_losses_are_in_the_table_as_they_were_logged(run: Path, reader: Reader) -> None:
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in logged:
        if row["kind"] == "validation" and row["step"] in (0, STEPS):
            assert f"{row['text_loss']:.4f}" in reader.words
            assert f"{row['audio_loss']:.4f}" in reader.words


@pytest.mark.parametrize("masked", ["sound of no transcripts", "sound", "words"])
def test_a_loss_of_what_was_not_masked_is_a_dash_and_the_page_says_why_nothing_was_compared(
    store: Path, tmp_path: Path, masked: str
) -> None:
    if masked == "sound of no transcripts":
        store = tmp_path / "mute"
        splits = [(f"{i}", "validation" if i >= 4 else "train") for i in range(8)]
        for i, (name, _) in enumerate(splits):
            soundfile.write(tmp_path / f"{name}.wav", tones(1.0, seed=i), RATE)
        mute = [Utterance(name, tmp_path / f"{name}.wav", speaker=part, split=part) for name, part in splits]
        prepare_store(mute, store, corpus="mute", workers=1)
    train_tokenizer(SENTENCES, 300).save_pretrained(tmp_path / "tokenizer")
    ratios = {"sound": {"text_mask_ratio": 0}, "words": {"audio_mask_ratio": 0, "text_mask_ratio": 0.3}}
    config = PretrainConfig(steps=1, batch_frames=400, workers=0, **ratios.get(masked, {}))
    pretrain([store], tmp_path / "run", config, size="nano", tokenizer=tmp_path / "tokenizer")
    write_pretraining_report(tmp_path / "run", [store], tmp_path / "report.html", title="Half")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    figures = re.search(r"<th>Loss</th>.*?</table>", page, re.DOTALL)
    assert figures
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in figures[0].split("<tr>")[1:]]
    assert len(rows) == 3
    for text, audio in rows:
        assert (text == "–", audio == "–") == (masked != "words", masked == "words")
    words = Reader(page).words
    assert words.count("Nothing that is held out was masked.") == 1
    assert ("fewer than two held-out utterances have a transcript" in words) == (masked == "sound of no transcripts")
    assert ("Not measured: audio_mask_ratio is 0." in words) == (masked == "words")
    # An utterance without a masked word is not shown at all.
    assert "L1 in its masked frames" not in words
    assert ("None of its frames was masked." in words) == (masked == "words")


def test_where_the_audio_does_not_see_the_text_the_page_says_so_and_shows_the_rest(store: Path, tmp_path: Path) -> None:
    run = trained(store, tmp_path, audio_sees_text=False)
    write_pretraining_report(run, [store], tmp_path / "report.html", title="Apart")
    reader = Reader((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert reader.open == []
    assert BLIND in reader.words
    assert "as the model filled it in" in reader.words


def test_the_same_run_gives_the_same_page(run: Path, store: Path, page: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    write_pretraining_report(run, [store], tmp_path / "again.html", title=f"Nano {HOSTILE}")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == page


def refusal(run: Path, stores: list[Path], out: Path) -> str:
    with pytest.raises(InputError) as caught:
        write_pretraining_report(run, stores, out, title="Refused")
    assert not out.is_file()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluation.json", "model/run.json"])
def test_a_missing_file_is_named_with_the_mend(name: str, run: Path, store: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    (copy / name).unlink()
    message = refusal(copy, [store], tmp_path / "report.html")
    assert str(copy / name) in message
    assert "--resume" in message


@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluation.json", "model/run.json"])
@pytest.mark.parametrize("text", ['{"kind": "tr', '{"step": 3}'], ids=["cut short", "another form"])
def test_a_damaged_file_is_refused(name: str, text: str, run: Path, store: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    (copy / name).write_text(text)
    assert str(copy / name) in refusal(copy, [store], tmp_path / "report.html")


def test_stores_of_another_run_are_refused(run: Path, store: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(store, tmp_path / "other"))
    assert "not the data of" in refusal(run, [store, other], tmp_path / "report.html")
    assert "is given twice" in refusal(run, [store, store], tmp_path / "report.html")


def test_an_unwritable_page_is_refused(run: Path, store: Path, tmp_path: Path) -> None:
    assert "cannot be written" in refusal(run, [store], tmp_path)
