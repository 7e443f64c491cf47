"""Reading of audio files in all formats, and rejection of corrupt files."""

import io
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from helpers.recordings import DATA

from snax.data import audio

RATE = 24_000
# Name: soundfile's arguments, and the tolerance for the error of quantization or lossy compression.
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
    """Make 300 Hz in one channel and 500 Hz in the other, (samples, 2)."""
    time = np.arange(round(seconds * rate)) / rate
    return 0.4 * np.sin(2 * np.pi * np.stack([300 * time, 500 * time], axis=1)).astype(np.float32)


def write_file(path: Path, samples: np.ndarray, rate: int, **options: str) -> Path:
    soundfile.write(path, samples, rate, **options)
    return path


@pytest.mark.parametrize("rate", [16_000, 48_000])
@pytest.mark.parametrize("name", FORMATS)
def test_formats_and_rates(name: str, rate: int, tmp_path: Path) -> None:
    options, tolerance = FORMATS[name]
    path = write_file(tmp_path / name, tone(rate), rate, **options)
    separate = audio.read(path, RATE, separate=True)
    expected = tone(RATE).T
    assert separate.dtype == np.float32
    assert separate.shape == expected.shape
    # Without both ends, where the filter of the resampler reaches beyond the file.
    np.testing.assert_allclose(separate[:, 2400:-2400], expected[:, 2400:-2400], rtol=0, atol=tolerance)
    np.testing.assert_allclose(audio.read(path, RATE), separate.mean(axis=0, keepdims=True), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(audio.read(io.BytesIO(path.read_bytes()), RATE), audio.read(path, RATE))


@pytest.mark.parametrize("name", ["a.m4a", "a.webm"])
def test_ffmpeg_formats(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac" if name == "a.m4a" else "libopus", rate=48_000, layout="stereo")
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(tone(48_000).T), format="fltp", layout="stereo")
        frame.rate = 48_000
        container.mux([packet for part in (frame, None) for packet in stream.encode(part)])
    separate = audio.read(path, RATE, separate=True)
    assert abs(separate.shape[1] - 2 * RATE) < 0.1 * RATE  # encoders add some silence
    spectrum = np.abs(np.fft.rfft(separate[:, :RATE]))
    np.testing.assert_array_equal(spectrum.argmax(axis=1), [300, 500])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(audio.AudioError):
        audio.read(path, RATE)


def test_ignores_the_suffix(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.flac", tone(RATE), RATE)
    np.testing.assert_array_equal(
        audio.read(path.rename(tmp_path / "a.txt"), RATE)[0], audio.read(path.with_suffix(".txt"), RATE)[0]
    )


@pytest.mark.parametrize("part", [0.97, 0.6, 0.05])
@pytest.mark.parametrize("name", FORMATS)
def test_rejects_truncated_files(name: str, part: float, tmp_path: Path) -> None:
    path = write_file(tmp_path / name, soundfile.read(DATA / "speech_3s.wav")[0], 16_000, **FORMATS[name][0])
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(audio.AudioError, match="truncated|cannot be decoded|not an audio file"):
        audio.read(path, RATE)


@pytest.mark.parametrize("content", [b"", b"not audio at all", bytes(1000), np.random.default_rng(0).bytes(100_000)])
def test_rejects_other_content(content: bytes) -> None:
    with pytest.raises(audio.AudioError, match="not an audio file"):
        audio.read(io.BytesIO(content), RATE)


def test_rejects_corrupt_files(tmp_path: Path) -> None:
    content = bytearray(write_file(tmp_path / "a.flac", tone(RATE), RATE).read_bytes())
    content[len(content) // 2] ^= 0x55
    with pytest.raises(audio.AudioError, match="cannot be decoded after"):
        audio.read(io.BytesIO(content), RATE)


def test_rejects_long_files(tmp_path: Path) -> None:
    silence = write_file(tmp_path / "a.flac", np.zeros(3 * RATE), RATE)
    assert audio.read(silence, RATE, max_seconds=3.0).shape == (1, 3 * RATE)
    with pytest.raises(audio.AudioError, match="longer than 2 seconds"):
        audio.read(silence, RATE, max_seconds=2.0)


def test_rejects_invalid_rates_and_samples(tmp_path: Path) -> None:
    for samples, rate, message in (
        (np.zeros(100), 5, r"sampling rate \(=5 Hz\)"),
        (np.zeros(0), RATE, "no samples"),
        (np.array([0, np.nan]), RATE, "NaN"),
        (np.array([0, -np.inf]), RATE, "NaN, infinite, or"),
        (np.array([0, 1e20]), RATE, "or larger than 2147483648"),
    ):
        path = write_file(tmp_path / "a.wav", samples, rate, subtype="FLOAT")
        with pytest.raises(audio.AudioError, match=message):
            audio.read(path, RATE)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        audio.read(tmp_path / "a.wav", RATE)
