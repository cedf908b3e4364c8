"""The authors' byte-level BPE and the ids that it gave to 215 strings."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from conftest import REAL, REFERENCE, needs_real, needs_reference
from ctal.errors import InputError
from ctal.text import load_original_tokenizer, normalize_transcript

pytestmark = needs_reference


def cases() -> list[dict]:
    return json.loads((REFERENCE / "tokenizer_cases.json").read_text(encoding="utf-8"))


def test_every_recorded_tokenization_is_identical():
    tokenizer = load_original_tokenizer(REFERENCE / "tokenizer")
    recorded = cases()
    assert len(recorded) == 215
    assert [tokenizer(case["text"])["input_ids"] for case in recorded] == [case["input_ids"] for case in recorded]


def test_the_original_tokenizer_survives_saving(tmp_path: Path):
    load_original_tokenizer(REFERENCE / "tokenizer").save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.model_max_length == 510
    assert [loaded(case["text"])["input_ids"] for case in cases()] == [case["input_ids"] for case in cases()]


@needs_real
def test_normalised_transcripts_are_in_the_case_that_the_vocabulary_was_trained_on():
    tokenizer = load_original_tokenizer(REFERENCE / "tokenizer")
    lines = [
        line.split(" ", 1)[1]
        for file in sorted((REAL / "LibriSpeech").rglob("*.trans.txt"))
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    words = sum(len(line.split()) for line in lines)
    tokens = sum(len(tokenizer(normalize_transcript(line))["input_ids"]) - 2 for line in lines)
    assert tokens / words < 1.3
    assert [normalize_transcript(line) for line in lines] == [line.lower() for line in lines]


def test_a_special_token_elsewhere_is_refused_by_name(tmp_path: Path):
    vocab = json.loads((REFERENCE / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    vocab["<mask>"], vocab["<unk>"] = vocab["<unk>"], vocab["<mask>"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (tmp_path / "merges.txt").write_bytes((REFERENCE / "tokenizer" / "merges.txt").read_bytes())
    with pytest.raises(InputError, match=r"vocab.json: <unk> must have id 3"):
        load_original_tokenizer(tmp_path)
