"""EmoDB (F. Burkhardt et al., Interspeech 2005): ten German actors say 10 sentences in 7 emotions.

As download.zip of http://emodb.bilderbar.info unpacks: wav/SSTTTEV.wav, 535 files such as wav/03a01Fa.wav for speaker
03, sentence a01, Freude (happiness), version a; copies in FLAC are read as well. The emotion is the one that the actor
was asked for, in recordings that at least 80 % of listeners recognised and 60 % judged natural. There is no official
split; the custom is to hold out a speaker at a time. Emotion is independent of the text by design.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ctal.corpora import Corpus, Utterance
from ctal.corpora.reading import find_folder, named_recordings

_EMOTIONS = {
    "W": "angry",  # Wut
    "L": "bored",  # Langeweile
    "E": "disgusted",  # Ekel
    "A": "fearful",  # Angst
    "F": "happy",  # Freude
    "T": "sad",  # Trauer
    "N": "neutral",
}
_SENTENCES = {
    "a01": "Der Lappen liegt auf dem Eisschrank.",
    "a02": "Das will sie am Mittwoch abgeben.",
    "a04": "Heute abend könnte ich es ihm sagen.",
    "a05": "Das schwarze Stück Papier befindet sich da oben neben dem Holzstück.",
    "a07": "In sieben Stunden wird es soweit sein.",
    "b01": "Was sind denn das für Tüten, die da unter dem Tisch stehen?",
    "b02": "Sie haben es gerade hochgetragen und jetzt gehen sie wieder runter.",
    "b03": "An den Wochenenden bin ich jetzt immer nach Hause gefahren und habe Agnes besucht.",
    "b09": "Ich will das eben wegbringen und dann mit Karl was trinken gehen.",
    "b10": "Die wird auf dem Platz sein, wo wir sie immer hinlegen.",
}
_NAME = re.compile(rf"(\d\d)({'|'.join(_SENTENCES)})([{''.join(_EMOTIONS)}])[a-z]")


def prepare(root: Path) -> Iterator[Utterance]:
    """Recordings by name, which is the id. Raises `InputError` if `root` is missing or has none."""
    folder = find_folder(root, ["wav", ""], "name the folder that holds wav")
    for audio, match in named_recordings(folder, "*", _NAME):
        speaker, sentence, emotion = match.groups()
        labels = {"emotion": _EMOTIONS[emotion], "sentence": sentence}
        yield Utterance(audio.stem, audio, text=_SENTENCES[sentence], speaker=speaker, labels=labels)


CORPUS = Corpus(
    name="emodb",
    help="ROOT: the folder that holds wav/03a01Fa.wav …. Seven acted emotions, in German. From "
    "http://emodb.bilderbar.info (CC0 1.0, as copies of it state).",
    prepare=prepare,
)
