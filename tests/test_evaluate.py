"""`snax eval`: metrics against their definitions, use of the codebooks, and the command."""

import json
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import recordings, small
from numpy.random import default_rng

import snax
from snax import cli
from snax.evaluate import metrics
from snax.evaluate.scores import METRICS
from snax.evaluate.scoring import CodebookUse
from snax.train import losses

RATE = 16_000


@pytest.fixture(scope="module")
def pair() -> tuple[np.ndarray, np.ndarray]:
    """Return speech with noise, and clean speech."""
    speech = recordings.clip("speech_3s.wav", RATE, 2.5)[0, 0].astype(np.float32)
    return (speech + 0.02 * default_rng(0).standard_normal(speech.size)).astype(np.float32), speech


def test_distances_equal_training_losses(pair: tuple[np.ndarray, np.ndarray]) -> None:
    """The tolerance allows for float32 rounding in sums of thousands of values and their logarithms."""
    audio, target = (jnp.asarray(clip)[None, None] for clip in pair)
    assert metrics.mel_distance(*pair, RATE) == pytest.approx(float(losses.mel_loss(audio, target, RATE)), rel=1e-5)
    assert metrics.stft_distance(*pair) == pytest.approx(float(losses.stft_loss(audio, target)), rel=1e-5)


def test_si_sdr(pair: tuple[np.ndarray, np.ndarray]) -> None:
    """SI-SDR ignores gain and offset, and equals the paper's definition in torch.

    For orthogonal noise it is the ratio of the energies.
    """
    time = np.arange(RATE)
    tone, other = (np.sin(2 * np.pi * cycles * time / RATE) for cycles in (100, 300))
    assert metrics.si_sdr(
        0.3 * (tone + 0.1 * other) + 0.2,
        tone,
    ) == pytest.approx(20, abs=1e-6)
    assert metrics.si_sdr(tone, tone) > 150
    assert metrics.si_sdr(other, tone) < -150
    audio, target = (torch.tensor(clip, dtype=torch.float64) for clip in pair)
    audio, target = audio - audio.mean(), target - target.mean()
    signal = torch.dot(audio, target) / target.square().sum() * target
    expected = 10 * torch.log10(signal.square().sum() / (signal - audio).square().sum())
    assert metrics.si_sdr(*pair) == pytest.approx(expected.item(), rel=1e-9)


def test_scores_get_worse_with_noise(pair: tuple[np.ndarray, np.ndarray]) -> None:
    """Every metric gets worse with more noise, and has its best value for identical audio."""
    noisy, speech = pair
    perfect, little, much = (
        metrics.scores(audio, speech, RATE, with_pesq=True) for audio in (speech, noisy, speech + 4 * (noisy - speech))
    )
    for name in ("mel", "stft"):
        assert 0 == perfect[name] < little[name] < much[name]
    for name in ("si_sdr", "stoi", "pesq"):
        assert perfect[name] > little[name] > much[name]
    assert perfect["stoi"] == pytest.approx(1, abs=1e-6)
    assert perfect["pesq"] == pytest.approx(4.64, abs=0.01)  # the maximum of P.862.2


def test_mean_ignores_unmeasurable_clips() -> None:
    """STOI is NaN for less than 0.4 s of speech, and PESQ without an utterance."""
    short, silent = default_rng(0).standard_normal(2000).astype(np.float32), np.zeros(RATE, np.float32)
    assert math.isnan(metrics.stoi(short, short, RATE))
    assert math.isnan(metrics.pesq(silent, silent, RATE))
    assert metrics.mean([1.0, math.nan, 2.0]) == 1.5
    assert math.isnan(metrics.mean([math.nan]))


def test_codebook_use() -> None:
    """The entropy of n equally frequent codes is log2(n) bits, and that of a constant code is 0."""
    model = small.model()
    use = CodebookUse(model)
    strides = model.config.vq_strides
    frames = math.lcm(*strides) * 16
    levels = [np.tile(np.arange(4), frames) for _ in strides]
    levels[0] = np.zeros(frames, np.int64)
    use.add(snax.EncodedClip(tuple(levels), 1))
    assert use.used == pytest.approx([count / model.config.codebook_size for count in (1, *[4] * (len(strides) - 1))])
    assert use.entropies == pytest.approx([0, *[2] * (len(strides) - 1)])
    assert use.information_rate == pytest.approx(sum(2 * rate for rate in model.config.code_rates[1:]))


def test_eval_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command prints a table and writes its files. An unreadable clip is reported, with exit code 1."""
    model = small.model()
    snax.save(model, tmp_path / "model")
    clips = tmp_path / "clips"
    clips.mkdir()
    for name in ("speech_3s.wav", "guit_em9.flac"):
        (clips / name).symlink_to(recordings.DATA / name)
    arguments = ["eval", str(clips), "-m", str(tmp_path / "model"), "-o", str(tmp_path / "out")]
    assert cli.main(arguments) == 0
    table = capsys.readouterr().out
    assert all(description in table for description in METRICS.values())
    assert "2 clips" in table
    assert f"bit rate {model.config.bitrate / 1000:.2f} kbps" in table
    lines = [json.loads(line) for line in (tmp_path / "out" / "clips.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["guit_em9.flac", "speech_3s.wav"]
    summary = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert summary["metrics"]["mel"]["mean"] == pytest.approx(sum(line["mel"] for line in lines) / 2)
    assert (tmp_path / "out" / "scores.png").read_bytes().startswith(b"\x89PNG")

    (clips / "bad.wav").write_bytes(b"RIFF")
    assert cli.main([*arguments[:4], "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["clips"] == 2
    assert json.loads(out)["unreadable"][0].startswith("bad.wav: ")
    assert "bad.wav cannot be read" in err
