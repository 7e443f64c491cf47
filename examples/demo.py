"""Encode and decode a clip of speech: `make demo`, or `python examples/demo.py [AUDIO] [OUT]`.

Writes the decoded audio and the HTML report of `snax report`, and prints bitrate and speed. Needs the `metrics` extra.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import soundfile
from huggingface_hub.utils import logging as hub_logging

import snax
from snax.data.audio import read
from snax.evaluate.report import page
from snax.evaluate.scoring import CodebookUse, score

NAME, BUNDLED = "snac_24khz", "mini_16khz"
CLIP = Path(__file__).parents[1] / "tests" / "data" / "speech_7s.wav"


def main() -> None:
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else CLIP
    out = Path(sys.argv[2]) if len(sys.argv) > 2 else Path("demo")
    out.mkdir(parents=True, exist_ok=True)

    model, name = load()
    config = model.config
    audio = read(source, config.sampling_rate)
    codes, encode_seconds = timed(model.encode, audio[None])
    decoded, decode_seconds = timed(model.decode, codes)

    stem = out / f"{source.stem}_{name}"
    reconstructed = np.asarray(decoded)[0, 0, : audio.shape[1]]
    soundfile.write(f"{stem}.wav", reconstructed, config.sampling_rate)
    html = page(name, config, score(model, [(source.name, audio[0])], CodebookUse(model)))
    Path(f"{stem}.html").write_text(html, encoding="utf-8")

    seconds = audio.shape[1] / config.sampling_rate
    tokens = [level.size for level in codes]
    print(f"  {source.name}: {seconds:.2f} s at {config.sampling_rate} Hz")
    print(f"  tokens:  {' + '.join(map(str, tokens))} = {sum(tokens)}, coarse to fine")
    print(f"  bitrate: {config.bitrate / 1000:.2f} kbps")
    device = jax.devices()[0].device_kind
    encode_speed, decode_speed = seconds / encode_seconds, seconds / decode_seconds
    print(f"  speed:   encode {encode_speed:.0f} x real time, decode {decode_speed:.0f} x real time, on {device}")
    print(f"  report:  {stem}.html (original and decoded audio, codes during playback)")
    print(f"  audio:   {stem}.wav")


def load() -> tuple[snax.SNAC, str]:
    """Return the published model and its name, or the small bundled model if the download fails."""
    print(f"Loading {NAME} ...")
    hub_logging.set_verbosity_error()  # without a network, the hub logs five retries
    try:
        return snax.load(NAME), NAME
    except ConnectionError as error:
        print(f"{NAME} cannot be downloaded: {error}\n")
        print(f"Using {BUNDLED} instead, a small speech codec that is bundled with snax.")
        print(f"IT DOES NOT SOUND LIKE {NAME}: it is 17 times smaller and does not show the quality of SNAC.\n")
        return snax.load(BUNDLED), BUNDLED


def timed(method: Callable[[Any], Any], argument: Any) -> tuple[Any, float]:
    """Return the result and the seconds of a second call. The first call compiles."""
    jax.block_until_ready(method(argument))
    start = time.perf_counter()
    result = jax.block_until_ready(method(argument))
    return result, time.perf_counter() - start


if __name__ == "__main__":
    main()
