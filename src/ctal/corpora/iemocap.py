"""IEMOCAP (C. Busso et al., Language Resources and Evaluation 42, 2008): ten actors in five dyadic sessions.

As `IEMOCAP_full_release` unpacks, with N from 1 to 5 and a DIALOG such as Ses01F_impro01:

    SessionN/sentences/wav/DIALOG/UTTERANCE.wav     one file an utterance, such as Ses01F_impro01_M005.wav
    SessionN/dialog/transcriptions/DIALOG.txt       `UTTERANCE [006.2901-008.2357]: Excuse me.`
    SessionN/dialog/EmoEvaluation/DIALOG.txt        `[6.2901 - 8.2357]	UTTERANCE	neu	[2.5000, 2.5000, 2.5000]`

The code in EmoEvaluation is what most annotators agreed on, `xxx` where they did not. Four classes are used here:
angry, happy, sad and neutral, where excited counts as happy and all else is left out. That gives the 5,531 utterances
(1,103 angry, 1,636 happy, 1,084 sad, 1,708 neutral) of the literature that the CTAL paper follows.
`iemocap6` keeps six classes.

There is no official split. The custom is to hold out a session at a time (label `session`) with its two speakers. The
letter in a dialog's name says who wore the markers; the last letter of an utterance's, who speaks.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from ctal.corpora import Corpus, Utterance
from ctal.corpora.reading import find_folder, listed, read_text, sound_of, warn_left_out
from ctal.errors import InputError

_SESSIONS = range(1, 6)
FOUR_CLASSES = {"ang": "angry", "hap": "happy", "exc": "happy", "sad": "sad", "neu": "neutral"}
"""EmoEvaluation's code → emotion."""
_SUMMARY = re.compile(r"\[[\d.]+ - [\d.]+\]\s+((Ses0\d)[FM]_\S+_([FM])\w+)\s+(\w+)\s+\[", re.ASCII)
_TRANSCRIPT = re.compile(r"(Ses0\d\S+)\s+\[[^\]]*\]:(.*)")
_MEND = "IEMOCAP has Session1 to Session5; name the folder IEMOCAP_full_release, unpacked whole"


def prepare(root: Path, emotions: Mapping[str, str] = FOUR_CLASSES) -> Iterator[Utterance]:
    """Utterances with a code in `emotions`, by session and dialog; the others are counted in a warning.

    Raises `InputError` if a session or one of its folders is missing, or a dialog's transcript.
    """
    release = find_folder(root, ["IEMOCAP_full_release", ""], _MEND)
    left_out: Counter[str] = Counter()
    found = False
    for session in [find_folder(release, [f"Session{number}"], _MEND) for number in _SESSIONS]:
        evaluations, transcriptions = (
            find_folder(session, [f"dialog/{name}"], _MEND) for name in ("EmoEvaluation", "transcriptions")
        )
        wavs = find_folder(session, ["sentences/wav"], _MEND)
        for evaluation in listed(evaluations, "Ses*.txt"):
            texts = _transcripts(transcriptions / evaluation.name)
            for id, name, gender, code in _SUMMARY.findall(read_text(evaluation)):
                if code not in emotions:
                    left_out[code] += 1
                    continue
                found = True
                yield Utterance(
                    id,
                    sound_of(wavs / evaluation.stem, id),
                    text=texts.get(id),
                    speaker=name + gender,
                    labels={"emotion": emotions[code], "session": name},
                )
    if not found:
        raise InputError(f"{release}: no labelled utterance in Session*/dialog/EmoEvaluation/*.txt; {_MEND}")
    warn_left_out(release, "utterances with other labels", left_out)


def _transcripts(path: Path) -> dict[str, str | None]:
    lines = map(_TRANSCRIPT.match, read_text(path).split("\n"))
    return {line[1]: line[2].strip() or None for line in lines if line}


SOURCE = (
    "ROOT: the folder IEMOCAP_full_release, with Session1 … Session5. On request from https://sail.usc.edu/iemocap, "
    "whose release form sets the terms."
)

CORPUS = Corpus(
    name="iemocap",
    help=f"{SOURCE} Four emotions: angry, happy (with excited), sad, neutral.",
    prepare=prepare,
)
