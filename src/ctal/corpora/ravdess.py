"""RAVDESS (S. Livingstone and F. Russo, PLoS ONE 13, 2018): 24 actors say 2 sentences in 8 emotions.

As Audio_Speech_Actors_01-24.zip unpacks: Actor_NN/MODALITY-CHANNEL-EMOTION-INTENSITY-STATEMENT-REPETITION-ACTOR.wav,
1,440 files such as Actor_12/03-01-06-01-02-01-12.wav (https://zenodo.org/records/1188976 explains the numbers). Speech
alone is read, modality 03 (sound only) and channel 01: songs (channel 02, which unpack to the same folders) and the
sound of videos are left out. The emotion is the one that the actor was asked for. There is no official split. Emotion
is independent of the text by design.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ctal.corpora import Corpus, Utterance
from ctal.corpora.reading import find_folder, named_recordings, warn_left_out

_EMOTIONS = {
    "01": "neutral",
    "02": "calm",
    "03": "happy",
    "04": "sad",
    "05": "angry",
    "06": "fearful",
    "07": "disgusted",
    "08": "surprised",
}
_STATEMENTS = {"01": "Kids are talking by the door.", "02": "Dogs are sitting by the door."}
_NAME = re.compile(r"(0[1-3])-(0[12])-(0[1-8])-0[12]-(0[12])-0[12]-([012]\d)")


def prepare(root: Path) -> Iterator[Utterance]:
    """Recordings of speech by name, which is the id; songs and videos are counted in a warning.

    Raises `InputError` if `root` is missing or has no recording.
    """
    folder = find_folder(root, [""], "name the folder that holds Actor_01 … Actor_24")
    left_out: Counter[str] = Counter()
    for audio, match in named_recordings(folder, "Actor_*/*", _NAME):
        modality, channel, emotion, statement, actor = match.groups()
        if (modality, channel) != ("03", "01"):
            left_out["songs" if channel == "02" else "of videos"] += 1
            continue
        labels = {"emotion": _EMOTIONS[emotion], "sentence": statement}
        yield Utterance(audio.stem, audio, text=_STATEMENTS[statement], speaker=f"Actor_{actor}", labels=labels)
    warn_left_out(root, "recordings that are not of speech alone", left_out)


CORPUS = Corpus(
    name="ravdess",
    help="ROOT: the folder that holds Actor_01 … Actor_24. Eight acted emotions; songs are left out. "
    "Audio_Speech_Actors_01-24.zip from https://zenodo.org/records/1188976 (CC BY-NC-SA 4.0).",
    prepare=prepare,
)
