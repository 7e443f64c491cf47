"""The page of `snax report`: HTML with the audio, spectrograms, codes and metrics of clips and reconstructions."""

import base64
import html
import io
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from jaxtyping import Float
from matplotlib import image
from matplotlib.mlab import specgram

from ..codec.config import SNACConfig
from .scores import METRICS
from .scoring import Scored

# The page embeds each clip twice, as original and decoded audio. Ten minutes at 24 kHz take about 40 MB.
MAX_SECONDS = 600
# Width of the images in pixels, about that of a screen, and their dynamic range in dB.
WIDTH, DECIBELS = 1600, 70


def page(model: str, config: SNACConfig, clips: Iterable[Scored]) -> str:
    """Return a self-contained HTML page.

    Args:
        model: name of the model.
        config: its configuration.
        clips: the clips with their reconstructions.

    Raises:
        ValueError: if there are no clips, or more than MAX_SECONDS of audio.
    """
    seconds, entries = 0.0, []
    for clip in clips:
        seconds += clip.audio.size / config.sampling_rate
        if seconds > MAX_SECONDS:
            raise ValueError(
                f"The report embeds all audio, so the clips must not exceed {MAX_SECONDS} s in total. Use fewer clips."
            )
        entries.append(_clip(clip, config.sampling_rate))
    if not entries:
        raise ValueError("The report needs at least one readable clip.")
    rates = ", ".join(f"{rate:.1f}" for rate in config.code_rates)
    about = (
        f"{config.bitrate / 1000:.2f} kbps: {config.tokens_per_second:.1f} codes per second in "
        f"{len(config.code_rates)} levels ({rates}), codebooks of {config.codebook_size} entries, "
        f"{config.sampling_rate} Hz."
    )
    data = {
        "config": {"sampling_rate": config.sampling_rate, "code_rates": config.code_rates},
        "clips": entries,
    }
    parts = {
        "title": html.escape(f"{model}: {len(entries)} clip{'s' * (len(entries) > 1)}"),
        "about": html.escape(about),
        "clips": json.dumps(data).replace("<", "\\u003c"),  # or a clip's name could close the script element
    }
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _clip(clip: Scored, rate: int) -> dict[str, Any]:
    """Return what the page's script needs to show a clip."""
    counts = [len(level) for level in clip.codes]
    facts = [["codes", str(sum(counts)), " + ".join(map(str, counts))]]
    for key, description in METRICS.items():
        name, _, hint = description.partition(", ")
        value = clip.scores[key]
        facts.append([name, "-" if math.isnan(value) else f"{value:.2f}", hint])
    powers = [_power(audio, rate) for audio in (clip.audio, clip.decoded)]
    loudest = max(power.max() for power in powers)
    tracks = {
        name: {
            "audio": _url("audio/flac", _flac(audio, rate)),
            "peaks": _peaks(audio),
            "spectrogram": _url("image/png", _picture(power, loudest)),
        }
        for name, audio, power in zip(("original", "decoded"), (clip.audio, clip.decoded), powers, strict=True)
    }
    codes = [base64.b64encode(level.astype("<u2").tobytes()).decode() for level in clip.codes]
    return {"name": clip.id, "seconds": clip.audio.size / rate, "facts": facts, "tracks": tracks, "codes": codes}


def _url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _flac(audio: Float[np.ndarray, " samples"], rate: int) -> bytes:
    """Encode audio as 16-bit FLAC."""
    file = io.BytesIO()
    soundfile.write(file, np.clip(audio, -1, 1), rate, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def _peaks(audio: Float[np.ndarray, " samples"]) -> list[list[float]]:
    """Return the lowest and the highest sample of each of at most WIDTH segments."""
    parts = np.array_split(np.clip(audio, -1, 1), min(WIDTH, audio.size))
    return [[round(float(part.min()), 3), round(float(part.max()), 3)] for part in parts]


def _power(audio: Float[np.ndarray, " samples"], rate: int) -> Float[np.ndarray, "bins frames"]:
    """Return a spectrogram in dB, with a window of 512 samples."""
    window = 512
    step = max(64, audio.size // WIDTH)
    padded = np.pad(audio, (window // 2, window))
    power = np.asarray(specgram(padded, NFFT=window, Fs=rate, noverlap=max(0, window - step))[0])
    return 10 * np.log10(power + 1e-12)


def _picture(power: Float[np.ndarray, "bins frames"], loudest: float) -> bytes:
    """Encode a spectrogram as PNG, with the color scale ending at `loudest` dB."""
    file = io.BytesIO()
    image.imsave(file, power, cmap="magma", vmin=loudest - DECIBELS, vmax=loudest, origin="lower", format="png")
    return file.getvalue()
