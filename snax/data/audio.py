"""Read audio files of any format, sampling rate and channel count as float32 at a codec's rate.

Files are untrusted. They are decoded in blocks up to a maximum length, whatever length the header declares. Truncated
files are rejected: decoders pad them with silence, or return less audio without an error.
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

# The suffixes by which audio files are found in a folder.
_LIBSNDFILE_SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".caf", ".w64")
SUFFIXES = (*_LIBSNDFILE_SUFFIXES, ".m4a", ".aac", ".mp4", ".webm", ".mka")
# A day is longer than any recording. A limit is needed because silence compresses well: two hours of it are half a
# megabyte of FLAC.
MAX_SECONDS = 24 * 3600.0
# Sampling rates in Hz. Other rates do not occur in practice and can make the resampler use all memory.
SAMPLING_RATES = range(1000, 768_001)
# Full scale is 1, or 2**31 in float files that were converted from integers without scaling. Decoders return larger
# values for corrupt files.
MAX_AMPLITUDE = 2.0**31


class AudioError(ValueError):
    """Raised for a file that is not audio, is corrupt, or does not match its header."""


def read(
    source: str | os.PathLike[str] | BinaryIO, rate: int, *, separate: bool = False, max_seconds: float = MAX_SECONDS
) -> Float[np.ndarray, "channels samples"]:
    """Read an audio file and resample it with soxr's high quality preset.

    Reads WAV, FLAC, OGG, Opus, MP3, AIFF and the other formats of libsndfile. With the extra `av`, also M4A, AAC, WebM
    and the other formats of FFmpeg.

    Args:
        source: a path, or a file that is open for reading bytes.
        rate: the sampling rate of the result, in Hz.
        separate: return all channels instead of their mean.
        max_seconds: the maximum length of the audio.

    Returns:
        float32 samples, (channels, samples). One channel unless `separate`.

    Raises:
        AudioError: if the file cannot be decoded completely, is longer than `max_seconds`, or has no samples or invalid
            samples, such as NaN.
        OSError: if the file cannot be read.
    """
    with _open(source) as file:
        file_rate, channels, blocks = _decode(file)
        if file_rate not in SAMPLING_RATES:
            raise AudioError(
                f"the sampling rate (={file_rate} Hz) must be between {SAMPLING_RATES[0]} and {SAMPLING_RATES[-1]} Hz."
            )
        resampler = soxr.ResampleStream(file_rate, rate, channels if separate else 1, dtype="float32", quality="HQ")
        frames, parts = 0, []
        for block in blocks:
            frames += len(block)
            if frames > max_seconds * file_rate:
                raise AudioError(f"longer than {max_seconds:.0f} seconds.")
            if not (np.abs(block) <= MAX_AMPLITUDE).all():  # also false for NaN
                raise AudioError(f"samples are NaN, infinite, or larger than {MAX_AMPLITUDE:.0f}.")
            parts.append(resampler.resample_chunk(block if separate else block.mean(axis=1, keepdims=True)))
        if not frames:
            raise AudioError("the file has no samples.")
        parts.append(resampler.resample_chunk(np.zeros((0, parts[0].shape[1]), np.float32), last=True))
    return np.ascontiguousarray(np.concatenate(parts).T)


def describe(source: str | os.PathLike[str]) -> dict[str, str]:
    """Decode a file completely and return its length, sampling rate and channels as text, for `snax info`.

    Raises:
        AudioError: if the file cannot be decoded completely.
        OSError: if the file cannot be read.
    """
    with _open(source) as file:
        rate, channels, blocks = _decode(file)
        frames = sum(map(len, blocks))
    return {"audio": f"{frames / rate:.3f} s, {frames} samples at {rate} Hz", "channels": str(channels)}


@contextlib.contextmanager
def _open(source: str | os.PathLike[str] | BinaryIO) -> Iterator[BinaryIO]:
    if isinstance(source, str | os.PathLike):
        with open(source, "rb") as file:
            yield file
    else:
        yield source


def _decode(file: BinaryIO) -> tuple[int, int, Iterator[np.ndarray]]:
    """Return the sampling rate, the number of channels, and an iterator of float32 blocks, (frames, channels)."""
    try:
        sound = soundfile.SoundFile(file)
    except soundfile.LibsndfileError as error:
        file.seek(0)
        return _decode_with_ffmpeg(file, error.error_string)
    return sound.samplerate, sound.channels, _libsndfile_blocks(sound, file)


def _libsndfile_blocks(sound: soundfile.SoundFile, file: BinaryIO) -> Iterator[np.ndarray]:
    with sound:
        if truncation := _find_truncation(sound, file):
            raise AudioError(f"the file is truncated: {truncation}.")
        frames = 0
        try:
            for block in sound.blocks(max(1, 2**18 // sound.channels), dtype="float32", always_2d=True):
                frames += len(block)
                yield block
        except soundfile.LibsndfileError as error:
            raise AudioError(f"cannot be decoded after {frames} of {sound.frames} frames: {error}") from None
        if frames != sound.frames:
            raise AudioError(f"the file is truncated: {frames} frames, but its header declares {sound.frames}.")


def _find_truncation(sound: soundfile.SoundFile, file: BinaryIO) -> str | None:
    """Return how a file is truncated, or None. For formats in which the decoder does not report truncation."""
    position, size = file.tell(), file.seek(0, io.SEEK_END)
    try:
        file.seek(max(0, size - 2**17))
        tail = file.read()
        file.seek(0)
        head = file.read(4096)
    finally:
        file.seek(position)
    log = sound.extra_info
    if match := re.search(r"^ *data *: (\d+) \(should be (\d+)\)", log, re.MULTILINE):
        declared, actual = map(int, match.groups())
        # The header of a WAV file that was written to a pipe declares the largest size that fits into 32 bits.
        return f"{actual} of {declared} bytes of samples" if declared < 2**31 - 2**16 else None
    if "not equal to frame count" in log:  # AIFF
        return "fewer samples than its header declares"
    if sound.format == "OGG":
        return None if _has_last_page(tail) else "its last page is missing"
    if sound.format == "MP3":
        info = max(head.find(b"Xing"), head.find(b"Info"))
        # Flags 1 and 2: the header has the numbers of frames and of bytes.
        if info >= 0 and int.from_bytes(head[info + 4 : info + 8]) & 3 == 3:
            declared = int.from_bytes(head[info + 12 : info + 16])
            if size < declared:
                return f"{size} of {declared} bytes"
    return None


def _has_last_page(tail: bytes) -> bool:
    """Return whether an Ogg stream ends with a complete page that has the end-of-stream flag (RFC 3533, section 6)."""
    page = tail[tail.rfind(b"OggS") :]
    if len(page) < 27 or not page[5] & 4:
        return False
    segments = page[26]
    return len(page) >= 27 + segments + sum(page[27 : 27 + segments])


def _decode_with_ffmpeg(file: BinaryIO, libsndfile_error: str) -> tuple[int, int, Iterator[np.ndarray]]:
    try:
        import av
    except ImportError:
        raise AudioError(
            f"not an audio file that libsndfile can read ({libsndfile_error}). To read M4A, AAC and WebM, run "
            "pip install '.[av]' in a clone of snax."
        ) from None
    try:
        container = av.open(file)
        stream = container.streams.audio[0]
    except (av.error.FFmpegError, IndexError):
        raise AudioError(f"not an audio file that libsndfile ({libsndfile_error}) or FFmpeg can read.") from None
    return stream.rate, stream.channels, _ffmpeg_blocks(container, stream)


def _ffmpeg_blocks(container: Any, stream: Any) -> Iterator[np.ndarray]:
    import av

    to_float = av.AudioResampler(format="flt", layout=stream.layout.name, rate=stream.rate)
    with container:
        frames = 0
        try:
            for frame in container.decode(stream):
                for part in to_float.resample(frame):
                    block = part.to_ndarray().reshape(-1, stream.channels)
                    frames += len(block)
                    yield block
        except av.error.FFmpegError as error:
            raise AudioError(f"cannot be decoded after {frames} frames: {error}") from None
        declared = stream.duration and float(stream.duration * stream.time_base)
        declared = declared or (container.duration and container.duration / av.time_base)
        # Encoders add up to a few packets of silence at both ends, and some include it in the declared duration.
        if declared and frames / stream.rate < declared - 0.2:
            raise AudioError(f"the file is truncated: {frames / stream.rate:.2f} of {declared:.2f} seconds.")
