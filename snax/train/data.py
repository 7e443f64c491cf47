"""Training audio: decoded once into a memory-mapped file, then cropped at random by Grain.

Decoding needs the whole clip, training a second of it at a time. So each process decodes its part of the corpus before
training starts, to 16 bits a sample at the codec's rate (100 hours at 24 kHz take 17 GB).
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

# Clips that one process takes at a time, so that all get clips from everywhere in the corpus.
_TOGETHER = 16
# More clips than this fraction that can't be read, and something is wrong with more than the clips.
_MOST_UNREADABLE = 0.1
_FULL_SCALE = 2**15 - 1


class DataError(ValueError):
    """Audio that nothing can be trained on."""


class Stored(NamedTuple):
    """Decoded clips, one after the other, each as loud as 16 bits allow; where each begins and the last ends; and the
    level that each has in the file, in dB of its root mean square to full scale."""

    samples: np.ndarray
    bounds: np.ndarray
    levels: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.bounds)


def store(
    inputs: Sequence[str], rate: int, folder: Path, decoders: int, process: int = 0, processes: int = 1
) -> Stored:
    """One process's part of a corpus, decoded into `folder`, or what an earlier run on the same left there.

    Raises:
        CorpusError: if the inputs make no corpus.
        DataError: if too many clips can't be read, or this process has none.
        OSError: for what can't be read or written.
    """
    plan = corpus.plan(inputs, _TOGETHER)
    made_of = {
        "plan": corpus.digest(plan),
        "rate": rate,
        "process": [process, processes],
    }
    index, audio = folder / "clips.json", folder / "audio.int16"
    found = json.loads(index.read_text()) if index.exists() else {}
    if found.get("made_of") != made_of:
        folder.mkdir(parents=True, exist_ok=True)
        sources = [source for shard in plan[process::processes] for source in shard]
        described = _decode((pair for source in sources for pair in clips(source)), rate, audio, decoders)
        found = {"made_of": made_of, **described}
        with atomic_write(index) as temporary:
            temporary.write_text(json.dumps(found))
    bounds = np.cumsum([0, *found["lengths"]])
    samples = np.memmap(audio, np.int16, mode="r", shape=(int(bounds[-1]),))
    return Stored(samples, bounds, np.array(found["levels"]))


def _decode(contents: Iterable[tuple[Clip, Any]], rate: int, path: Path, count: int) -> dict[str, list[Any]]:
    lengths, levels, unreadable = list[int](), list[float](), list[tuple[str, str]]()
    decoders = DecoderPool(count, rate, separate=False, max_seconds=24 * 3600)
    first = jax.process_index() == 0
    try:
        with open(path, "wb") as file, tqdm(unit="clip", desc="decoding", disable=None if first else True) as bar:
            for clip, (audio, _) in decoders.map(contents):
                bar.update()
                if isinstance(audio, Unreadable):
                    unreadable.append((clip.id, audio.reason))
                    _log.warning("%s is left out: %s", clip.id, audio.reason)
                    continue
                peak = float(np.abs(audio).max())
                if peak == 0:  # silence has no level
                    unreadable.append((clip.id, "is digital silence."))
                    continue
                scaled = audio[0] * np.float32(1 / peak)
                np.rint(scaled * _FULL_SCALE).astype("<i2").tofile(file)
                lengths.append(audio.shape[1])
                levels.append(float(10 * np.log10(np.mean(np.square(scaled, dtype=np.float64)))))
    finally:
        decoders.close()
    total = len(lengths) + len(unreadable)
    if not lengths or len(unreadable) > _MOST_UNREADABLE * total:
        reasons = "; ".join(f"{clip}: {reason}" for clip, reason in unreadable[:3])
        raise DataError(f"{len(unreadable)} of {total} clips of process {jax.process_index()} can't be used: {reasons}")
    return {"lengths": lengths, "levels": levels, "unreadable": unreadable}


def crops(stored: Stored, samples: int, config: Data, seed: int) -> grain.IterDataset[Any]:
    """An endless dataset of batches (batch, 1, samples): this process's share of each step.

    An epoch has each stretch of `samples` once, shifted at random within its clip; shorter clips are padded with
    silence. Each is scaled to a random RMS level, or lower where it would clip.
    """
    batch, rest = divmod(config.batch, jax.process_count())
    if rest:
        raise DataError(f"a batch of {config.batch} can't be divided among {jax.process_count()} processes.")
    dataset = grain.MapDataset.source(_Stretches(stored, samples))
    dataset = dataset.seed(seed + jax.process_index()).shuffle().repeat()
    return dataset.random_map(_Crop(stored, samples, config.rms_db)).batch(batch).to_iter_dataset()


class _Stretches:
    """Where crops are: each clip's number and, of each of its stretches, the number."""

    def __init__(self, stored: Stored, samples: int):
        counts = np.maximum(1, stored.lengths // samples)
        self._ends = np.cumsum(counts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: int) -> tuple[int, int]:
        clip = int(np.searchsorted(self._ends, i, side="right"))
        return clip, i - (int(self._ends[clip - 1]) if clip else 0)


class _Crop(grain.transforms.RandomMap):  # type: ignore[misc]  # grain has no types: to mypy this derives from Any
    def __init__(self, stored: Stored, samples: int, rms_db: tuple[float, float]):
        self._stored, self._samples, self._rms_db = stored, samples, rms_db

    def random_map(self, element: tuple[int, int], rng: np.random.Generator) -> Float[np.ndarray, "1 samples"]:
        clip, stretch = element
        begin, end = self._stored.bounds[clip : clip + 2]
        room = max(0, end - begin - self._samples)
        shift = min(room, stretch * self._samples + int(rng.integers(self._samples)))
        part = self._stored.samples[begin + shift : min(end, begin + shift + self._samples)]
        audio = np.zeros((1, self._samples), np.float32)
        audio[0, : len(part)] = part / np.float32(_FULL_SCALE)
        decibels = rng.uniform(*self._rms_db) - self._stored.levels[clip]
        return audio * np.float32(min(10 ** (decibels / 20), 1 / max(np.abs(audio).max(), 1e-5)))


def whole_clips(stored: Stored) -> Iterator[Float[np.ndarray, " samples"]]:
    """Each clip as it was decoded, at 16 bits of its own peak."""
    for begin, end in zip(stored.bounds, stored.bounds[1:], strict=False):
        yield stored.samples[begin:end] / np.float32(_FULL_SCALE)
