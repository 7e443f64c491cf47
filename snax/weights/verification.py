"""Comparison of a converted model with the PyTorch reference, for `snax convert --verify`. Needs torch and snac.

Trained encoders magnify rounding errors: the float32 latents of the reference itself can differ from its float64
latents by more than a fixed bound. The reference in float64 therefore decides.
"""

import contextlib
import copy
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import snac
import torch
from jax import Array
from jaxtyping import Float

from ..codec.layers import Context
from ..codec.model import SNAC
from ..data.audio import read
from .torch_files import read_state_dict

# Float32 rounding over the 60 or so layers of the largest model. The largest measured values are 8.6e-6 and 2e-6.
LATENTS_BOUND = 1e-5
AUDIO_BOUND = 5e-6

# The largest allowed ratio of the errors of the model and of the float32 reference, which round in different orders. On
# nine models that magnify rounding, ratios of up to 2.6 were measured.
ROUNDING_FACTOR = 4

SECONDS = 2
CLIPS = Path(__file__).with_name("clips")


class Comparison(NamedTuple):
    """Differences on one clip. The reference in float32 and the model are both compared with the float64 reference."""

    latents: float
    """The largest error of the model's latents, relative to their RMS."""
    reference_latents: float
    """The largest error of the reference's float32 latents, relative to their RMS."""
    tokens: tuple[float, ...]
    """For each level, the fraction of tokens that equal the reference's in float32 or in float64."""
    audio: float
    """The largest error of the model's audio. All decode the same codes with the same noise."""
    reference_audio: float
    """The largest error of the reference's float32 audio."""

    @property
    def latents_bound(self) -> float:
        """The error that latents may have."""
        return max(LATENTS_BOUND, ROUNDING_FACTOR * self.reference_latents)

    @property
    def audio_bound(self) -> float:
        """The error that audio may have."""
        return max(AUDIO_BOUND, ROUNDING_FACTOR * self.reference_audio)

    @property
    def passed(self) -> bool:
        """Whether the model is the reference up to rounding."""
        return self.latents < self.latents_bound and self.audio < self.audio_bound and min(self.tokens) == 1


@jax.jit
def decode_with_noise(
    model: SNAC, latents: Float[Array, "batch frames latent_dim"], noise: Sequence[Float[Array, "_ _"]] | None
) -> Float[Array, "batch 1 samples"]:
    """Decode with the given noise of each decoder block, instead of the noise that `SNAC.decode` draws from a key."""
    with jax.default_matmul_precision(model.precision):
        return model.decoder(latents, Context(noise=noise)).swapaxes(1, 2)


@contextlib.contextmanager
def recorded_noise() -> Iterator[list[jax.Array]]:
    """Record the noise that the reference draws, (batch, time) for each decoder block."""
    draws: list[jax.Array] = []
    randn = torch.randn

    def recording(*args: Any, **kwargs: Any) -> torch.Tensor:
        noise = randn(*args, **kwargs)
        draws.append(jnp.asarray(noise[:, 0].numpy()))
        return noise

    with mock.patch.object(torch, "randn", recording):
        yield draws


@contextlib.contextmanager
def replayed_noise(draws: Sequence[jax.Array]) -> Iterator[None]:
    """Let the reference draw recorded noise, in float64."""
    tensors = (torch.from_numpy(np.array(draw, np.float64))[:, None] for draw in draws)
    with mock.patch.object(torch, "randn", side_effect=tensors):
        yield


def read_reference(weights_path: Path, config_path: Path) -> snac.SNAC:
    """Load weights into the reference, in evaluation mode."""
    reference = snac.SNAC(**json.loads(config_path.read_text()))
    state_dict = read_state_dict(weights_path)
    reference.load_state_dict({name: torch.from_numpy(array.astype(np.float32)) for name, array in state_dict.items()})
    return reference.eval()


def compare(
    reference: snac.SNAC, reference64: snac.SNAC, model: SNAC, audio: Float[np.ndarray, "batch 1 samples"]
) -> Comparison:
    """Compare a model with the reference, and both with the reference in float64."""
    samples = torch.from_numpy(audio)
    with torch.inference_mode(), recorded_noise() as noise:
        latents = reference.encoder(reference.preprocess(samples))
        codes = reference.encode(samples)
        decoded = reference.decode(codes)
    with torch.inference_mode(), replayed_noise(noise):
        latents64 = reference64.encoder(reference64.preprocess(samples.double()))
        codes64 = reference64.encode(samples.double())
        decoded64 = reference64.decode(codes).numpy()
    model_latents = np.asarray(model.audio_to_latents(audio)).swapaxes(1, 2)
    model_codes = [np.asarray(level) for level in model.encode(audio)]
    latents_of_codes = model.dequantize([level.numpy() for level in codes])
    model_decoded = np.asarray(decode_with_noise(model, latents_of_codes, noise or None))
    rms = latents64.square().mean().sqrt().item()
    return Comparison(
        latents=float(np.abs(model_latents - latents64.numpy()).max()) / rms,
        reference_latents=(latents - latents64).abs().max().item() / rms,
        tokens=tuple(
            float(((level == level32.numpy()) | (level == level64.numpy())).mean())
            for level, level32, level64 in zip(model_codes, codes, codes64, strict=True)
        ),
        audio=float(np.abs(model_decoded - decoded64).max()),
        reference_audio=float(np.abs(decoded.numpy() - decoded64).max()),
    )


def clips(sampling_rate: int) -> Iterator[tuple[str, Float[np.ndarray, "1 1 samples"]]]:
    """The name and the audio of each clip to compare models on: speech, music, and a sweep with noise."""
    samples = SECONDS * sampling_rate
    for name in ("speech", "music"):
        yield name, read(CLIPS / f"{name}.flac", sampling_rate)[None, :, :samples]
    time = np.arange(samples) / sampling_rate
    octaves = 8  # from 50 Hz
    sweep = np.sin(2 * np.pi * 50 * 2 ** (octaves * time / SECONDS) / (octaves / SECONDS * np.log(2)))
    noise = np.random.default_rng(0).standard_normal(samples) * np.sin(2 * np.pi * 3 * time) ** 2
    yield "sweep and noise", (0.3 * sweep + 0.1 * noise).astype(np.float32)[None, None]


def compare_files(model: SNAC, weights_path: Path, config_path: Path) -> dict[str, Comparison]:
    """Compare a model with the reference that has the weights of a file, clip by clip."""
    reference = read_reference(weights_path, config_path)
    reference64 = copy.deepcopy(reference).double()
    return {name: compare(reference, reference64, model, audio) for name, audio in clips(model.config.sampling_rate)}


def table(comparisons: dict[str, Comparison]) -> str:
    """Format comparisons as a table."""
    lines = [f"{'largest error against float64':<36}{'snax':>9}{'reference':>11}   bound"]
    for name, clip in comparisons.items():
        latents, audio = f"{name}: latents / RMS", f"{name}: audio"
        lines.append(f"{latents:<36}{clip.latents:9.1e}{clip.reference_latents:11.1e}   {clip.latents_bound:.1e}")
        lines.append(f"{audio:<36}{clip.audio:9.1e}{clip.reference_audio:11.1e}   {clip.audio_bound:.1e}")
        shares = ", ".join(f"{share:.2%}" for share in clip.tokens)
        lines.append(f"{name + ': equal tokens':<36}{shares}")
    lines.append("passed" if all(clip.passed for clip in comparisons.values()) else "FAILED")
    return "\n".join(lines)
