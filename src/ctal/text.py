"""Transcripts: one way to write them, and the byte-level BPE that reads them.

`normalize_transcript` is the only normalisation: `CtalProcessor`, the training data and `train_tokenizer` call it, and
the tokenizer itself holds none, so that the authors' tokenizer keeps giving the ids it always gave.

transformers is imported only where a tokenizer is made: reading and preparing text must stay light.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ctal.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, RobertaTokenizer

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
"""In the order of their ids 0–4."""

MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256
"""The special tokens and every byte."""

MAX_TOKENS = 510
"""`<s>` and `</s>` included: RoBERTa's 512 positions start behind the padding id 1."""

_APOSTROPHES = str.maketrans(dict.fromkeys("‘’‛ʼ`´′＇", "'"))


def normalize_transcript(text: str) -> str:
    """`text` as LibriSpeech's transcripts are written, in lower case: the form in which the authors' BPE was trained.

    Unicode NFKC; lower case; apostrophes kept, typographic ones made straight; every other punctuation mark or symbol
    is a space, for letters and digits of any script remain ("well-known" → "well known", "Straße!" → "straße");
    one space between words, none at the ends. Digits and symbols are not spelled out. Idempotent.
    """
    # Before NFKC, which would make a space and an accent of "´"; behind it, which makes an apostrophe of part of "ŉ".
    text = unicodedata.normalize("NFKC", text.translate(_APOSTROPHES)).translate(_APOSTROPHES)
    # Lower case can undo composition ("İ"), hence NFKC once more.
    text = unicodedata.normalize("NFKC", text.lower())
    return " ".join(text.translate(_KEPT).split())


class _Kept(dict[int, str]):
    """For `str.translate`: letters, marks, digits and the apostrophe as they are, invisible format characters gone, the
    rest a space. Filled as characters are met."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        category = unicodedata.category(character)
        if character == "'" or category[0] in "LMN":
            kept = character
        else:
            kept = "" if category == "Cf" else " "
        self[code] = kept
        return kept


_KEPT = _Kept()


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> RobertaTokenizer:
    """A byte-level BPE trained on `texts`, which are normalised here; the same texts give the same tokenizer.

    Ids 0–4 are `SPECIAL_TOKENS`, then come the 256 bytes, then merges of pairs seen at least twice: so a small text can
    give fewer than `vocab_size` entries, and no text at all gives an unknown token. Raises `InputError` for a
    `vocab_size` below `MIN_VOCAB_SIZE` and when no text has a word.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < MIN_VOCAB_SIZE:
        raise InputError(
            f"vocab_size {vocab_size} is too small: {MIN_VOCAB_SIZE} (the special tokens and 256 bytes) at least"
        )
    num_texts = 0

    def normalized() -> Iterable[str]:
        nonlocal num_texts
        for text in texts:
            if text := normalize_transcript(text):
                num_texts += 1
                yield text

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(normalized(), trainer)
    if num_texts == 0:
        raise InputError("no transcript with a word in it to train a tokenizer on: give a store or a file with text")
    model = json.loads(bpe.to_str())["model"]
    return _roberta_tokenizer(model["vocab"], [tuple(pair) for pair in model["merges"]])


def load_original_tokenizer(folder: Path) -> RobertaTokenizer:
    """The authors' tokenizer from its `vocab.json` and `merges.txt` in `folder`.

    Raises `InputError` naming the file that is missing or not of that form, and the special token that is not where
    `SPECIAL_TOKENS` has it.
    """
    vocab_file, merges_file = folder / "vocab.json", folder / "merges.txt"
    vocab_text = _read_text(vocab_file)
    try:
        vocab = json.loads(vocab_text)
        if not isinstance(vocab, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise InputError(f"{vocab_file}: not a JSON object of tokens and ids ({error}); fetch it again") from None
    for token_id, token in enumerate(SPECIAL_TOKENS):
        if vocab.get(token) != token_id:
            raise InputError(
                f"{vocab_file}: {token} must have id {token_id}, it has {vocab.get(token)}; use CTAL's own"
            )
    merges = []
    for number, line in enumerate(_read_text(merges_file).splitlines(), start=1):
        if line.startswith("#version"):
            continue
        pair = tuple(line.split(" "))
        if len(pair) != 2 or not vocab.keys() >= {*pair, "".join(pair)}:
            raise InputError(f"{merges_file}: line {number} is not a pair of tokens of vocab.json; fetch both again")
        merges.append(pair)
    return _roberta_tokenizer(vocab, merges)


def encode_transcript(text: str | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a normalised transcript, `<s>` … `</s>`, cut at the tokenizer's limit; None gives `<s></s>`."""
    normalized = "" if text is None else normalize_transcript(text)
    return tokenizer(normalized, truncation=True, verbose=False)["input_ids"]  # pyright: ignore[reportReturnType]


def spelling_of_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """Of each entry of a vocabulary made here or by the authors: how many letters and digits it has, and whether a word
    begins with it or, which is said of `<s>`, behind it. Sums over a transcript's tokens are its letters and words."""
    byte_of = _bytes_of_characters()
    letters, begins_word = [], []
    for token in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))):
        is_special = token in SPECIAL_TOKENS
        spelled = [] if is_special else [byte_of[character] for character in token]
        # In UTF-8 all bytes of a character but the first are continuation bytes, 10xxxxxx.
        letters.append(sum(byte & 0xC0 != 0x80 and byte not in b" '" for byte in spelled))
        begins_word.append(token == "<s>" or spelled[:1] == [ord(" ")])
    return letters, begins_word


def _bytes_of_characters() -> dict[str, int]:
    """The visible character that stands for each byte in a byte-level BPE (GPT-2's)."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = sorted(set(range(256)) - set(visible))
    return {chr(byte): byte for byte in visible} | {chr(256 + place): byte for place, byte in enumerate(others)}


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; give the folder that holds vocab.json and merges.txt") from None
    except UnicodeDecodeError:
        raise InputError(f"{file}: not UTF-8 text; fetch it again") from None


def _roberta_tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]]) -> RobertaTokenizer:
    from transformers import RobertaTokenizer

    return RobertaTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)  # pyright: ignore[reportArgumentType]
