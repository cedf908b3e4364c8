"""CMU-MOSEI (A. Zadeh et al., ACL 2018): opinions in YouTube videos, with a sentiment from −3 to 3 for each segment.

The raw archive CMU_MOSEI.zip unpacks to long recordings and the times of their segments:

    Audio/Full/WAV_16000/VIDEO.wav
    Transcript/Segmented/Combined/VIDEO.txt     `VIDEO___NUMBER___START___END___TEXT`, times in seconds

Its server (immortal.multicomp.cs.cmu.edu) no longer hands it out (CMU-MultimodalSDK, issues 15 and 24). What circulates
instead is the edition of MMSA (https://github.com/thuiar/MMSA; its layout is described in the wiki of MMSA-FET), where
the segments are clips of their own:

    label.csv                 video_id, clip_id, text, label, …, mode (train, valid or test)
    Raw/VIDEO/CLIP.mp4

Both are read; `label.csv` gives labels and splits in both, where VIDEO and NUMBER are its video_id and clip_id (the
archive's own Labels folder holds the annotators' raw answers). A video is in one split. `speaker` is the video, for
nobody says who speaks in it: people with several videos have several names, so it keeps splits apart and no more.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ctal.corpora import Corpus, Utterance
from ctal.corpora.reading import (
    SPLITS,
    find_file,
    find_folder,
    listed,
    read_text,
    readable,
    refuse_videos,
    sound_of,
    table_rows,
    warn_left_out,
)
from ctal.errors import InputError

_COLUMNS = ("video_id", "clip_id", "text", "label", "mode")
_WAVS, _SEGMENTS = "Audio/Full/WAV_16000", "Transcript/Segmented/Combined"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Segment:
    start: float
    end: float
    text: str | None


def prepare(root: Path) -> Iterator[Utterance]:
    """The lines of label.csv by video, in their order; ids are VIDEO/NUMBER in both layouts.

    In the raw layout the text is the transcript's. Segments without a label and labels without a segment are counted in
    a warning; clips and recordings that are missing are left to the store to quarantine. Raises `InputError` if a
    folder or label.csv is missing, a line of label.csv cannot be understood, or all clips are videos.
    """
    find_folder(root, [""], "name the folder with label.csv and Raw, or with Audio, Transcript and label.csv")
    table = find_file(
        root,
        ["label.csv", "Labels/label.csv", "Raw/label.csv"],
        "put the label.csv of MMSA's edition of MOSEI there (https://github.com/thuiar/MMSA)",
    )
    with readable(root):
        raw = next((folder for folder in (root, root / "Raw") if (folder / _WAVS).is_dir()), None)
    if raw is not None:
        yield from _cut_from_recordings(raw, _labelled(table))
        return
    clips = find_folder(
        root, ["Raw"], f"it holds the clips VIDEO/CLIP.wav; the layout with long recordings has {_WAVS} instead"
    )
    utterances = [replace(utterance, audio=sound_of(clips, utterance.id)) for utterance in _labelled(table)]
    refuse_videos([utterance.audio for utterance in utterances], clips)
    yield from utterances


def _labelled(table: Path) -> list[Utterance]:
    """What label.csv says; `audio` is a name only."""
    found: list[Utterance] = []
    for where, row in table_rows(table, _COLUMNS):
        video, mode = row["video_id"].strip(), row["mode"].strip()
        if mode not in SPLITS:
            raise InputError(f"{where}: mode '{mode}' is not train, valid or test; fetch label.csv again")
        found.append(
            Utterance(
                id=f"{video}/{row['clip_id'].strip()}",
                audio=Path(video),
                text=row["text"].strip() or None,
                speaker=video,
                split=SPLITS[mode],
                labels={"sentiment": _sentiment(row["label"], where)},
            )
        )
    # Segments of one recording must be neighbours, for the store to decode it once.
    return sorted(found, key=lambda utterance: utterance.audio.name)


def _sentiment(value: str, where: str) -> float:
    try:
        sentiment = float(value)
    except ValueError:
        sentiment = float("nan")
    if not -3 <= sentiment <= 3:
        raise InputError(f"{where}: label '{value}' is not a number from -3 to 3; fetch label.csv again")
    return sentiment


def _cut_from_recordings(raw: Path, labelled: list[Utterance]) -> Iterator[Utterance]:
    transcripts = find_folder(raw, [_SEGMENTS], "unpack CMU_MOSEI.zip whole")
    left_out: Counter[str] = Counter()
    segments = {id: segment for path in listed(transcripts, "*.txt") for id, segment in _segments(path, left_out)}
    differing = 0
    for utterance in labelled:
        segment = segments.get(utterance.id)
        if segment is None:
            left_out["in label.csv alone"] += 1
            continue
        differing += _words(segment.text) != _words(utterance.text)
        audio = sound_of(raw / _WAVS, utterance.audio.name)
        text = segment.text or utterance.text
        yield replace(utterance, audio=audio, text=text, start=segment.start, end=segment.end)
    left_out["without a label"] += len(segments.keys() - {utterance.id for utterance in labelled})
    warn_left_out(raw, "segments", +left_out)
    if differing:
        # Should the two ever number segments differently, labels would be wrong and nothing else would tell.
        logger.warning("%s: %d segments have other words than in label.csv; is it of this edition?", raw, differing)


def _segments(path: Path, left_out: Counter[str]) -> Iterator[tuple[str, _Segment]]:
    """(id, segment) of each line; those in another form, of which the archive has some, are counted."""
    for line in filter(str.strip, read_text(path).split("\n")):
        # The name first: a video's id may end in an underscore, and a text may hold three.
        before, *fields = line.removeprefix(path.stem).split("___", 4)
        try:
            number, start, end, text = fields
            segment = _Segment(float(start), float(end), text.strip() or None)
        except ValueError:
            left_out["not VIDEO___NUMBER___START___END___TEXT"] += 1
            continue
        if before:
            left_out["of another video than the file's"] += 1
        else:
            yield f"{path.stem}/{number}", segment


def _words(text: str | None) -> str:
    return "".join(filter(str.isalnum, (text or "").casefold()))


CORPUS = Corpus(
    name="mosei",
    help="ROOT: a folder with label.csv and either Raw/VIDEO/CLIP.wav (the edition of https://github.com/thuiar/MMSA, "
    "after the sound is extracted from its .mp4 clips) or Audio and Transcript of the raw CMU_MOSEI.zip (no longer "
    "handed out). Sentiment from -3 to 3. No licence is stated: ask its authors, https://github.com/CMU-MultiComp-Lab.",
    prepare=prepare,
)
