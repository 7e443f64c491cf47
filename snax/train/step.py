"""The training step: a pure function of the training state and a batch."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jaxtyping import Float, Int32

from ..codec import compiled
from ..codec.layers import Context
from ..codec.model import SNAC
from ..codec.noise import draw_noise
from ..codec.quantizer import Quantized
from . import losses
from .config import Optimizer, TrainConfig
from .discriminators import Discriminators
from .weight_norm import WeightNormed, merge, split

# Decay of the moving average of codebook usage, which covers a few hundred steps.
USAGE_DECAY = 0.99


class DiscriminatorState(NamedTuple):
    """The discriminators and the state of their optimizer."""

    networks: Discriminators
    opt_state: optax.OptState


class TrainState(NamedTuple):
    """The training state.

    Attributes:
        step: the number of steps taken.
        codec: the trained parameters.
        opt_state: the state of the codec's optimizer.
        ema: the codec with the exponential moving average of its weights.
        usage: for each level, a moving average of how often each codebook row is selected, relative to an equal share.
        discriminator_state: None without discriminators.
    """

    step: Int32[Array, ""]
    codec: WeightNormed
    opt_state: optax.OptState
    ema: SNAC
    usage: tuple[Float[Array, " codebook_size"], ...]
    discriminator_state: DiscriminatorState | None


Metrics = dict[str, Float[Array, ""]]


def compiler_options(adversarial: bool) -> dict[str, bool | int | str]:
    """Return compiler options for a program of training on JAX's default backend."""
    options = compiled.compiler_options(jax.default_backend())
    # Eigen makes the discriminators' convolutions faster than YNNPACK does, but the codec's gradients slower
    # (benchmarks/README.md, "Training").
    eigen = ("xla_cpu_experimental_ynn_fusion_type", "")
    if adversarial and jax.default_backend() == "cpu" and compiled.is_known(*eigen):
        options |= [eigen]
    return options


def init_state(model: SNAC, config: TrainConfig) -> TrainState:
    """Initialize the state for training `model`."""
    codec = split(model)
    discriminator_state = None
    if (sizes := config.discriminators) is not None:
        networks = Discriminators(
            sizes.periods, sizes.fft_sizes, sizes.period_widths, sizes.spectrum_width, rngs=nnx.Rngs(config.seed)
        )
        optimizer = _optimizer(config.optimizer, config.optimizer.max_grad_norm_discriminators)
        discriminator_state = DiscriminatorState(networks, optimizer.init(networks))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        codec=codec,
        opt_state=_optimizer(config.optimizer, config.optimizer.max_grad_norm).init(codec),
        ema=model,
        usage=tuple(jnp.ones(len(level.codebook[...])) for level in model.quantizer.quantizers),
        discriminator_state=discriminator_state,
    )


def train_step(
    state: TrainState, audio: Float[Array, "batch 1 samples"], config: TrainConfig, *, adversarial: bool
) -> tuple[TrainState, Metrics]:
    """Take one training step.

    Args:
        state: the current state.
        audio: a batch whose length is a multiple of the codec's pad multiple.
        config: the configuration.
        adversarial: whether to train and use the discriminators. They are updated before the codec, on the same decoded
            audio, as in the Descript Audio Codec.

    Returns:
        The next state, and metrics: losses before the update, gradient norms before clipping, and codebook usage.
    """
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    rate = state.ema.config.sampling_rate
    weights, metrics = config.losses, dict[str, Array]()

    def round_trip(codec: WeightNormed) -> tuple[tuple[Array, Metrics], Quantized]:
        return _round_trip(merge(codec), audio, key, jnp.dtype(config.dtype))

    (decoded, quantizer_losses), round_trip_vjp, quantized = jax.vjp(round_trip, state.codec, has_aux=True)

    discriminator_state = state.discriminator_state
    if adversarial:
        assert discriminator_state is not None
        discriminator_state, metrics = _discriminator_step(discriminator_state, decoded, audio, config)

    def loss_fn(decoded: Array, quantizer_losses: Metrics) -> tuple[Array, Metrics]:
        terms = dict(quantizer_losses)
        if weights.mel:
            terms["mel"] = losses.mel_loss(decoded, audio, rate)
        if weights.stft:
            terms["stft"] = losses.stft_loss(decoded, audio)
        if weights.spectral_convergence:
            terms["spectral_convergence"] = losses.spectral_convergence_loss(decoded, audio)
        if weights.waveform:
            terms["waveform"] = losses.waveform_loss(decoded, audio)
        if adversarial:
            assert discriminator_state is not None
            networks = _cast(discriminator_state.networks, jnp.dtype(config.dtype))
            fake, real = (_features(networks, x) for x in (decoded, audio))
            terms["adversarial"] = losses.adversarial_loss(fake)
            terms["feature_matching"] = losses.feature_matching_loss(fake, real)
        total = sum((getattr(weights, name) * term for name, term in terms.items()), jnp.zeros(()))
        return total, terms | {"loss": total}

    output_grads, terms = jax.grad(loss_fn, argnums=(0, 1), has_aux=True)(decoded, quantizer_losses)
    (grads,) = round_trip_vjp(output_grads)
    optimizer = _optimizer(config.optimizer, config.optimizer.max_grad_norm)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.codec)
    codec = optax.apply_updates(state.codec, updates)

    usage = tuple(_update_usage(level, codes) for level, codes in zip(state.usage, quantized.codes, strict=True))
    # A smaller decay in the first steps, so that the initial weights soon lose their influence.
    decay = jnp.minimum(config.ema_decay, (1 + state.step) / (10 + state.step))
    ema = optax.incremental_update(merge(codec), state.ema, 1 - decay)
    if config.dead_code_threshold:
        restart_key = jax.random.fold_in(key, 1)
        usage = _restart_dead_codes(codec.v, ema, usage, quantized, config.dead_code_threshold, restart_key)

    metrics |= terms | {"grad_norm": optax.tree.norm(grads)}
    for i, level_usage in enumerate(usage):
        metrics |= {f"level_{i}/{name}": value for name, value in _usage_metrics(level_usage).items()}
    return TrainState(state.step + 1, codec, opt_state, ema, usage, discriminator_state), metrics


def _round_trip(model: SNAC, audio: Array, key: Array, dtype: Any) -> tuple[tuple[Array, Metrics], Quantized]:
    """Encode and decode. Return decoded audio, the losses of the quantizer, and the results of the quantizer."""
    model_config = model.config
    with jax.default_matmul_precision(model.precision):
        latents = _cast(model.encoder, dtype)(audio.swapaxes(1, 2).astype(dtype)).astype(jnp.float32)
        quantized = model.quantizer(latents)
        commitment, codebook = losses.quantizer_losses(model.quantizer, quantized)
        noise = None
        if model_config.noise:
            noise = draw_noise(model_config, jax.random.split(key, len(audio)), jnp.arange(latents.shape[1])[None])
        decoded = _cast(model.decoder, dtype)(quantized.z_q.astype(dtype), Context(noise=noise))
    quantizer_losses = {"commitment": commitment, "codebook": codebook}
    return (decoded.astype(jnp.float32).swapaxes(1, 2), quantizer_losses), quantized


def _discriminator_step(
    state: DiscriminatorState, decoded: Array, audio: Array, config: TrainConfig
) -> tuple[DiscriminatorState, Metrics]:
    """Update the discriminators."""

    def loss_fn(networks: Discriminators) -> Array:
        networks = _cast(networks, jnp.dtype(config.dtype))
        fake, real = (_features(networks, x) for x in (decoded, audio))
        return losses.discriminator_loss(fake, real)

    loss, grads = jax.value_and_grad(loss_fn)(state.networks)
    optimizer = _optimizer(config.optimizer, config.optimizer.max_grad_norm_discriminators)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.networks)
    networks = optax.apply_updates(state.networks, updates)
    return DiscriminatorState(networks, opt_state), {"loss_d": loss, "grad_norm_d": optax.tree.norm(grads)}


def _features(networks: Discriminators, audio: Array) -> list[list[Array]]:
    return jax.tree.map(lambda x: x.astype(jnp.float32), networks(audio))


def _cast(module: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda parameter: parameter.astype(dtype), module)


def _optimizer(config: Optimizer, max_grad_norm: float) -> optax.GradientTransformation:
    """AdamW with gradients clipped by their global norm."""
    warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    decay = optax.exponential_decay(config.learning_rate, 1, config.lr_decay)
    schedule = optax.join_schedules([warmup, decay], [config.warmup_steps])
    b1, b2 = config.betas
    return optax.chain(
        optax.clip_by_global_norm(max_grad_norm), optax.adamw(schedule, b1=b1, b2=b2, weight_decay=config.weight_decay)
    )


def _update_usage(usage: Array, codes: Array) -> Array:
    counts = jnp.zeros(len(usage)).at[codes.reshape(-1)].add(1.0)
    return USAGE_DECAY * usage + (1 - USAGE_DECAY) * counts * len(usage) / codes.size


def _restart_dead_codes(
    model: SNAC, ema: SNAC, usage: tuple[Array, ...], quantized: Quantized, threshold: float, key: Array
) -> tuple[Array, ...]:
    """Replace codebook rows whose usage is below the threshold with random vectors of the batch, in both models.

    Returns the new usage, which is 1 for replaced rows. From Dhariwal et al., 2020, arXiv:2005.00341, section 3.1.
    """
    updated = []
    for i, (level_usage, vectors) in enumerate(zip(usage, quantized.z_e, strict=True)):
        candidates = vectors.reshape(-1, vectors.shape[-1])
        new_rows = candidates[jax.random.randint(jax.random.fold_in(key, i), level_usage.shape, 0, len(candidates))]
        dead = level_usage < threshold
        for codec in (model, ema):
            codebook = codec.quantizer.quantizers[i].codebook
            codebook.set_value(jnp.where(dead[:, None], new_rows, codebook[...]))
        updated.append(jnp.where(dead, 1, level_usage))
    return tuple(updated)


def _usage_metrics(usage: Array) -> Metrics:
    """Return the fraction of codebook rows with over a tenth of an equal share, and the perplexity of the codes."""
    shares = usage / usage.sum()
    entropy = -(shares * jnp.log(jnp.maximum(shares, 1e-12))).sum()
    return {"used": (usage > 0.1).mean(), "perplexity": jnp.exp(entropy)}
