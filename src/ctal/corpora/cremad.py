"""CREMA-D (H. Cao et al., IEEE Transactions on Affective Computing 5, 2014): 91 actors say 12 sentences in 6 emotions.

As in https://github.com/CheyneyComputerScience/CREMA-D: AudioWAV/ACTOR_SENTENCE_EMOTION_LEVEL.wav, 7,442 files such as
1001_DFA_ANG_XX.wav. The emotion is the one that the actor was asked for; how listeners heard it (tabulatedVotes.csv) is
not used. There is no official split. Emotion is independent of the text by design.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ctal.corpora import Corpus, Utterance
from ctal.corpora.reading import find_folder, named_recordings

_EMOTIONS = {
    "ANG": "angry",
    "DIS": "disgusted",
    "FEA": "fearful",
    "HAP": "happy",
    "NEU": "neutral",
    "SAD": "sad",
}
_SENTENCES = {
    "IEO": "It's eleven o'clock.",
    "TIE": "That is exactly what happened.",
    "IOM": "I'm on my way to the meeting.",
    "IWW": "I wonder what this is about.",
    "TAI": "The airplane is almost full.",
    "MTI": "Maybe tomorrow it will be cold.",
    "IWL": "I would like a new alarm clock.",
    "ITH": "I think I have a doctor's appointment.",
    "DFA": "Don't forget a jacket.",
    "ITS": "I think I've seen this before.",
    "TSI": "The surface is slick.",
    "WSI": "We'll stop in a couple of minutes.",
}
# The level may be one letter: there is a 1040_ITH_SAD_X.wav.
_NAME = re.compile(rf"(\d{{4}})_({'|'.join(_SENTENCES)})_({'|'.join(_EMOTIONS)})_[A-Z]{{1,2}}")


def prepare(root: Path) -> Iterator[Utterance]:
    """Recordings by name, which is the id. Raises `InputError` if `root` is missing or has none."""
    folder = find_folder(root, ["AudioWAV", ""], "name the folder CREMA-D, with AudioWAV in it")
    for audio, match in named_recordings(folder, "*", _NAME):
        actor, sentence, emotion = match.groups()
        labels = {"emotion": _EMOTIONS[emotion], "sentence": sentence}
        yield Utterance(audio.stem, audio, text=_SENTENCES[sentence], speaker=actor, labels=labels)


CORPUS = Corpus(
    name="cremad",
    help="ROOT: the folder CREMA-D, with AudioWAV in it. Six acted emotions. From "
    "https://github.com/CheyneyComputerScience/CREMA-D by git lfs (ODbL 1.0, contents DbCL 1.0).",
    prepare=prepare,
)
