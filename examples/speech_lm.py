"""Train a small language model of speech and sample from it: `python examples/speech_lm.py TRAIN HELD_OUT OUT`.

TRAIN and HELD_OUT are folders of speech, such as train/en and held_out/en from recipes/prompts.py. OUT is the output
folder for tokens, loss curves and the sampled speech. docs/language_models.md explains each step. Needs the `train`
extra. On Linux GLIBC_TUNABLES=glibc.malloc.hugetlb=1 makes it faster.
"""

import functools
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import soundfile
from flax import nnx
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Float, Int
from matplotlib.figure import Figure

import snax
from snax.extract.config import ExtractConfig
from snax.extract.run import extract
from snax.tokens import TokenLayout, token_layout

STEPS, EVAL_EVERY, BATCH = 320, 20, 16
LENGTH, WINDOW = 224, 112  # tokens of a training sequence (1.28 s), and of the sliding attention window
DIM, LAYERS, HEADS, LEARNING_RATE, WEIGHT_DECAY = 192, 4, 4, 2e-3, 0.1
SECONDS, TEMPERATURE = 10, 0.9  # of the sampled speech
START = -1  # the input at the first position, and padding of the held-out tokens
Cache = tuple[Array, Array]  # keys and values of a block


class Block(nnx.Module):
    """A transformer block with rotary positions and sliding-window attention."""

    def __init__(self, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.attention_norm, self.mlp_norm = nnx.RMSNorm(DIM, rngs=rngs), nnx.RMSNorm(DIM, rngs=rngs)
        self.qkv, self.out = linear(DIM, 3 * DIM), linear(DIM, DIM)
        self.up, self.down = linear(DIM, 4 * DIM), linear(4 * DIM, DIM)

    def __call__(self, x: Array, positions: Int[Array, " n"], cache: Cache | None) -> tuple[Array, Cache]:
        q, k, v = jnp.split(self.qkv(self.attention_norm(x)).reshape(*x.shape[:2], 3 * HEADS, -1), 3, axis=2)
        q, k = rotate(q, positions), rotate(k, positions)
        masking: dict[str, Any] = {"is_causal": True, "local_window_size": (WINDOW - 1, 0)}
        if cache is not None:  # one token, which replaces the oldest one in the cache
            index, masking = positions[0] % WINDOW, {"mask": (jnp.arange(WINDOW) <= positions[0])[None, None, None]}
            k, v = (jax.lax.dynamic_update_slice_in_dim(a, b, index, 1) for a, b in zip(cache, (k, v), strict=True))
        x += self.out(jax.nn.dot_product_attention(q, k, v, **masking).reshape(x.shape))
        return x + self.down(jax.nn.gelu(self.up(self.mlp_norm(x)))), (k, v)


def rotate(x: Float[Array, "batch n heads head_dim"], positions: Int[Array, " n"]) -> Array:
    """Rotate queries or keys by their positions (RoPE)."""
    frequencies = 10_000 ** -jnp.linspace(0, 1, x.shape[-1] // 2, endpoint=False)
    angles = jnp.outer(positions.astype(jnp.float32), frequencies)[None, :, None]
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * jnp.cos(angles) - b * jnp.sin(angles), a * jnp.sin(angles) + b * jnp.cos(angles)], -1)


class SpeechLM(nnx.Module):
    """A decoder-only transformer. Each level has a table of embeddings, initially a projection of its codebook."""

    def __init__(self, codec: snax.SNAC, layout: TokenLayout, rngs: nnx.Rngs):
        self.levels, normal = tuple(level for level, _ in layout.slots), nnx.initializers.normal(0.02)
        rows = jnp.stack([level.codebook[...] for level in codec.quantizer.quantizers])
        rows /= jnp.linalg.norm(rows, axis=-1, keepdims=True)
        self.embedding = nnx.Param(rows @ normal(rngs.params(), (len(rows), rows.shape[-1], DIM)))
        self.slot_embedding = nnx.Param(normal(rngs.params(), (len(self.levels), DIM)))  # zeros break RMSNorm at START
        self.blocks, self.norm = nnx.List([Block(rngs) for _ in range(LAYERS)]), nnx.RMSNorm(DIM, rngs=rngs)

    def __call__(
        self, inputs: Int[Array, "batch n"], position: int | Int[Array, ""] = 0, cache: list[Cache] | None = None
    ) -> tuple[Float[Array, "batch n codebook_size"], list[Cache]]:
        """Return the logits of the tokens that follow `inputs`, and the new cache.

        `inputs` are whole groups, or with a cache one token. `position` is that of the first of them.
        """
        slots, levels, positions = len(self.levels), jnp.array(self.levels), position + jnp.arange(inputs.shape[1])
        x = jnp.where(inputs[..., None] == START, 0, self.embedding[levels[(positions - 1) % slots], inputs])
        x += self.slot_embedding[positions % slots][None]
        new = []
        for i, block in enumerate(self.blocks):
            x, block_cache = block(x, positions, cache[i] if cache else None)
            new.append(block_cache)
        tables = self.embedding[levels[positions[:slots] % slots]]  # of each slot, or of the only token
        logits = jnp.einsum("bgsd,svd->bgsv", self.norm(x).reshape(len(x), -1, len(tables), DIM), tables)
        return logits.reshape(*inputs.shape, -1), new

    def init_cache(self) -> list[Cache]:
        return [(jnp.zeros((1, WINDOW, HEADS, DIM // HEADS)),) * 2 for _ in self.blocks]


def losses(model: SpeechLM, tokens: Int[Array, "batch n"]) -> Float[Array, "batch n"]:
    """Return the negative log-likelihood of each token in nats, and 0 for padding."""
    logits, _ = model(jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=START))
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(tokens, 0)) * (tokens != START)


def baselines(train: list[int], held_out: list[int], layout: TokenLayout) -> tuple[float, float]:
    """Return the held-out losses of a unigram model, and of a bigram model with 200 unigram counts as its prior."""
    levels = [level for level, _ in layout.slots]
    slots = [i % len(levels) for i in range(max(len(train), len(held_out)))]
    train_pairs = list(zip(slots, [START, *train], train, strict=False))
    pairs, contexts = Counter(train_pairs), Counter((slot, previous) for slot, previous, _ in train_pairs)
    counts = Counter((levels[slot], token) for slot, _, token in train_pairs)
    unigram, bigram = [], []
    for slot, previous, token in zip(slots, [START, *held_out], held_out, strict=False):
        total = len(train) * levels.count(levels[slot]) / len(levels)
        unigram.append((counts[levels[slot], token] + 1) / (total + layout.codebook_size))
        bigram.append((pairs[slot, previous, token] + 200 * unigram[-1]) / (contexts[slot, previous] + 200))
    return -float(np.log(unigram).mean()), -float(np.log(bigram).mean())


def fit(model: SpeechLM, clips: Any, held_out: list[int]) -> tuple[SpeechLM, list[tuple[int, float, float]]]:
    """Return the trained model, and (step, training loss, held-out loss) of each evaluation."""
    dataset = grain.MapDataset.source(clips).seed(0).shuffle().repeat().map(lambda row: {"tokens": row["tokens"]})
    dataset = grain.experimental.ConcatThenSplitIterDataset(dataset.to_iter_dataset(), length_struct={"tokens": LENGTH})
    batches = iter(dataset.map(lambda row: row["tokens"]).batch(BATCH))
    padded = np.pad(held_out, (0, -len(held_out) % (BATCH * LENGTH)), constant_values=START).reshape(-1, BATCH, LENGTH)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    replicated, sharded = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    schedule = optax.warmup_cosine_decay_schedule(0, LEARNING_RATE, STEPS // 10, STEPS, LEARNING_RATE / 20)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=WEIGHT_DECAY))
    model = jax.device_put(model, replicated)
    opt_state = optimizer.init(model)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(model: SpeechLM, opt_state: Any, tokens: Int[Array, "batch n"]) -> tuple[SpeechLM, Any, Float[Array, ""]]:
        loss, grads = jax.value_and_grad(lambda model: losses(model, tokens).mean())(model)
        updates, opt_state = optimizer.update(grads, opt_state, model)
        return optax.apply_updates(model, updates), opt_state, loss

    evaluate, history, curve, start = jax.jit(losses), list[Array](), [], time.perf_counter()
    for i in range(1, STEPS + 1):
        model, opt_state, loss = step(model, opt_state, jax.device_put(next(batches), sharded))
        history.append(loss)
        if i % EVAL_EVERY == 0:
            total = sum(float(evaluate(model, jax.device_put(tokens, sharded)).sum()) for tokens in padded)
            curve.append((i, float(np.mean(history[-EVAL_EVERY:])), total / len(held_out)))
            seconds = time.perf_counter() - start
            print("step {}: training loss {:.3f}, held-out loss {:.3f}, {:.0f} s".format(*curve[-1], seconds))
    return model, curve


@functools.partial(jax.jit, static_argnames="count")
def sample(model: SpeechLM, state: Any, key: Array, count: int) -> tuple[Any, Int[Array, " count"]]:
    """Sample the next `count` tokens. The state is the last token, its position and the cache."""

    def step(state: Any, key: Array) -> tuple[Any, Int[Array, ""]]:
        token, position, cache = state
        logits, cache = model(token[None, None], position, cache)
        token = jax.random.categorical(key, logits[0, 0] / TEMPERATURE)
        return (token, position + 1, cache), token

    return jax.lax.scan(step, state, jax.random.split(key, count))


def main() -> None:
    codec, out = snax.load("mini_16khz"), Path(sys.argv[3])
    layout, rate = token_layout("shared", codec.config), codec.config.sampling_rate
    clips, tokens = {}, {}
    for part, folder in (("train", sys.argv[1]), ("held_out", sys.argv[2])):
        # On the command line: snax extract FOLDER -o OUT/PART -m mini_16khz --tokens shared
        extract(codec, ExtractConfig((folder,), out=str(out / part), model="mini_16khz", tokens="shared"))
        clips[part] = snax.open_tokens(out / part)
        tokens[part] = [int(token) for i in range(len(clips[part])) for token in clips[part][i]["tokens"]]
        print(f"{part}: {len(clips[part])} clips, {len(tokens[part])} tokens")
    unigram, bigram = baselines(tokens["train"], tokens["held_out"], layout)
    print(f"held-out loss: uniform {np.log(layout.codebook_size):.3f}, unigram {unigram:.3f}, bigram {bigram:.3f}")
    model, curve = fit(SpeechLM(codec, layout, nnx.Rngs(0)), clips["train"], tokens["held_out"])
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes, (steps, *curves) = figure.subplots(), zip(*curve, strict=True)
    axes.plot(steps, np.transpose(curves), label=["training", "held out"])
    axes.axhline(unigram, color="gray", linestyle=":", label="held out, unigram")
    axes.axhline(bigram, color="gray", linestyle="--", label="held out, bigram")
    axes.set(xlabel="step", ylabel="nats per token")
    axes.legend()
    figure.savefig(out / "losses.png", dpi=80)
    decoder, start = snax.StreamDecoder(codec), time.perf_counter()
    lm_state, decoder_state = (jnp.array(START), jnp.array(0), model.init_cache()), decoder.init_state()
    with soundfile.SoundFile(out / "speech.wav", "w", rate, 1) as file:
        for key in jax.random.split(jax.random.key(0), SECONDS):
            lm_state, new = sample(model, lm_state, key, rate // codec.config.pad_multiple * len(layout.slots))
            decoder_state, audio = decoder.step(decoder_state, layout.unflatten(np.asarray(new)[None]))
            file.write(audio[0, 0])
        file.write(decoder.flush(decoder_state)[0, 0])
    print(f"{SECONDS} s of speech sampled and decoded in {time.perf_counter() - start:.1f} s: {out / 'speech.wav'}")


if __name__ == "__main__":
    main()
