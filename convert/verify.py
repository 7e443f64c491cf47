"""A converted model beside the reference that it came from: the same audio through both, and the differences."""

import contextlib
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

import snax
from snax.codec.layers import Context
from snax.weights.torch_files import read_state_dict

# float32 rounding over the some 60 layers of the largest model: seen up to 8.6e-6 and 2e-6.
LATENTS_BOUND = 1e-5
AUDIO_BOUND = 5e-6


@jax.jit
def decode_with_noise(
    model: snax.SNAC, latents: Float[Array, "batch frames latent_dim"], noise: Sequence[Float[Array, "_ _"]] | None
) -> Float[Array, "batch 1 samples"]:
    """With the noise as an argument, where `SNAC.decode` draws its own."""
    with jax.default_matmul_precision(model.precision):
        return model.decoder(latents, Context(noise=noise)).swapaxes(1, 2)


class Differences(NamedTuple):
    """`latents`: the largest difference over the reference's RMS. `tokens`: for each level the share that is equal.

    `audio`: the largest difference, both decoding the reference's codes with the same noise.
    """

    latents: float
    tokens: tuple[float, ...]
    audio: float


def read_reference(weights_path: Path, config_path: Path) -> snac.SNAC:
    """The reference with these weights, in evaluation mode."""
    reference = snac.SNAC(**json.loads(config_path.read_text()))
    state_dict = read_state_dict(weights_path)
    reference.load_state_dict({name: torch.from_numpy(array.astype(np.float32)) for name, array in state_dict.items()})
    return reference.eval()


@contextlib.contextmanager
def recorded_noise() -> Iterator[list[jax.Array]]:
    """What the reference draws meanwhile, block by block, each (batch, time): `Decoder` takes it as `noise`."""
    draws: list[jax.Array] = []
    randn = torch.randn

    def recording(*args: Any, **kwargs: Any) -> torch.Tensor:
        noise = randn(*args, **kwargs)
        draws.append(jnp.asarray(noise[:, 0].numpy()))
        return noise

    with mock.patch.object(torch, "randn", recording):
        yield draws


def compare(reference: snac.SNAC, model: snax.SNAC, audio: np.ndarray) -> Differences:
    """Both models on `audio`, (batch, 1, samples) in float32."""
    with torch.inference_mode(), recorded_noise() as noise:
        expected_latents = reference.encoder(reference.preprocess(torch.from_numpy(audio))).numpy().swapaxes(1, 2)
        expected_codes = reference.encode(torch.from_numpy(audio))
        expected_audio = reference.decode(expected_codes).numpy()
    codes = [level.numpy() for level in expected_codes]
    latents = np.asarray(model.audio_to_latents(audio))
    decoded = np.asarray(decode_with_noise(model, model.dequantize(codes), noise or None))
    return Differences(
        latents=float(np.abs(latents - expected_latents).max() / np.sqrt(np.square(expected_latents).mean())),
        tokens=tuple(float((np.asarray(a) == b).mean()) for a, b in zip(model.encode(audio), codes, strict=True)),
        audio=float(np.abs(decoded - expected_audio).max()),
    )


def compare_files(model: snax.SNAC, weights_path: Path, config_path: Path) -> Differences:
    """`model` beside the reference with the weights it came from, on two seconds that leave no band out."""
    rate = model.config.sampling_rate
    time = np.arange(2 * rate) / rate
    sweep = np.sin(2 * np.pi * 50 * 2 ** (8 * time / 2) / (8 / 2 * np.log(2)))  # 50 Hz, eight octaves up
    noise = np.random.default_rng(0).standard_normal(time.size) * np.sin(2 * np.pi * 3 * time) ** 2
    audio = (0.3 * sweep + 0.1 * noise).astype(np.float32)[None, None]
    return compare(read_reference(weights_path, config_path), model, audio)


def faithful(differences: Differences) -> bool:
    """Whether all is within the bounds that a good conversion keeps."""
    within = differences.latents < LATENTS_BOUND and differences.audio < AUDIO_BOUND
    return within and min(differences.tokens) == 1


def table(differences: Differences) -> str:
    """One row a figure, and its bound."""
    rows = [("latents, largest difference / RMS", f"{differences.latents:.1e}", f"< {LATENTS_BOUND:.0e}")]
    rows += [(f"tokens equal, level {i}", f"{share:.2%}", "100%") for i, share in enumerate(differences.tokens)]
    rows += [("audio, largest difference", f"{differences.audio:.1e}", f"< {AUDIO_BOUND:.0e}")]
    return "\n".join(f"{name:<36}{value:>10}   {bound}" for name, value, bound in rows)
