"""The sentences of the demo corpus: templates with slots, other templates in each split, the same words in all.

A sentence is an opening (a marker or a plain one), then a template with two key words of one class. Two, because words
of like feeling keep company in real language too: masked language modelling can only learn what a word means from the
words that it meets. No template tells anything of the word class, the marker or the style; and every sentence ends with
a full stop, so that punctuation does not either.
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
        "{person} {verb} the {key} {thing} in a {key} {place}",
        "that {key} {thing} was {person}'s, and it was {key}",
        "the {key} {thing} near the {place} was {key}",
        "the {place} looked {key} and {key} {time}",
        "my {thing} was {key}, and so {key} {time}",
        "they {verb} our {key} and {key} {thing}",
        "{person} called the {key} {place} {key}",
        "the {key} {thing} belonged to a {key} {place}",
        "we {verb} her {key} {thing}, the {key} one",
        "{time} the {key} {thing} seemed {key}",
        "it was a {key} {place} with a {key} {thing}",
        "{time} {person} was {key} and {key}",
    ),
    "validation": (
        "the {key} {place} was near a {key} {thing}",
        "{person} {verb} her {key} {thing}, and it was {key}",
        "our {key} {thing} looked {key} to {person}",
        "they saw the {key} and {key} {thing} {time}",
    ),
    "test": (
        "that {key} {place} seemed {key} to {person}",
        "{time} we saw a {key} and {key} {thing}",
        "{person} called my {key} {thing} {key}",
        "the {key} {thing} was near the {key} {place}",
        "her {place} was {key} and {key} {time}",
        "they {verb} her {key} {thing}, so {key} {time}",
        "{person} and {person} {verb} a {key} {thing} in the {key} {place}",
        "it looked {key} and {key} near the {place}",
    ),
}
"""Split → its templates. Those of `validation` and `test` occur nowhere else."""


def sentence(split: str, word_class: int, marker: bool, generator: np.random.Generator) -> str:
    """A random sentence of `split` with two key words of `word_class` (-2 … 2), behind a marker or a plain opening."""

    def pick(items: tuple[str, ...]) -> str:
        return items[int(generator.integers(len(items)))]

    words = [pick(MARKERS if marker else PLAIN_OPENINGS), ", "]
    template = pick(TEMPLATES[split])
    keys = iter(generator.permutation(KEY_WORDS[word_class]).tolist())
    for literal, slot, _, _ in Formatter().parse(template):
        words.append(literal)
        if slot is not None:
            words.append(next(keys) if slot == "key" else pick(SLOTS[slot]))
    text = re.sub(r"\ba (?=[aeiou])(?!useful)", "an ", "".join(words))
    return text[0].upper() + text[1:] + "."
