"""One command per use: `snax encode`, `decode`, `reconstruct` and `info` for files, `snax extract` for a corpus,
`snax train`, and `snax eval` and `snax report` for what a model does to audio.
"""

import argparse
import contextlib
import functools
import glob
import io
import itertools
import os
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import soundfile
from tqdm import tqdm

from . import compilation_cache, json_text
from .atomic import atomic_write
from .codec.config import PUBLISHED_CONFIGS, SNACConfig
from .codec.inputs import check_clip_codes
from .codec.model import SNAC
from .data import audio
from .data.codes_file import CodesFile
from .data.files import find_files
from .evaluate import command as evaluate
from .extract import command as extract
from .inference.packing import EncodedClip, decode_many, encode_many
from .train import command as train
from .weights import pretrained
from .weights.checkpoint import fingerprint

CODES_SUFFIX, DECODED_SUFFIX = ".codes.safetensors", ".snac.wav"


class RefusedError(Exception):
    """What the user asked for can't be done as asked; the message says why."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit code: 0, 1 if some files failed, 2 if nothing was tried."""
    parsed = _parser().parse_args(arguments)
    compilation_cache.enable()
    try:
        return int(parsed.run(parsed))
    except (RefusedError, ValueError, OSError, ImportError) as error:
        print(f"snax: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("snax: stopped.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="snax", description="The SNAC neural audio codec.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], what: str, model: str | None) -> None:
        sub = commands.add_parser(name, help=what, description=what)
        sub.set_defaults(run=run)
        sub.add_argument("inputs", nargs="+", metavar="INPUT", help="files, folders (all that is in them) or patterns")
        if name == "info":
            return
        sub.add_argument("-o", "--out", type=Path, metavar="FOLDER", help="where to write (default: beside the input)")
        sub.add_argument("-f", "--force", action="store_true", help="write over what is there")
        said = model or "the one that made the codes"
        sub.add_argument("-m", "--model", default=model, help=f"name, folder or hub id (default: {said})")
        if name != "decode":
            sub.add_argument("--channels", choices=["mix", "separate"], default="mix", help="default: mix to mono")

    command("encode", _encode, f"Audio to codes: a.wav to a{CODES_SUFFIX}.", "snac_24khz")
    command("decode", _decode, f"Codes to audio: a{CODES_SUFFIX} to a{DECODED_SUFFIX}.", None)
    command("reconstruct", _reconstruct, f"Audio to codes and back: a.wav to a{DECODED_SUFFIX}.", "snac_24khz")
    command("info", _info, "What is known about models, audio files and files of codes.", None)
    for room in (extract, train, evaluate):
        room.add(commands)
    return parser


# Each input and where what comes of it goes; `-` is standard input and output.
_Plan = list[tuple[Path, Path]]
PIPE = Path("-")


def _encode(arguments: argparse.Namespace) -> int:
    plan = _plan(arguments, audio.SUFFIXES, CODES_SUFFIX)
    model = pretrained.load(arguments.model)
    made_by = fingerprint(model)

    def write(path: Path, clips: list[EncodedClip]) -> None:
        codes = [np.stack(level) for level in zip(*(clip.codes for clip in clips), strict=True)]
        CodesFile(codes, arguments.model, made_by, model.config.sampling_rate, clips[0].samples or 0).write(path)

    return _each(
        plan, lambda source: _channels(source, arguments, model), lambda clips: encode_many(model, clips), write
    )


def _decode(arguments: argparse.Namespace) -> int:
    plan = _plan(arguments, [CODES_SUFFIX], DECODED_SUFFIX)
    with _whole(plan[0][0]) as first:
        name = arguments.model or CodesFile.read(first).model
    model = pretrained.load(name)
    ours = fingerprint(model)

    def read(source: Path) -> list[EncodedClip]:
        with _whole(source) as path:
            file = CodesFile.read(path)
        if file.fingerprint != ours:
            raise ValueError(
                f"its codes were made by {file.model} ({file.fingerprint[:12]}), not {name} ({ours[:12]})."
            )
        clips = [EncodedClip(codes, file.samples) for codes in zip(*file.codes, strict=True)]
        for i, clip in enumerate(clips):
            check_clip_codes(*clip, i, model.config)
        return clips

    return _each(plan, read, lambda clips: decode_many(model, clips), _wav_writer(model))


def _reconstruct(arguments: argparse.Namespace) -> int:
    plan = _plan(arguments, audio.SUFFIXES, DECODED_SUFFIX)
    model = pretrained.load(arguments.model)

    def round_trip(clips: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        return decode_many(model, encode_many(model, clips))

    return _each(plan, lambda source: _channels(source, arguments, model), round_trip, _wav_writer(model))


def _channels(source: Path, arguments: argparse.Namespace, model: SNAC) -> list[np.ndarray]:
    file = io.BytesIO(_standard_input()) if source == PIPE else source
    return list(audio.read(file, model.config.sampling_rate, separate=arguments.channels == "separate"))


def _wav_writer(model: SNAC) -> Callable[[Path, list[np.ndarray]], None]:
    def write(path: Path, channels: list[np.ndarray]) -> None:
        soundfile.write(path, np.stack(channels, axis=1), model.config.sampling_rate, format="WAV", subtype="PCM_16")

    return write


def _each(
    plan: _Plan,
    read: Callable[[Path], list[Any]],
    run: Callable[[Iterator[Any]], Iterator[Any]],
    write: Callable[[Path, list[Any]], None],
) -> int:
    """Runs all files' clips together and writes what comes of them; one that can't be read does not stop the rest."""
    failures, waiting = 0, deque[tuple[Path, Path, int]]()

    def clips() -> Iterator[Any]:
        nonlocal failures
        for source, target in plan:
            try:
                parts = read(source)
            except (ValueError, OSError) as error:
                failures += 1
                bar.update()
                bar.write(f"snax: {source}: {error}", file=sys.stderr)
                continue
            waiting.append((source, target, len(parts)))
            yield from parts

    with tqdm(total=len(plan), unit="file", disable=None) as bar:
        results = run(clips())
        for first in results:
            source, target, count = waiting.popleft()
            with _output(target) as path:
                write(path, [first, *itertools.islice(results, count - 1)])
            bar.update()
            bar.write(f"{source} -> {target}", file=sys.stderr)
    return int(failures > 0)


def _plan(arguments: argparse.Namespace, suffixes: Sequence[str], suffix: str) -> _Plan:
    """All inputs and their outputs. Refuses what would overwrite anything, before anything is done."""
    plan: _Plan = []
    missing: list[str] = []
    for argument in arguments.inputs:
        if argument == "-":
            plan.append((PIPE, PIPE))
            continue
        found = [] if "://" in argument else list(find_files(argument, suffixes))
        if not found and not Path(argument).exists() and not glob.has_magic(argument):
            missing.append(argument)
        for path, name, _ in found:
            file = Path(path if os.path.isabs(argument) else os.path.relpath(path))
            if file.name.endswith(DECODED_SUFFIX) and Path(argument).is_dir():
                continue  # made by an earlier call
            folder = file.parent if arguments.out is None else arguments.out / Path(name).parent
            plan.append((file, folder / (_stem(file, suffixes) + suffix)))
    if missing:
        raise RefusedError(f"not there: {', '.join(missing)}.")
    if not plan:
        raise RefusedError(f"no files with {', '.join(suffixes)} in {' '.join(arguments.inputs)}.")
    for target, count in Counter(target for _, target in plan).items():
        if count > 1:
            sources = ", ".join(str(source) for source, other in plan if other == target)
            raise RefusedError(f"{sources} would all be written to {target}: name them one by one, with --out.")
    there = [str(target) for _, target in plan if target != PIPE and target.exists()]
    if there and not arguments.force:
        raise RefusedError(
            f"already there, and --force was not given: {', '.join(there[:5])}{' ...' * (len(there) > 5)}"
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
def _whole(source: Path) -> Iterator[Path]:
    """A file that can be opened by its name, of standard input too."""
    if source != PIPE:
        yield source
        return
    with tempfile.NamedTemporaryFile() as file:
        file.write(_standard_input())
        file.flush()
        yield Path(file.name)


@contextlib.contextmanager
def _output(target: Path) -> Iterator[Path]:
    """A file to write that then takes the place of `target`, or goes to standard output."""
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


def _info(arguments: argparse.Namespace) -> int:
    failures = 0
    for name in arguments.inputs:
        try:
            facts = _facts(name)
        except (ValueError, OSError) as error:
            failures += 1
            print(f"snax: {name}: {error}", file=sys.stderr)
            continue
        print(name)
        for what, value in facts:
            print(f"  {what:<18}{value}")
    return int(failures > 0)


def _facts(name: str) -> list[tuple[str, Any]]:
    if name in pretrained.PUBLISHED:
        published = pretrained.PUBLISHED[name]
        return [
            ("model", f"{published.repo_id} on the hub, revision {published.revision}"),
            *_config_facts(PUBLISHED_CONFIGS[name]),
        ]
    if os.path.exists(os.path.join(name, "_snax")):
        return _extraction_facts(Path(name))
    if os.path.isdir(name):
        model = pretrained.load(name)
        count = sum(parameter.size for parameter in jax.tree.leaves(model))
        return [("model", f"{count:,} parameters, fingerprint {fingerprint(model)}"), *_config_facts(model.config)]
    if name.lower().endswith(".safetensors"):
        file = CodesFile.read(name)
        return [
            ("codes of", f"{file.model}, fingerprint {file.fingerprint}"),
            ("audio", f"{file.samples / file.sampling_rate:.3f} s, {file.samples} samples at {file.sampling_rate} Hz"),
            ("codes", " + ".join(str(level.shape[1]) for level in file.codes) + f" in {len(file.codes[0])} channels"),
        ]
    facts = audio.describe(name)
    return list(facts.items())


def _extraction_facts(folder: Path) -> list[tuple[str, Any]]:
    try:
        made_with = dict(json_text.parse((folder / "_snax" / "job.json").read_bytes()))
        try:
            sums = dict(json_text.parse((folder / "_SUCCESS").read_bytes()))
            sums["shards"] = len(sums["shards"])
        except FileNotFoundError:
            done = len(list(folder.glob("tokens-*.parquet")))
            sums = {"finished": f"no: {done} shards so far; `snax extract` goes on"}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"what the extraction in {folder} says of itself is damaged: {error}") from None
    if "tokens" in sums:
        sums["codes"] = sums.pop("tokens")  # `tokens` says which column of them was asked for
    return [*sums.items(), *made_with.items()]


def _config_facts(config: SNACConfig) -> list[tuple[str, Any]]:
    return [
        ("sampling rate", f"{config.sampling_rate} Hz"),
        ("codes", f"{len(config.vq_strides)} levels of {config.codebook_size}, strides {config.vq_strides}"),
        ("codes a second", ", ".join(f"{rate:.1f}" for rate in config.code_rates)),
        ("bit rate", f"{config.bitrate / 1000:.2f} kbps"),
        ("latent frame", f"{config.hop_length} samples, {1000 / config.frame_rate:.1f} ms"),
        ("attention window", f"{config.attn_window_size} frames" if config.attn_window_size else "none"),
    ]


if __name__ == "__main__":
    sys.exit(main())
