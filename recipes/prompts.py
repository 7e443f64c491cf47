"""Prepare two hours of speech for recipes/mini_16khz.toml: `python recipes/prompts.py ARCHIVES OUT`.

ARCHIVES is a folder with the Debian packages asterisk-core-sounds-{en,es,fr,it,ru}-g722, which `apt-get download`
fetches: telephone prompts in five languages at 16 kHz. OUT is the output folder for FLAC files:

speaker    the French prompts. Their speaker occurs in no other language and is not used for training.
held_out   every twentieth of the other prompts
train      the rest

Needs `dpkg-deb` and FFmpeg's decoder (in a clone of snax: `pip install '.[av]'`).
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import av
import numpy as np
import soundfile
from tqdm import tqdm

LANGUAGES = ("en", "es", "fr", "it", "ru")
RATE = 16_000
MIN_SECONDS = 0.3


def main() -> None:
    archives, out = map(Path, sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        for language in LANGUAGES:
            (archive,) = archives.glob(f"asterisk-core-sounds-{language}-g722_*.deb")
            subprocess.run(["dpkg-deb", "-x", archive, f"{folder}/{language}"], check=True)
            files = sorted(path for path in Path(folder, language).rglob("*.g722") if path.stat().st_size)
            for i, path in enumerate(tqdm(files, desc=language, disable=None)):
                part = "speaker" if language == "fr" else "held_out" if i % 20 == 10 else "train"
                convert(path, out / part / language)


def convert(path: Path, folder: Path) -> None:
    """Decode a prompt and write it to `folder` as FLAC. Very short prompts are skipped."""
    with av.open(str(path), format="g722") as file:
        samples = np.concatenate([frame.to_ndarray()[0] for frame in file.decode(audio=0)])
    if len(samples) < MIN_SECONDS * RATE:
        return
    folder.mkdir(parents=True, exist_ok=True)
    # Folders below "sounds/LANGUAGE_SPEAKER" become part of the file name.
    name = "_".join(path.parts[path.parts.index("sounds") + 2 :])
    soundfile.write(folder / Path(name).with_suffix(".flac"), samples, RATE)


if __name__ == "__main__":
    main()
