"""IEMOCAP with six emotions: angry, happy, sad, neutral, excited and frustrated. Layout and source: `iemocap`.

Excited and happy stay apart, and frustrated, the most frequent code, is kept (7,380 utterances: 1,103 angry, 595 happy,
1,084 sad, 1,708 neutral, 1,041 excited, 1,849 frustrated). These are the six of the literature on emotion in
conversations, such as N. Majumder et al., DialogueRNN, AAAI 2019.
"""

from __future__ import annotations

from functools import partial

from ctal.corpora import Corpus
from ctal.corpora.iemocap import FOUR_CLASSES, SOURCE, prepare

SIX_CLASSES = FOUR_CLASSES | {"exc": "excited", "fru": "frustrated"}

CORPUS = Corpus(
    name="iemocap6",
    help=f"{SOURCE} Six emotions: angry, happy, sad, neutral, excited, frustrated.",
    prepare=partial(prepare, emotions=SIX_CLASSES),
)
