"""Draw docs/padding.png, which shows how padding changes tokens: `python -m benchmarks.padding`.

Compares two seconds of speech encoded alone with the same clip padded as in a batch with a longer clip: with zeros
only, and with `padding_mask`. snac_24khz architecture with random weights, scaled so that the model behaves like a
trained one.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from snax.codec.config import PUBLISHED_CONFIGS
from tests.helpers.recordings import clip
from tests.helpers.reference import converted, trained_like

CONFIG = PUBLISHED_CONFIGS["snac_24khz"]
SECONDS, PADDING = 20 * CONFIG.pad_multiple / CONFIG.sampling_rate, 10 * CONFIG.pad_multiple
SHOWN_FRAMES = 40  # latent frames at the end of the clip


def main() -> None:
    speech = clip("speech_7s.wav", CONFIG.sampling_rate, 4)
    model = converted(trained_like(CONFIG.to_dict(), speech), CONFIG.to_dict())
    alone = clip("speech_3s.wav", CONFIG.sampling_rate, SECONDS)
    frames = alone.shape[-1] // CONFIG.hop_length
    padded = np.pad(alone, ((0, 0), (0, 0), (0, PADDING)))
    padding_mask = np.arange(padded.shape[-1] // CONFIG.hop_length)[None] < frames
    expected_latents, expected_codes = model.audio_to_latents(alone)[0], model.encode(alone)

    figure, grid = plt.subplots(3, 2, figsize=(12, 6), layout="constrained", sharex=True, height_ratios=[2, 2, 3])
    time = np.arange(frames)
    for column, (title, mask) in enumerate((("padded with zeros", None), ("with `padding_mask`", padding_mask))):
        latents = model.audio_to_latents(padded, padding_mask=mask)[0, :frames]
        codes = [level[0] for level in model.encode(padded, padding_mask=mask)]
        top, middle, bottom = grid[:, column]
        top.set_title(title)
        top.plot(np.arange(alone.shape[-1]) / CONFIG.hop_length, alone[0, 0], linewidth=0.5)
        top.axvline(frames, color="gray", linestyle=":")
        error = np.linalg.norm(latents - expected_latents, axis=1) / np.linalg.norm(expected_latents, axis=1).mean()
        middle.semilogy(time + 0.5, np.maximum(error, 1e-9), ".-")
        middle.set_ylim(3e-10, 3)
        changed = total = 0
        for level, (actual, expected, stride) in enumerate(zip(codes, expected_codes, CONFIG.vq_strides, strict=True)):
            differs = np.asarray(actual[: expected.shape[1]] != expected[0])
            changed, total = changed + differs.sum(), total + differs.size
            colors = np.where(differs, 1.0, 0.15 + 0.1 * (np.arange(differs.size) % 2))[None]
            extent = (0, differs.size * stride, level + 0.95, level + 0.05)
            bottom.imshow(colors, aspect="auto", extent=extent, cmap="Reds", vmin=0, vmax=1.2)
        bottom.set(ylim=(len(codes), 0), xlim=(frames - SHOWN_FRAMES, frames + 2), xlabel="latent frames")
        bottom.set_title(f"{changed} of {total} tokens differ from the clip alone")
        bottom.set_yticks([i + 0.5 for i in range(len(codes))], [f"level {i}" for i in range(len(codes))])
    grid[0][0].set_ylabel("audio")
    grid[1][0].set_ylabel("latents, relative error\n(at least 1e-9)")
    figure.savefig(Path(__file__).parents[1] / "docs" / "padding.png", dpi=100)


if __name__ == "__main__":
    main()
