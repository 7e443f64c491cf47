"""One step of training: what is kept between steps, and a pure function from one to the next."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jaxtyping import Float, Int32

from ..codec.layers import Context
from ..codec.model import SNAC, draw_noise
from ..codec.quantizer import Quantized
from . import losses
from .discriminators import Discriminators
from .settings import Optimizer, Settings
from .weight_norm import Normed, fold, unfold

# Of the moving average of how often each row of a codebook is chosen: it sees some hundred steps.
USAGE_DECAY = 0.99


class Judges(NamedTuple):
    """Discriminators and what their optimizer remembers."""

    networks: Discriminators
    moments: optax.OptState


class State(NamedTuple):
    """All that a step changes.

    `usage` has for each level how often each row of the codebook was chosen of late, 1 being its share.
    """

    step: Int32[Array, ""]
    codec: Normed
    moments: optax.OptState
    average: SNAC
    usage: tuple[Float[Array, " codebook_size"], ...]
    judges: Judges | None


Metrics = dict[str, Float[Array, ""]]


def begin(model: SNAC, settings: Settings) -> State:
    """The state before the first step, from which `model` is trained on."""
    codec = unfold(model)
    judges = None
    if (how := settings.discriminators) is not None:
        networks = Discriminators(
            how.periods, how.windows, how.period_widths, how.spectrum_width, rngs=nnx.Rngs(settings.seed)
        )
        judges = Judges(networks, _optimizer(settings.optimizer, settings.optimizer.clip_discriminators).init(networks))
    return State(
        step=jnp.zeros((), jnp.int32),
        codec=codec,
        moments=_optimizer(settings.optimizer, settings.optimizer.clip).init(codec),
        average=model,
        usage=tuple(jnp.ones(len(level.codebook[...])) for level in model.quantizer.quantizers),
        judges=judges,
    )


def step(
    state: State, audio: Float[Array, "batch 1 samples"], settings: Settings, *, judged: bool
) -> tuple[State, Metrics]:
    """One step on a batch of whole pad multiples of audio; what it cost before the step, and what norms gradients had.

    `judged`: with discriminators. They learn first, from the same decoded audio, as in the Descript Audio Codec.
    """
    key = jax.random.fold_in(jax.random.key(settings.seed), state.step)
    rate = state.average.config.sampling_rate
    weights, metrics = settings.losses, dict[str, Array]()

    def round_trip(codec: Normed) -> tuple[tuple[Array, Metrics], Quantized]:
        return _round_trip(fold(codec), audio, key, jnp.dtype(settings.dtype))

    (decoded, quantizer_losses), pull_back, quantized = jax.vjp(round_trip, state.codec, has_aux=True)

    judges = state.judges
    if judged:
        assert judges is not None
        judges, metrics = _taught(judges, decoded, audio, settings)

    def cost(decoded: Array, parts: Metrics) -> tuple[Array, Metrics]:
        parts = dict(parts)
        if weights.mel:
            parts["mel"] = losses.mel_loss(decoded, audio, rate)
        if weights.stft:
            parts["stft"] = losses.stft_loss(decoded, audio)
        if weights.convergence:
            parts["convergence"] = losses.convergence_loss(decoded, audio)
        if weights.waveform:
            parts["waveform"] = losses.waveform_loss(decoded, audio)
        if judged:
            assert judges is not None
            networks = _cast(judges.networks, jnp.dtype(settings.dtype))
            fake, real = (_features(networks, each) for each in (decoded, audio))
            parts["adversarial"] = losses.adversarial_loss(fake)
            parts["feature"] = losses.feature_loss(fake, real)
        total = sum((getattr(weights, name) * part for name, part in parts.items()), jnp.zeros(()))
        return total, parts | {"loss": total}

    cost_gradient, parts = jax.grad(cost, argnums=(0, 1), has_aux=True)(decoded, quantizer_losses)
    (gradient,) = pull_back(cost_gradient)
    optimizer = _optimizer(settings.optimizer, settings.optimizer.clip)
    updates, moments = optimizer.update(gradient, state.moments, state.codec)
    codec = optax.apply_updates(state.codec, updates)

    usage = tuple(_usage(seen, codes) for seen, codes in zip(state.usage, quantized.codes, strict=True))
    # At first over fewer steps: else the weights from before the first would be in it for long.
    decay = jnp.minimum(settings.average, (1 + state.step) / (10 + state.step))
    average = optax.incremental_update(fold(codec), state.average, 1 - decay)
    if settings.restart:
        usage = _restart(codec.directions, average, usage, quantized, settings.restart, jax.random.fold_in(key, 1))

    metrics |= parts | {"gradient": optax.tree.norm(gradient)}
    for i, seen in enumerate(usage):
        metrics |= {f"level_{i}/{name}": value for name, value in _health(seen).items()}
    return State(state.step + 1, codec, moments, average, usage, judges), metrics


def _round_trip(model: SNAC, audio: Array, key: Array, dtype: Any) -> tuple[tuple[Array, Metrics], Quantized]:
    """Decoded audio, the quantizer's losses, and its results."""
    config = model.config
    with jax.default_matmul_precision(model.precision):
        latents = _cast(model.encoder, dtype)(audio.swapaxes(1, 2).astype(dtype)).astype(jnp.float32)
        quantized = model.quantizer(latents)
        commitment, codebook = losses.quantizer_losses(model.quantizer, quantized)
        noise = None
        if config.noise:
            noise = draw_noise(config, jax.random.split(key, len(audio)), jnp.arange(latents.shape[1])[None])
        decoded = _cast(model.decoder, dtype)(quantized.z_q.astype(dtype), Context(noise=noise))
    parts = {"commitment": commitment, "codebook": codebook}
    return (decoded.astype(jnp.float32).swapaxes(1, 2), parts), quantized


def _taught(judges: Judges, decoded: Array, audio: Array, settings: Settings) -> tuple[Judges, Metrics]:
    """Discriminators after a step of their own."""

    def cost(networks: Discriminators) -> Array:
        networks = _cast(networks, jnp.dtype(settings.dtype))
        fake, real = (_features(networks, each) for each in (decoded, audio))
        return losses.discriminator_loss(fake, real)

    loss, gradient = jax.value_and_grad(cost)(judges.networks)
    optimizer = _optimizer(settings.optimizer, settings.optimizer.clip_discriminators)
    updates, moments = optimizer.update(gradient, judges.moments, judges.networks)
    taught = Judges(optax.apply_updates(judges.networks, updates), moments)
    return taught, {"discriminators": loss, "gradient_of_discriminators": optax.tree.norm(gradient)}


def _features(networks: Discriminators, audio: Array) -> list[list[Array]]:
    return jax.tree.map(lambda x: x.astype(jnp.float32), networks(audio))


def _cast(module: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda parameter: parameter.astype(dtype), module)


def _optimizer(how: Optimizer, clip: float) -> optax.GradientTransformation:
    """AdamW with the gradient's norm clipped."""
    decayed = optax.exponential_decay(how.learning_rate, 1, how.decay)
    rate = optax.join_schedules(
        [optax.linear_schedule(0.0, how.learning_rate, how.warmup_steps), decayed], [how.warmup_steps]
    )
    b1, b2 = how.betas
    return optax.chain(optax.clip_by_global_norm(clip), optax.adamw(rate, b1=b1, b2=b2, weight_decay=how.weight_decay))


def _usage(seen: Array, codes: Array) -> Array:
    counts = jnp.zeros(len(seen)).at[codes.reshape(-1)].add(1.0)
    return USAGE_DECAY * seen + (1 - USAGE_DECAY) * counts * len(seen) / codes.size


def _restart(
    model: SNAC, average: SNAC, usage: tuple[Array, ...], quantized: Quantized, least: float, key: Array
) -> tuple[Array, ...]:
    """Puts vectors of the batch in the place of codebook rows that are hardly chosen, in both models; returns the usage
    after it (Dhariwal et al., 2020, arXiv:2005.00341, section 3.1)."""
    after = []
    for i, (seen, vectors) in enumerate(zip(usage, quantized.z_e, strict=True)):
        candidates = vectors.reshape(-1, vectors.shape[-1])
        drawn = candidates[jax.random.randint(jax.random.fold_in(key, i), seen.shape, 0, len(candidates))]
        dead = seen < least
        for each in (model, average):
            codebook = each.quantizer.quantizers[i].codebook
            codebook.set_value(jnp.where(dead[:, None], drawn, codebook[...]))
        after.append(jnp.where(dead, 1, seen))
    return tuple(after)


def _health(usage: Array) -> Metrics:
    """Of a codebook: the fraction of rows that are used at least a tenth of their share, and the perplexity: as many
    rows, used equally, would carry as much information."""
    shares = usage / usage.sum()
    entropy = -(shares * jnp.log(jnp.maximum(shares, 1e-12))).sum()
    return {"used": (usage > 0.1).mean(), "perplexity": jnp.exp(entropy)}
