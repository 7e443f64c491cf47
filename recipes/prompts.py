"""Two hours of speech for recipes/mini_16khz.toml: `python recipes/prompts.py ARCHIVES OUT`.

ARCHIVES has the Debian packages asterisk-core-sounds-{en,es,fr,it,ru}-g722: telephone prompts in five languages at
16 kHz; `apt-get download` fetches them. OUT gets FLAC files: `speaker` has the French ones, whose speaker is in none of
the others and is never trained on; of the others every twentieth goes to `held_out` and the rest to `train`.

Needs FFmpeg's decoder (`pip install 'snax-codec[av]'`) and `dpkg-deb`.
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


def main() -> None:
    archives, out = map(Path, sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        for language in LANGUAGES:
            (archive,) = archives.glob(f"asterisk-core-sounds-{language}-g722_*.deb")
            subprocess.run(["dpkg-deb", "-x", archive, f"{folder}/{language}"], check=True)
            files = sorted(path for path in Path(folder, language).rglob("*.g722") if path.stat().st_size)
            for i, path in enumerate(tqdm(files, desc=language, disable=None)):
                part = "speaker" if language == "fr" else "held_out" if i % 20 == 10 else "train"
                write(path, out / part / language)


def write(path: Path, folder: Path) -> None:
    with av.open(str(path), format="g722") as file:
        samples = np.concatenate([frame.to_ndarray()[0] for frame in file.decode(audio=0)])
    if len(samples) < 0.3 * RATE:
        return
    folder.mkdir(parents=True, exist_ok=True)
    # Below "sounds/LANGUAGE_SPEAKER" the folders are part of the name.
    name = "_".join(path.parts[path.parts.index("sounds") + 2 :])
    soundfile.write(folder / Path(name).with_suffix(".flac"), samples, RATE)


if __name__ == "__main__":
    main()
