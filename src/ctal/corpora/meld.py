"""MELD (S. Poria et al., ACL 2019): 13,708 utterances of dialogues from the television series Friends.

As MELD.Raw.tar.gz and the three archives in it unpack (some copies have a folder `train`, `dev` or `test` around each):

    train_sent_emo.csv, dev_sent_emo.csv, test_sent_emo.csv     Utterance, Speaker, Emotion, Sentiment, Dialogue_ID, …
    train_splits/diaX_uttY.mp4, dev_splits_complete/, output_repeated_splits_test/

Emotion is the majority of three annotators among Ekman's six and neutral. The splits are the published ones, and
**share speakers**: the cast of the series is in all three, so results on them are not of unseen speakers. Some speakers
are not a person ("All", "Man"). X and Y count anew in each split. Known faults, which end in quarantine: dev
dia110_utt7 is missing and train dia125_utt3 is broken (issues 22 and 39 of https://github.com/declare-lab/MELD); some
clips are cut wrongly (issue 20). Clips without a line in the tables are not used, as the authors advise (issue 22).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ctal.corpora import Corpus, Utterance
from ctal.corpora.reading import SPLITS, find_file, find_folder, refuse_videos, sound_of, table_rows, warn_left_out

_COLUMNS = ("Utterance", "Speaker", "Emotion", "Sentiment", "Dialogue_ID", "Utterance_ID")
_CLIPS = {"train": "train_splits", "dev": "dev_splits_complete", "test": "output_repeated_splits_test"}
_EMOTIONS = {
    "anger": "angry",
    "disgust": "disgusted",
    "fear": "fearful",
    "joy": "happy",
    "neutral": "neutral",
    "sadness": "sad",
    "surprise": "surprised",
}


def prepare(root: Path) -> Iterator[Utterance]:
    """Utterances of train, dev and test in the order of their tables; an id is such as train/dia0_utt3.

    The label `polarity` is MELD's Sentiment (negative, neutral or positive). A clip that is missing is left to the
    store to quarantine. Raises `InputError` if a table or folder of clips is missing, or all clips are videos.
    """
    utterances: list[Utterance] = []
    left_out: Counter[str] = Counter()
    for name, clips in _CLIPS.items():
        table = f"{name}_sent_emo.csv"
        path = find_file(root, [table, f"{name}/{table}"], "name the folder MELD.Raw, with train, dev and test in it")
        folder = find_folder(root, [clips, f"{name}/{clips}"], f"unpack {name}.tar.gz, which lies in MELD.Raw")
        for _, row in table_rows(path, _COLUMNS):
            emotion = row["Emotion"].strip().lower()
            if emotion not in _EMOTIONS:
                left_out[emotion] += 1
                continue
            clip = f"dia{row['Dialogue_ID'].strip()}_utt{row['Utterance_ID'].strip()}"
            utterances.append(
                Utterance(
                    id=f"{name}/{clip}",
                    audio=sound_of(folder, clip),
                    text=row["Utterance"].strip() or None,
                    speaker=row["Speaker"].strip() or None,
                    split=SPLITS[name],
                    labels={"emotion": _EMOTIONS[emotion], "polarity": row["Sentiment"].strip().lower()},
                )
            )
    refuse_videos([utterance.audio for utterance in utterances], root)
    warn_left_out(root, "utterances with other labels", left_out)
    yield from utterances


CORPUS = Corpus(
    name="meld",
    help="ROOT: the folder MELD.Raw with its archives unpacked and the sound extracted from the .mp4 clips "
    "(you are told how). Seven emotions; its published splits share speakers, the cast of Friends. From "
    "https://affective-meld.github.io (GPL-3.0; the series belongs to its makers).",
    prepare=prepare,
    shares_speakers=True,
)
