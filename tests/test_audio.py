"""Audio files of every kind, whole and damaged."""

import io
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from helpers.recordings import DATA

from snax.data import audio

RATE = 24_000
# Name, soundfile's arguments, and how far the audio may be off: rounding to so many bits, or what the codec loses.
FORMATS = {
    "float.wav": ({"subtype": "FLOAT"}, 1e-3),
    "16.wav": ({"subtype": "PCM_16"}, 1e-3),
    "24.wav": ({"subtype": "PCM_24"}, 1e-3),
    "8.wav": ({"subtype": "PCM_U8"}, 1e-2),
    "a.flac": ({}, 1e-3),
    "a.aiff": ({}, 1e-3),
    "a.ogg": ({}, 0.05),
    "a.mp3": ({}, 0.05),
    "a.opus": ({"format": "OGG", "subtype": "OPUS"}, 0.05),
}


def tone(rate: int, seconds: float = 2.0) -> np.ndarray:
    """300 Hz in one channel and 500 Hz in the other, (samples, 2)."""
    time = np.arange(round(seconds * rate)) / rate
    return 0.4 * np.sin(2 * np.pi * np.stack([300 * time, 500 * time], axis=1)).astype(np.float32)


def written(path: Path, samples: np.ndarray, rate: int, **how: str) -> Path:
    soundfile.write(path, samples, rate, **how)
    return path


@pytest.mark.parametrize("rate", [16_000, 48_000])
@pytest.mark.parametrize("name", FORMATS)
def test_formats_and_rates(name: str, rate: int, tmp_path: Path) -> None:
    how, off = FORMATS[name]
    path = written(tmp_path / name, tone(rate), rate, **how)
    separate = audio.read(path, RATE, separate=True)
    expected = tone(RATE).T
    assert separate.dtype == np.float32
    assert separate.shape == expected.shape
    # The ends apart, where a resampler's filter sees beyond the file.
    np.testing.assert_allclose(separate[:, 2400:-2400], expected[:, 2400:-2400], rtol=0, atol=off)
    np.testing.assert_allclose(audio.read(path, RATE), separate.mean(axis=0, keepdims=True), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(audio.read(io.BytesIO(path.read_bytes()), RATE), audio.read(path, RATE))


@pytest.mark.parametrize("name", ["a.m4a", "a.webm"])
def test_formats_of_ffmpeg(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac" if name == "a.m4a" else "libopus", rate=48_000, layout="stereo")
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(tone(48_000).T), format="fltp", layout="stereo")
        frame.rate = 48_000
        container.mux([packet for part in (frame, None) for packet in stream.encode(part)])
    separate = audio.read(path, RATE, separate=True)
    assert abs(separate.shape[1] - 2 * RATE) < 0.1 * RATE  # encoders add some silence
    # Two tones, each in its channel.
    spectrum = np.abs(np.fft.rfft(separate[:, :RATE]))
    np.testing.assert_array_equal(spectrum.argmax(axis=1), [300, 500])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(audio.AudioError):
        audio.read(path, RATE)


def test_the_extension_does_not_matter(tmp_path: Path) -> None:
    path = written(tmp_path / "a.flac", tone(RATE), RATE)
    np.testing.assert_array_equal(
        audio.read(path.rename(tmp_path / "a.txt"), RATE)[0], audio.read(path.with_suffix(".txt"), RATE)[0]
    )


@pytest.mark.parametrize("part", [0.97, 0.6, 0.05])
@pytest.mark.parametrize("name", FORMATS)
def test_truncated(name: str, part: float, tmp_path: Path) -> None:
    path = written(tmp_path / name, soundfile.read(DATA / "speech_3s.wav")[0], 16_000, **FORMATS[name][0])
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(audio.AudioError, match="not whole|can't be decoded|no audio"):
        audio.read(path, RATE)


@pytest.mark.parametrize("content", [b"", b"not audio at all", bytes(1000), np.random.default_rng(0).bytes(100_000)])
def test_no_audio(content: bytes) -> None:
    with pytest.raises(audio.AudioError, match="no audio"):
        audio.read(io.BytesIO(content), RATE)


def test_damaged(tmp_path: Path) -> None:
    content = bytearray(written(tmp_path / "a.flac", tone(RATE), RATE).read_bytes())
    content[len(content) // 2] ^= 0x55
    with pytest.raises(audio.AudioError, match="can't be decoded after"):
        audio.read(io.BytesIO(content), RATE)


def test_longer_than_allowed(tmp_path: Path) -> None:
    silence = written(tmp_path / "a.flac", np.zeros(3 * RATE), RATE)
    assert audio.read(silence, RATE, max_seconds=3.0).shape == (1, 3 * RATE)
    with pytest.raises(audio.AudioError, match="longer than 2 seconds"):
        audio.read(silence, RATE, max_seconds=2.0)


def test_strange_headers(tmp_path: Path) -> None:
    for samples, rate, message in (
        (np.zeros(100), 5, "sampling rate of 5 Hz"),
        (np.zeros(0), RATE, "no samples"),
        (np.array([0, np.nan]), RATE, "NaN"),
        (np.array([0, -np.inf]), RATE, "NaN, infinity, or"),
        (np.array([0, 1e20]), RATE, "or more than 2147483648 among"),
    ):
        path = written(tmp_path / "a.wav", samples, rate, subtype="FLOAT")
        with pytest.raises(audio.AudioError, match=message):
            audio.read(path, RATE)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        audio.read(tmp_path / "a.wav", RATE)
