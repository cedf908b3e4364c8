"""The sentences of the demo corpus: templates with slots, other templates in each split, the same words in all.

A sentence is an opening (a marker or a plain one), then a template with exactly one key word. No template tells
anything of the word class, the marker or the style; and every sentence ends with a full stop, so that punctuation
does not either.
"""

import re
from collections.abc import Mapping
from string import Formatter
from typing import Final

import numpy as np

from ctal.corpora.demo.lexicon import KEY_WORDS, MARKERS, PEOPLE, PLACES, PLAIN_OPENINGS, THINGS, TIMES, VERBS

SLOTS: Final[Mapping[str, tuple[str, ...]]] = {
    "person": PEOPLE,
    "thing": THINGS,
    "verb": VERBS,
    "place": PLACES,
    "time": TIMES,
}
"""Slot of a template → its items; the slot `key` is filled from `KEY_WORDS` instead."""

TEMPLATES: Final[Mapping[str, tuple[str, ...]]] = {
    "train": (
        "{person} {verb} the {key} {thing}",
        "that {key} {thing} was {person}'s",
        "the {thing} near the {place} was {key}",
        "the {place} looked {key} {time}",
        "my {thing} was {key} {time}",
        "they {verb} our {key} {thing}",
        "{person} called the {place} {key}",
        "the {key} {thing} belonged to {person}",
        "we {verb} her {key} {thing}",
        "{time} the {thing} seemed {key}",
        "it was a {key} {place}",
        "{time} {person} was {key}",
    ),
    "validation": (
        "the {key} {place} was near {person}",
        "{person} {verb} her {key} {place}",
        "our {thing} looked {key} to {person}",
        "they saw the {key} {thing} {time}",
    ),
    "test": (
        "that {place} seemed {key} to {person}",
        "{time} we saw a {key} {thing}",
        "{person} called my {thing} {key}",
        "the {key} {thing} was near the {place}",
        "her {place} was {key} {time}",
        "they {verb} her {key} {thing}",
        "{person} and {person} {verb} a {key} {thing}",
        "it looked {key} near the {place}",
    ),
}
"""Split → its templates. Those of `validation` and `test` occur nowhere else."""


def sentence(split: str, word_class: int, marker: bool, generator: np.random.Generator) -> str:
    """A random sentence of `split` with a key word of `word_class` (-2 … 2), opened by a marker or a plain opening."""

    def pick(items: tuple[str, ...]) -> str:
        return items[int(generator.integers(len(items)))]

    words = [pick(MARKERS if marker else PLAIN_OPENINGS), ", "]
    for literal, slot, _, _ in Formatter().parse(pick(TEMPLATES[split])):
        words.append(literal)
        if slot is not None:
            words.append(pick(KEY_WORDS[word_class] if slot == "key" else SLOTS[slot]))
    text = re.sub(r"\ba (?=[aeiou])(?!useful)", "an ", "".join(words))
    return text[0].upper() + text[1:] + "."
