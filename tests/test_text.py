"""Invariants of transcripts and of the tokenizer trained on them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from ctal.errors import InputError
from ctal.text import (
    MIN_VOCAB_SIZE,
    SPECIAL_TOKENS,
    encode_transcript,
    load_original_tokenizer,
    normalize_transcript,
    spelling_of_tokens,
    train_tokenizer,
)

TEXTS = [
    "MISTER QUILTER IS THE APOSTLE OF THE MIDDLE CLASSES",
    "He said: “Don’t!” — and, well, they didn't.",
    "Das schwarze Stück Papier befindet sich da oben neben dem Holzstück.",
    "naïve café, mother-in-law",
] * 3


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("MISTER QUILTER", "mister quilter"),
        ("  Hello,\t world!\n", "hello world"),
        ("Don’t — they´re, rock `n` roll, O'Neil’s", "don't they're rock 'n' roll o'neil's"),
        (
            "Der Lappen liegt auf dem Eisschrank: Öl, Übermut, Straße.",
            "der lappen liegt auf dem eisschrank öl übermut straße",
        ),
        ("U\u0308ber cafe\u0301", "über café"),
        ("well-known and/or under_score…so", "well known and or under score so"),
        ("co\u00adoperate zero\u200bwidth", "cooperate zerowidth"),
        ("ﬁne ① １２", "fine 1 12"),
        ("日本語 русский हिन्दी", "日本語 русский हिन्दी"),
        ("!?… 😀", ""),
    ],
)
def test_transcripts_are_normalised(text: str, normalized: str):
    assert normalize_transcript(text) == normalized


@given(st.text())
def test_normalising_twice_changes_nothing(text: str):
    once = normalize_transcript(text)
    assert normalize_transcript(once) == once


@given(st.text())
def test_a_normalised_transcript_is_words_between_single_spaces(text: str):
    normalized = normalize_transcript(text)
    assert normalized == " ".join(normalized.split())
    assert not set(normalized) & set('’`´.,;:!?"-_\t\n')


@given(st.text())
def test_every_normalised_transcript_survives_encoding(text: str):
    normalized = normalize_transcript(text)
    ids = TOKENIZER(normalized)["input_ids"]
    assert (ids[0], ids[-1]) == (0, 2)
    assert TOKENIZER.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == normalized


TOKENIZER = train_tokenizer(TEXTS, 300)
SPELLING = spelling_of_tokens(TOKENIZER)


@given(st.text())
def test_letters_and_words_of_the_tokens_are_those_of_the_transcript(text: str):
    letters, begins_word = SPELLING
    ids, words = encode_transcript(text, TOKENIZER), normalize_transcript(text).replace("'", "").split(" ")
    assert sum(letters[each] for each in ids) == sum(map(len, words))
    assert sum(begins_word[each] for each in ids) == len(words)


def test_special_tokens_have_their_designed_ids():
    assert TOKENIZER.convert_ids_to_tokens(list(range(5))) == list(SPECIAL_TOKENS)
    assert len(TOKENIZER) == 300
    names = ("bos_token", "pad_token", "eos_token", "unk_token", "mask_token")
    assert [getattr(TOKENIZER, f"{name}_id") for name in names] == list(range(5))
    assert (TOKENIZER.cls_token_id, TOKENIZER.sep_token_id) == (0, 2)
    assert TOKENIZER.model_max_length == 510
    assert TOKENIZER("")["input_ids"] == [0, 2]


def test_merges_make_tokens_fewer_than_bytes():
    text = normalize_transcript(TEXTS[0])
    assert len(TOKENIZER(text)["input_ids"]) < len(text)


def test_the_same_texts_give_the_same_tokenizer():
    again = train_tokenizer(iter(TEXTS), 300)
    assert again.backend_tokenizer.to_str() == TOKENIZER.backend_tokenizer.to_str()


def test_case_and_punctuation_of_the_texts_do_not_matter():
    again = train_tokenizer([normalize_transcript(text) for text in TEXTS], 300)
    assert again.get_vocab() == TOKENIZER.get_vocab()


def test_training_is_the_same_in_another_process(tmp_path: Path):
    TOKENIZER.save_pretrained(tmp_path / "here")
    code = (
        "import json, sys; from ctal.text import train_tokenizer;"
        "train_tokenizer(json.loads(sys.argv[1]), 300).save_pretrained(sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, json.dumps(TEXTS), tmp_path / "there"], check=True)
    here, there = ((tmp_path / folder / "tokenizer.json").read_bytes() for folder in ("here", "there"))
    assert here == there


def test_a_saved_tokenizer_loads_by_its_folder_alone(tmp_path: Path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is type(TOKENIZER)
    assert loaded.get_vocab() == TOKENIZER.get_vocab()
    assert loaded.model_max_length == 510
    for text in [*map(normalize_transcript, TEXTS), "", "two  spaces", "MISTER", "<mask> x"]:
        assert loaded(text)["input_ids"] == TOKENIZER(text)["input_ids"]


def test_a_text_without_repetition_gives_the_bytes_alone():
    tokenizer = train_tokenizer(["abc"], 1_000)
    assert len(tokenizer) == MIN_VOCAB_SIZE
    assert len(tokenizer("abc")["input_ids"]) == 5


@pytest.mark.parametrize("vocab_size", [-1, 0, MIN_VOCAB_SIZE - 1])
def test_a_vocabulary_too_small_for_every_byte_is_refused(vocab_size: int):
    with pytest.raises(InputError, match=f"{vocab_size} is too small: {MIN_VOCAB_SIZE}"):
        train_tokenizer(TEXTS, vocab_size)


@pytest.mark.parametrize("texts", [[], ["", " \n"], ["…", "!"]])
def test_no_word_to_train_on_is_refused(texts: list[str]):
    with pytest.raises(InputError, match="no transcript"):
        train_tokenizer(texts, 300)


def original_files(folder: Path, vocab: str, merges: str) -> Path:
    (folder / "vocab.json").write_text(vocab, encoding="utf-8")
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    return folder


SMALL_VOCAB = json.dumps({token: i for i, token in enumerate([*SPECIAL_TOKENS, "a", "b", "ab"])})


def test_vocabulary_and_merges_in_the_original_form_load(tmp_path: Path):
    tokenizer = load_original_tokenizer(original_files(tmp_path, SMALL_VOCAB, "#version: 0.2\na b\n"))
    assert tokenizer("abab")["input_ids"] == [0, 7, 7, 2]


@pytest.mark.parametrize(
    ("vocab", "merges", "message"),
    [
        ("{", "a b\n", "vocab.json: not a JSON object"),
        ("[]", "a b\n", "vocab.json: not a JSON object"),
        ('{"<s>": 1}', "a b\n", "vocab.json: <s> must have id 0"),
        (SMALL_VOCAB, "a b\na c\n", "merges.txt: line 2"),
        (SMALL_VOCAB, "a\n", "merges.txt: line 1"),
    ],
)
def test_a_broken_original_tokenizer_is_refused_by_file(tmp_path: Path, vocab: str, merges: str, message: str):
    with pytest.raises(InputError, match=message):
        load_original_tokenizer(original_files(tmp_path, vocab, merges))


def test_a_binary_original_tokenizer_is_refused_by_file(tmp_path: Path):
    original_files(tmp_path, SMALL_VOCAB, "")
    (tmp_path / "merges.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"merges.txt: not UTF-8"):
        load_original_tokenizer(tmp_path)


def test_a_missing_original_tokenizer_is_refused_by_file(tmp_path: Path):
    with pytest.raises(InputError, match=r"vocab.json: no such file"):
        load_original_tokenizer(tmp_path)


def test_reading_text_does_not_import_transformers():
    code = "import sys, ctal.text; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
