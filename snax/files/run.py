"""Encode and decode files: all clips of a command share packed rows, and one bad file does not stop the others."""

import contextlib
import functools
import glob
import io
import itertools
import logging
import os
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from tqdm import tqdm

from .. import compilation_cache
from ..atomic import atomic_write
from ..codec.inputs import check_clip_codes
from ..codec.model import SNAC
from ..data import audio
from ..data.codes_file import CodesFile
from ..data.files import find_files
from ..inference.packing import EncodedClip, decode_many, encode_many
from ..options import Channels, Output
from ..weights import pretrained
from ..weights.checkpoint import fingerprint

_log = logging.getLogger(__name__)

CODES_SUFFIX, DECODED_SUFFIX = ".codes.safetensors", ".snac.wav"

# Standard input as a source, standard output as a target.
PIPE = Path("-")

# Each input file with its output file.
_Plan = list[tuple[Path, Path]]


def encode(inputs: Sequence[str], output: Output, model_name: str, channels: Channels) -> int:
    """Encode audio files. Returns 1 if a file could not be read, else 0.

    Raises:
        ValueError: if an input does not exist, or an output exists and `output.force` is False.
    """
    plan = _plan(inputs, output, audio.SUFFIXES, CODES_SUFFIX)
    model = _load(model_name)
    if model.config.codebook_size > 2**16:
        raise ValueError(
            f"`codebook_size` (={model.config.codebook_size}) must be at most {2**16}: files store codes in 16 bits."
        )
    model_fingerprint = fingerprint(model)

    def write(path: Path, clips: list[EncodedClip]) -> None:
        codes = [np.stack(level) for level in zip(*(clip.codes for clip in clips), strict=True)]
        samples = clips[0].samples or 0
        CodesFile(codes, model_name, model_fingerprint, model.config.sampling_rate, samples).write(path)

    return _process(plan, _audio_reader(model, channels), lambda clips: encode_many(model, clips), write)


def decode(inputs: Sequence[str], output: Output, model_name: str | None) -> int:
    """Decode files of codes. Returns and raises like `encode`."""
    plan = _plan(inputs, output, [CODES_SUFFIX], DECODED_SUFFIX)
    if model_name is None:
        with _as_file(plan[0][0]) as first:
            model_name = CodesFile.read(first).model
    model = _load(model_name)
    model_fingerprint = fingerprint(model)

    def read(source: Path) -> list[EncodedClip]:
        with _as_file(source) as path:
            file = CodesFile.read(path)
        if file.fingerprint != model_fingerprint:
            raise ValueError(
                f"the codes were made by the model {file.model} ({file.fingerprint[:12]}), which is not {model_name} "
                f"({model_fingerprint[:12]})."
            )
        clips = [EncodedClip(codes, file.samples) for codes in zip(*file.codes, strict=True)]
        for i, clip in enumerate(clips):
            check_clip_codes(*clip, i, model.config)
        return clips

    return _process(plan, read, lambda clips: decode_many(model, clips), _wav_writer(model))


def reconstruct(inputs: Sequence[str], output: Output, model_name: str, channels: Channels) -> int:
    """Encode and decode audio files. Returns and raises like `encode`."""
    plan = _plan(inputs, output, audio.SUFFIXES, DECODED_SUFFIX)
    model = _load(model_name)

    def round_trip(clips: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        return decode_many(model, encode_many(model, clips))

    return _process(plan, _audio_reader(model, channels), round_trip, _wav_writer(model))


def _load(model_name: str) -> SNAC:
    compilation_cache.enable()
    return pretrained.load(model_name)


def _audio_reader(model: SNAC, channels: Channels) -> Callable[[Path], list[np.ndarray]]:
    def read(source: Path) -> list[np.ndarray]:
        file = io.BytesIO(_standard_input()) if source == PIPE else source
        return list(audio.read(file, model.config.sampling_rate, separate=channels == "separate"))

    return read


def _wav_writer(model: SNAC) -> Callable[[Path, list[np.ndarray]], None]:
    def write(path: Path, channels: list[np.ndarray]) -> None:
        soundfile.write(path, np.stack(channels, axis=1), model.config.sampling_rate, format="WAV", subtype="PCM_16")

    return write


def _process(
    plan: _Plan,
    read: Callable[[Path], list[Any]],
    run: Callable[[Iterator[Any]], Iterator[Any]],
    write: Callable[[Path, list[Any]], None],
) -> int:
    """Read every source, run the codec on the clips of all files together, and write the results.

    Args:
        plan: sources and targets.
        read: returns the clips of a source, one for each channel.
        run: maps clips to results, in order.
        write: writes the results of one source to a path.
    """
    failures, waiting = 0, deque[tuple[Path, Path, int]]()

    def clips() -> Iterator[Any]:
        nonlocal failures
        for source, target in plan:
            try:
                channels = read(source)
            except (ValueError, OSError) as error:
                failures += 1
                bar.update()
                _log.error("%s: %s", source, error)
                continue
            waiting.append((source, target, len(channels)))
            yield from channels

    with tqdm(total=len(plan), unit="file", disable=None) as bar:
        results = run(clips())
        for first in results:
            source, target, count = waiting.popleft()
            with _output_file(target) as path:
                write(path, [first, *itertools.islice(results, count - 1)])
            bar.update()
            _log.info("%s -> %s", source, target)
    return int(failures > 0)


def _plan(inputs: Sequence[str], output: Output, suffixes: Sequence[str], suffix: str) -> _Plan:
    """Find all input files and name their outputs, or raise ValueError before anything is written."""
    plan: _Plan = []
    missing: list[str] = []
    for argument in inputs:
        if argument == "-":
            plan.append((PIPE, PIPE))
            continue
        files = [] if "://" in argument else list(find_files(argument, suffixes))
        if not files and not Path(argument).exists() and not glob.has_magic(argument):
            missing.append(argument)
        for path, name, _ in files:
            file = Path(path if os.path.isabs(argument) else os.path.relpath(path))
            if file.name.endswith(DECODED_SUFFIX) and Path(argument).is_dir():
                continue  # the output of an earlier command
            folder = file.parent if output.out is None else output.out / Path(name).parent
            plan.append((file, folder / (_stem(file, suffixes) + suffix)))
    if missing:
        raise ValueError(f"no such file or folder: {', '.join(missing)}.")
    if not plan:
        raise ValueError(f"no files with {', '.join(suffixes)} in {' '.join(inputs)}.")
    for target, count in Counter(target for _, target in plan).items():
        if count > 1:
            sources = ", ".join(str(source) for source, other in plan if other == target)
            raise ValueError(f"{sources} would all be written to {target}. Process them one by one, with --out.")
    existing = [str(target) for _, target in plan if target != PIPE and target.exists()]
    if existing and not output.force:
        raise ValueError(
            f"outputs exist: {', '.join(existing[:5])}{' ...' * (len(existing) > 5)}. Pass --force to overwrite them."
        )
    return plan


def _stem(path: Path, suffixes: Sequence[str]) -> str:
    """The name without its suffix, which may have two dots."""
    known = (path.name[: -len(suffix)] for suffix in suffixes if path.name.lower().endswith(suffix))
    return next(known, path.stem)


@functools.cache
def _standard_input() -> bytes:
    return sys.stdin.buffer.read()


@contextlib.contextmanager
def _as_file(source: Path) -> Iterator[Path]:
    """The source itself, or a temporary file with the content of standard input."""
    if source != PIPE:
        yield source
        return
    with tempfile.NamedTemporaryFile() as file:
        file.write(_standard_input())
        file.flush()
        yield Path(file.name)


@contextlib.contextmanager
def _output_file(target: Path) -> Iterator[Path]:
    """A temporary file that then replaces `target`, or is copied to standard output."""
    if target != PIPE:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(target) as temporary:
            yield temporary
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "output")
        yield path
        sys.stdout.buffer.write(path.read_bytes())
        sys.stdout.buffer.flush()
