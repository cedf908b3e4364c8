"""VoxCeleb1 (A. Nagrani et al., Interspeech 2017): 1,251 celebrities in interviews on YouTube, without transcripts.

As vox1_dev_wav.zip and vox1_test_wav.zip unpack, into one folder or two: wav/idXXXXX/VIDEO/NNNNN.wav. The split is that
of verification: `test` for the 40 speakers whose names start with E, id10270 to id10309, `train` for the
other 1,211. An id is idXXXXX/VIDEO/NNNNN, which is how the official trial lists name recordings, but for `.wav`:
`1 id10270/5r0dWxy17C8/00001.wav id10270/x6uYqmx31kE/00001.wav`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ctal.corpora import Corpus, Utterance
from ctal.corpora.reading import find_folder, listed, subfolders
from ctal.errors import InputError

_SPEAKER = re.compile(r"id\d{5}")
_TEST_SPEAKERS = range(10270, 10310)
_MEND = "name the folder that holds wav/id10001 …, or dev and test with wav in each"


def prepare(root: Path) -> Iterator[Utterance]:
    """Recordings by id, wherever below `root` (two folders deep at most) the speakers' folders lie.

    Raises `InputError` if `root` is missing or has no recording.
    """
    find_folder(root, [""], _MEND)
    found = False
    for speaker in sorted(_speakers(root, depth=2), key=lambda folder: (folder.name, folder)):
        split = "test" if int(speaker.name[2:]) in _TEST_SPEAKERS else "train"
        for audio in listed(speaker, "*/*"):
            if audio.suffix in (".wav", ".flac"):
                found = True
                id = audio.relative_to(speaker.parent).with_suffix("").as_posix()
                yield Utterance(id, audio, speaker=speaker.name, split=split)
    if not found:
        raise InputError(f"{root}: no idXXXXX/VIDEO/NNNNN.wav as in VoxCeleb1; {_MEND}")


def _speakers(folder: Path, depth: int) -> Iterator[Path]:
    for child in subfolders(folder):
        if _SPEAKER.fullmatch(child.name):
            yield child
        elif depth:
            yield from _speakers(child, depth - 1)


CORPUS = Corpus(
    name="voxceleb1",
    help="ROOT: the folder that holds wav/id10001 …, dev and test together or in a folder each. From "
    "https://www.robots.ox.ac.uk/~vgg/data/voxceleb/vox1.html (CC BY 4.0; the videos belong to their makers), where "
    "the trial lists are as well (veri_test2.txt).",
    prepare=prepare,
)
