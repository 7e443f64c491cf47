"""Training data: audio is decoded once into a memory-mapped file, from which Grain reads random crops.

Decoding reads whole clips, but an example is about a second long. So each process decodes its part of the corpus before
training starts, to 16 bits per sample at the codec's rate. 100 hours at 24 kHz take 17 GB.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from ..atomic import atomic_write
from ..data import corpus
from ..data.decoding import DecoderPool
from ..data.reading import Clip, Unreadable, clips
from .config import Data

_log = logging.getLogger(__name__)

# Processes take turns after this many clips, so that each gets clips from all parts of the corpus.
_CLIPS_PER_TURN = 16
# A larger fraction of unreadable clips means that the problem is not in single clips.
_MAX_UNREADABLE = 0.1
_FULL_SCALE = 2**15 - 1


class DataError(ValueError):
    """Audio that cannot be used for training."""


class DecodedCorpus(NamedTuple):
    """Decoded clips, each scaled to the peak of 16 bits and stored one after the other.

    Attributes:
        samples: int16 samples of all clips, memory-mapped.
        bounds: the offset in `samples` at which each clip starts, and the end of the last clip.
        levels: the RMS level of each clip as stored, in dBFS.
    """

    samples: np.ndarray
    bounds: np.ndarray
    levels: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.bounds)


def decode_corpus(
    inputs: Sequence[str], rate: int, folder: Path, decoders: int, process: int = 0, processes: int = 1
) -> DecodedCorpus:
    """Decode one process's part of a corpus into `folder`, or reuse what an earlier run decoded from the same inputs.

    Args:
        inputs: the corpus, given as for `snax extract`.
        rate: the sampling rate of the codec, in Hz.
        folder: the output directory.
        decoders: the number of processes that decode.
        process: the index of this process.
        processes: the number of processes that share the corpus.

    Raises:
        CorpusError: if the inputs are not a valid corpus.
        DataError: if too many clips are unreadable, or if this process has no readable clip.
        OSError: if an input cannot be read or the output cannot be written.
    """
    plan = corpus.plan(inputs, _CLIPS_PER_TURN)
    made_of = {
        "plan": corpus.digest(plan),
        "rate": rate,
        "process": [process, processes],
    }
    index_path, audio_path = folder / "clips.json", folder / "audio.int16"
    index = json.loads(index_path.read_text()) if index_path.exists() else {}
    if index.get("made_of") != made_of:
        folder.mkdir(parents=True, exist_ok=True)
        sources = [source for shard in plan[process::processes] for source in shard]
        contents = (pair for source in sources for pair in clips(source))
        index = {"made_of": made_of, **_decode(contents, rate, audio_path, decoders)}
        with atomic_write(index_path) as temporary:
            temporary.write_text(json.dumps(index))
    bounds = np.cumsum([0, *index["lengths"]])
    samples = np.memmap(audio_path, np.int16, mode="r", shape=(int(bounds[-1]),))
    return DecodedCorpus(samples, bounds, np.array(index["levels"]))


def _decode(contents: Iterable[tuple[Clip, Any]], rate: int, path: Path, count: int) -> dict[str, list[Any]]:
    """Decode clips into the file `path` with `count` processes. Return lengths, levels and unreadable clips."""
    lengths, levels, unreadable = list[int](), list[float](), list[tuple[str, str]]()
    decoders = DecoderPool(count, rate, separate=False, max_seconds=24 * 3600)
    show_progress = jax.process_index() == 0
    try:
        with (
            open(path, "wb") as file,
            tqdm(unit="clip", desc="decoding", disable=None if show_progress else True) as bar,
        ):
            for clip, (audio, _) in decoders.map(contents):
                bar.update()
                if isinstance(audio, Unreadable):
                    unreadable.append((clip.id, audio.reason))
                    _log.warning("%s is skipped: %s", clip.id, audio.reason)
                    continue
                peak = float(np.abs(audio).max())
                if peak == 0:  # silence cannot be scaled to a level
                    unreadable.append((clip.id, "contains only digital silence."))
                    continue
                scaled = audio[0] * np.float32(1 / peak)
                np.rint(scaled * _FULL_SCALE).astype("<i2").tofile(file)
                lengths.append(audio.shape[1])
                levels.append(float(10 * np.log10(np.mean(np.square(scaled, dtype=np.float64)))))
    finally:
        decoders.close()
    total = len(lengths) + len(unreadable)
    if not lengths or len(unreadable) > _MAX_UNREADABLE * total:
        reasons = "; ".join(f"{clip}: {reason}" for clip, reason in unreadable[:3])
        raise DataError(
            f"{len(unreadable)} of {total} clips of process {jax.process_index()} cannot be used, such as {reasons}"
        )
    return {"lengths": lengths, "levels": levels, "unreadable": unreadable}


def crops(decoded: DecodedCorpus, samples: int, config: Data, seed: int) -> grain.IterDataset[Any]:
    """Return an endless dataset of batches (batch, 1, samples): this process's share of each training step.

    An epoch has one crop for each stretch of `samples` samples, shifted at random within its clip. Shorter clips are
    padded with silence. Each crop gets the gain that brings its clip to a random RMS level, or less if it would clip.

    Raises:
        DataError: if processes cannot share a batch equally.
    """
    batch, remainder = divmod(config.batch, jax.process_count())
    if remainder:
        raise DataError(
            f"`data.batch` (={config.batch}) must be divisible by the number of processes (={jax.process_count()})."
        )
    dataset = grain.MapDataset.source(_Stretches(decoded, samples))
    dataset = dataset.seed(seed + jax.process_index()).shuffle().repeat()
    return dataset.random_map(_Crop(decoded, samples, config.rms_db)).batch(batch).to_iter_dataset()


class _Stretches:
    """Stretches of `samples` samples in all clips, as pairs of the clip's index and the stretch's index in the clip."""

    def __init__(self, decoded: DecodedCorpus, samples: int):
        counts = np.maximum(1, decoded.lengths // samples)
        self._ends = np.cumsum(counts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: int) -> tuple[int, int]:
        clip = int(np.searchsorted(self._ends, i, side="right"))
        return clip, i - (int(self._ends[clip - 1]) if clip else 0)


class _Crop(grain.transforms.RandomMap):  # type: ignore[misc]  # grain is untyped, so mypy takes the base for Any
    """Crop audio near a stretch and scale it to a random level."""

    def __init__(self, decoded: DecodedCorpus, samples: int, rms_db: tuple[float, float]):
        self._decoded, self._samples, self._rms_db = decoded, samples, rms_db

    def random_map(self, element: tuple[int, int], rng: np.random.Generator) -> Float[np.ndarray, "1 samples"]:
        clip, stretch = element
        begin, end = self._decoded.bounds[clip : clip + 2]
        max_offset = max(0, end - begin - self._samples)
        offset = min(max_offset, stretch * self._samples + int(rng.integers(self._samples)))
        crop = self._decoded.samples[begin + offset : min(end, begin + offset + self._samples)]
        audio = np.zeros((1, self._samples), np.float32)
        audio[0, : len(crop)] = crop / np.float32(_FULL_SCALE)
        gain_db = rng.uniform(*self._rms_db) - self._decoded.levels[clip]
        return audio * np.float32(min(10 ** (gain_db / 20), 1 / max(np.abs(audio).max(), 1e-5)))


def whole_clips(decoded: DecodedCorpus) -> Iterator[Float[np.ndarray, " samples"]]:
    """Yield each clip in full length, scaled to a peak of 1."""
    for begin, end in zip(decoded.bounds, decoded.bounds[1:], strict=False):
        yield decoded.samples[begin:end] / np.float32(_FULL_SCALE)
