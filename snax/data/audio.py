"""Audio files of any format, rate and number of channels as float32 at a codec's rate.

A file comes from a stranger. It is decoded in blocks and up to a cap, whatever its header says of its length, and
refused where it ends before its header says so: decoders fill what lacks with silence, or say nothing.
"""

import contextlib
import io
import os
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import soundfile
import soxr
from jaxtyping import Float

# What files of audio are called, where a folder has others too.
_OF_LIBSNDFILE = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".caf", ".w64")
SUFFIXES = (*_OF_LIBSNDFILE, ".m4a", ".aac", ".mp4", ".webm", ".mka")
# A day is more than any recording; two hours of silence are half a megabyte of FLAC, and a year would be too.
MAX_SECONDS = 24 * 3600.0
# Below and above there is no audio, but files that make a resampler take all memory.
RATES = range(1000, 768_001)
# Full scale is 1, or 2**31 in floats that once were integers. Decoders make such numbers of damaged files.
LOUDEST = 2.0**31


class AudioError(ValueError):
    """A file that is no audio, is damaged, or is not what its header says."""


def read(
    source: str | os.PathLike[str] | BinaryIO, rate: int, *, separate: bool = False, max_seconds: float = MAX_SECONDS
) -> Float[np.ndarray, "channels samples"]:
    """A file's audio at `rate` Hz: mixed to one channel by their mean, or each `separate`.

    WAV, FLAC, OGG, Opus, MP3, AIFF and what else libsndfile knows; with `snax-codec[av]` M4A, AAC, WebM and what else
    FFmpeg knows. Resampled by soxr in high quality.

    Raises:
        AudioError: for what can't be decoded to its end, is longer than `max_seconds`, has no samples, or NaN.
        OSError: for what can't be read.
    """
    with _opened(source) as file:
        file_rate, channels, blocks = _decoded(file)
        if file_rate not in RATES:
            raise AudioError(f"a sampling rate of {file_rate} Hz is not one of audio, {RATES[0]} to {RATES[-1]}.")
        resampler = soxr.ResampleStream(file_rate, rate, channels if separate else 1, dtype="float32", quality="HQ")
        frames, parts = 0, []
        for block in blocks:
            frames += len(block)
            if frames > max_seconds * file_rate:
                raise AudioError(f"longer than {max_seconds:.0f} seconds.")
            if not (np.abs(block) <= LOUDEST).all():  # NaN is not either
                raise AudioError(f"has NaN, infinity, or more than {LOUDEST:.0f} among its samples.")
            parts.append(resampler.resample_chunk(block if separate else block.mean(axis=1, keepdims=True)))
        if not frames:
            raise AudioError("has no samples.")
        parts.append(resampler.resample_chunk(np.zeros((0, parts[0].shape[1]), np.float32), last=True))
    return np.ascontiguousarray(np.concatenate(parts).T)


def describe(source: str | os.PathLike[str]) -> dict[str, str]:
    """What a file holds, in words; decoded to its end. Raises as `read`."""
    with _opened(source) as file:
        rate, channels, blocks = _decoded(file)
        frames = sum(map(len, blocks))
    return {"audio": f"{frames / rate:.3f} s, {frames} samples at {rate} Hz", "channels": str(channels)}


@contextlib.contextmanager
def _opened(source: str | os.PathLike[str] | BinaryIO) -> Iterator[BinaryIO]:
    if isinstance(source, str | os.PathLike):
        with open(source, "rb") as file:
            yield file
    else:
        yield source


def _decoded(file: BinaryIO) -> tuple[int, int, Iterator[np.ndarray]]:
    """The rate, the number of channels, and blocks (frames, channels) in float32."""
    try:
        sound = soundfile.SoundFile(file)
    except soundfile.LibsndfileError as error:
        file.seek(0)
        return _decoded_by_ffmpeg(file, error.error_string)
    return sound.samplerate, sound.channels, _blocks(sound, file)


def _blocks(sound: soundfile.SoundFile, file: BinaryIO) -> Iterator[np.ndarray]:
    with sound:
        if shortened := _shortened(sound, file):
            raise AudioError(f"is not whole: {shortened}.")
        frames = 0
        try:
            for block in sound.blocks(max(1, 2**18 // sound.channels), dtype="float32", always_2d=True):
                frames += len(block)
                yield block
        except soundfile.LibsndfileError as error:
            raise AudioError(f"can't be decoded after {frames} of {sound.frames} frames: {error}") from None
        if frames != sound.frames:
            raise AudioError(f"is not whole: {frames} of the {sound.frames} frames that its header promises.")


def _shortened(sound: soundfile.SoundFile, file: BinaryIO) -> str | None:
    """How one sees that a file was cut off, in the formats whose decoding does not say so."""
    position, size = file.tell(), file.seek(0, io.SEEK_END)
    try:
        file.seek(max(0, size - 2**17))
        tail = file.read()
        file.seek(0)
        head = file.read(4096)
    finally:
        file.seek(position)
    log = sound.extra_info
    if found := re.search(r"^ *data *: (\d+) \(should be (\d+)\)", log, re.MULTILINE):
        promised, there = map(int, found.groups())
        # A WAV that was written into a pipe promises what 32 bits can count.
        return f"{there} of {promised} bytes of samples" if promised < 2**31 - 2**16 else None
    if "not equal to frame count" in log:  # AIFF
        return "fewer samples than its header promises"
    if sound.format == "OGG":
        return None if _ends_with_last_page(tail) else "its last page is missing"
    if sound.format == "MP3":
        info = max(head.find(b"Xing"), head.find(b"Info"))
        if info >= 0 and int.from_bytes(head[info + 4 : info + 8]) & 3 == 3:  # it has frames and bytes
            promised = int.from_bytes(head[info + 12 : info + 16])
            if size < promised:
                return f"{size} of {promised} bytes"
    return None


def _ends_with_last_page(tail: bytes) -> bool:
    """Whether an Ogg stream ends with a whole page that says it is the last (RFC 3533, section 6)."""
    page = tail[tail.rfind(b"OggS") :]
    if len(page) < 27 or not page[5] & 4:
        return False
    segments = page[26]
    return len(page) >= 27 + segments + sum(page[27 : 27 + segments])


def _decoded_by_ffmpeg(file: BinaryIO, complaint: str) -> tuple[int, int, Iterator[np.ndarray]]:
    try:
        import av
    except ImportError:
        raise AudioError(
            f"no audio that libsndfile knows ({complaint}); for M4A or WebM install 'snax-codec[av]'."
        ) from None
    try:
        container = av.open(file)
        stream = container.streams.audio[0]
    except (av.error.FFmpegError, IndexError):
        raise AudioError(f"no audio that libsndfile ({complaint}) or FFmpeg knows.") from None
    return stream.rate, stream.channels, _frames(container, stream)


def _frames(container: Any, stream: Any) -> Iterator[np.ndarray]:
    import av

    packed = av.AudioResampler(format="flt", layout=stream.layout.name, rate=stream.rate)
    with container:
        frames = 0
        try:
            for frame in container.decode(stream):
                for part in packed.resample(frame):
                    block = part.to_ndarray().reshape(-1, stream.channels)
                    frames += len(block)
                    yield block
        except av.error.FFmpegError as error:
            raise AudioError(f"can't be decoded after {frames} frames: {error}") from None
        promised = stream.duration and float(stream.duration * stream.time_base)
        promised = promised or (container.duration and container.duration / av.time_base)
        # Encoders count some of the silence that they add in front or behind, up to a few packets.
        if promised and frames / stream.rate < promised - 0.2:
            raise AudioError(f"is not whole: {frames / stream.rate:.2f} of {promised:.2f} seconds.")
