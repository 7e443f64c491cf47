"""`snax report`: clips before and after on one page of HTML, to listen to, to look at, and with their codes."""

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

# All audio is in the page, twice: ten minutes at 24 kHz make some 40 MB.
MAX_SECONDS = 600
# Of the pictures, which are as wide as a screen.
WIDTH, DECIBELS = 1600, 70


def page(model: str, config: SNACConfig, clips: Iterable[Scored]) -> str:
    """The page, with everything in it. Raises ValueError for no clips, or for more audio than a page should have."""
    seconds, shown = 0.0, []
    for clip in clips:
        seconds += clip.audio.size / config.sampling_rate
        if seconds > MAX_SECONDS:
            raise ValueError(
                f"all audio is in the page, and this would be more than {MAX_SECONDS} s: give fewer clips."
            )
        shown.append(_clip(clip, config.sampling_rate))
    if not shown:
        raise ValueError("none of the clips can be read.")
    rates = ", ".join(f"{rate:.1f}" for rate in config.code_rates)
    about = (
        f"{config.bitrate / 1000:.2f} kbps: {config.tokens_per_second:.1f} codes a second in {len(config.code_rates)} "
        f"levels ({rates}), each one of {config.codebook_size}. {config.sampling_rate} Hz."
    )
    data = {
        "config": {"sampling_rate": config.sampling_rate, "code_rates": config.code_rates},
        "clips": shown,
    }
    parts = {
        "title": html.escape(f"{model}: {len(shown)} clip{'s' * (len(shown) > 1)}"),
        "about": html.escape(about),
        "clips": json.dumps(data).replace("<", "\\u003c"),  # a name could end the script
    }
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def _clip(clip: Scored, rate: int) -> dict[str, Any]:
    counts = [len(level) for level in clip.codes]
    facts = [["codes", str(sum(counts)), " + ".join(map(str, counts))]]
    for key, what in METRICS.items():
        name, _, hint = what.partition(", ")
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
    """Without loss but for 16 bits."""
    file = io.BytesIO()
    soundfile.write(file, np.clip(audio, -1, 1), rate, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def _peaks(audio: Float[np.ndarray, " samples"]) -> list[list[float]]:
    """The lowest and the highest sample in each of up to WIDTH stretches."""
    parts = np.array_split(np.clip(audio, -1, 1), min(WIDTH, audio.size))
    return [[round(float(part.min()), 3), round(float(part.max()), 3)] for part in parts]


def _power(audio: Float[np.ndarray, " samples"], rate: int) -> Float[np.ndarray, "bins frames"]:
    """A spectrogram in dB, of frames of 512 samples."""
    window = 512
    step = max(64, audio.size // WIDTH)
    padded = np.pad(audio, (window // 2, window))
    power = np.asarray(specgram(padded, NFFT=window, Fs=rate, noverlap=max(0, window - step))[0])
    return 10 * np.log10(power + 1e-12)


def _picture(power: Float[np.ndarray, "bins frames"], loudest: float) -> bytes:
    file = io.BytesIO()
    image.imsave(file, power, cmap="magma", vmin=loudest - DECIBELS, vmax=loudest, origin="lower", format="png")
    return file.getvalue()
