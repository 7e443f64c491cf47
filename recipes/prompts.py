"""Prepare speech for recipes/mini_16khz.toml: `python recipes/prompts.py ARCHIVES OUT`.

ARCHIVES is a folder with Debian packages, which `apt-get download` fetches: asterisk-core-sounds-{en,es,fr,it,ru}-g722
(telephone prompts in five languages) and festvox-ru (Russian sentences by another speaker). OUT is the output folder
for FLAC files at 16 kHz:

speaker    the French prompts. Their speaker occurs in no other language and is not used for training.
held_out   every twentieth of the other prompts
train      the rest
varied     a second copy of each clip of `train`, as from another speaker, room and microphone

Needs `dpkg-deb` and FFmpeg's decoder (in a clone of snax: `pip install '.[av]'`).
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import av
import numpy as np
import soundfile
import soxr
from tqdm import tqdm

LANGUAGES = ("en", "es", "fr", "it", "ru")
RATE = 16_000
MIN_SECONDS = 0.3


def main() -> None:
    archives, out = map(Path, sys.argv[1:])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for language in LANGUAGES:
            unpack(archives, f"asterisk-core-sounds-{language}-g722", folder / language)
            files = sorted(path for path in (folder / language).rglob("*.g722") if path.stat().st_size)
            for i, path in enumerate(tqdm(files, desc=language, disable=None)):
                part = "speaker" if language == "fr" else "held_out" if i % 20 == 10 else "train"
                # Folders below "sounds/LANGUAGE_SPEAKER" become part of the file name.
                name = "_".join(path.parts[path.parts.index("sounds") + 2 :])
                write(decode(path), out / part / language / name)
        unpack(archives, "festvox-ru", folder / "festvox")
        for path in tqdm(sorted((folder / "festvox").rglob("*.wav")), desc="festvox-ru", disable=None):
            write(decode(path), out / "train" / "festvox-ru" / path.name)
    rng = np.random.default_rng(0)
    for path in tqdm(sorted((out / "train").rglob("*.flac")), desc="varied", disable=None):
        write(vary(soundfile.read(path)[0], rng), out / "varied" / f"{path.parent.name}-varied" / path.name)


def unpack(archives: Path, package: str, folder: Path) -> None:
    (archive,) = archives.glob(f"{package}_*.deb")
    subprocess.run(["dpkg-deb", "-x", archive, folder], check=True)


def decode(path: Path) -> np.ndarray:
    if path.suffix == ".wav":
        samples, rate = soundfile.read(path)
        return soxr.resample(samples, rate, RATE)
    with av.open(str(path), format="g722") as file:
        return np.concatenate([frame.to_ndarray()[0] for frame in file.decode(audio=0)])


def write(samples: np.ndarray, path: Path) -> None:
    """Write FLAC, unless the clip is very short."""
    if len(samples) >= MIN_SECONDS * RATE:
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path.with_suffix(".flac"), samples, RATE)


def vary(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Change speed and pitch by up to a quarter, and add a room, a microphone and noise."""
    samples = soxr.resample(samples, RATE * 1.25 ** rng.uniform(-1, 1), RATE)
    level = np.sqrt(np.mean(samples**2))
    # The room: noise that falls by 60 dB in `decay` seconds, and is `direct_db` weaker than the direct sound.
    decay, direct_db = rng.uniform(0.1, 0.6), rng.uniform(5, 25)
    time = np.arange(round(decay * RATE)) / RATE
    tail = rng.standard_normal(len(time)) * 10 ** (-3 * time / decay)
    response = tail / np.sqrt(np.sum(tail**2)) * 10 ** (-direct_db / 20)
    response[0] += 1
    # The microphone: a random gain in each octave up to 8 kHz.
    size = len(samples) + len(response) - 1
    octaves = np.log2(np.maximum(np.fft.rfftfreq(size, 1 / RATE), 62.5) / 62.5)
    gain = 10 ** (np.interp(octaves, np.arange(8), rng.normal(0, 3, size=8)) / 20)
    varied = np.fft.irfft(np.fft.rfft(samples, size) * np.fft.rfft(response, size) * gain, size)[: len(samples)]
    varied *= level / np.sqrt(np.mean(varied**2))
    varied += level * 10 ** (-rng.uniform(30, 60) / 20) * rng.standard_normal(len(varied))
    return varied / max(1, np.abs(varied).max())


if __name__ == "__main__":
    main()
