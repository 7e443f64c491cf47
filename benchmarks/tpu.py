"""Compile for TPUs, on a machine without a TPU: `python -m benchmarks.tpu`.

Run it in its own environment (see benchmarks/README.md). libtpu compiles for any topology on any machine. Compiles
encoding and decoding of 4 clips of 10.24 s per chip for each published architecture, and the training step of
recipes/snac_24khz.toml with discriminators and one example per chip. Writes benchmarks/tpu.json.
"""

import collections
import datetime
import functools
import json
import os
import re
import time
from pathlib import Path
from typing import Any

os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import snax
from benchmarks.hlo import COLLECTIVES, instruction_costs, size
from snax.codec.config import PUBLISHED_CONFIGS
from snax.train.config import read
from snax.train.step import init_state, train_step

HERE = Path(__file__).parent
CLIPS, SECONDS = 4, 10.24  # per chip

CASES = [
    *(
        (topology, name, operation, jnp.float32)
        for topology in ("v5e:2x4", "v5e:16x16")
        for name in PUBLISHED_CONFIGS
        for operation in ("encode", "decode")
    ),
    ("v5e:2x4", "snac_24khz", "encode", jnp.bfloat16),
    ("v5e:2x4", "snac_24khz", "decode", jnp.bfloat16),
]


def main() -> None:
    rows = []
    for topology, name, operation, dtype in CASES:
        rows.append(analyze(topology, name, operation, dtype))
        print(json.dumps({k: v for k, v in rows[-1].items() if k != "kinds"}), flush=True)
    print_kinds(rows[0])
    header = {"date": datetime.date.today().isoformat(), "jax": jax.__version__}
    results = header | {"per second of audio": rows, "training step": train("v5e:16x16")}
    (HERE / "tpu.json").write_text(json.dumps(results, indent=1) + "\n")


def train(topology: str) -> dict[str, Any]:
    """Return the memory and the exchanged data per chip of a training step. Compiling takes 25 CPU minutes."""
    config = read(HERE.parent / "recipes" / "snac_24khz.toml")
    model_config = config.model
    assert model_config is not None
    devices = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices
    mesh = Mesh(np.array(devices), ("data",))
    replicated, sharded = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    samples = config.data.crop_samples(model_config)
    model = nnx.eval_shape(lambda: snax.SNAC(model_config, rngs=nnx.Rngs(0)))
    state = jax.eval_shape(functools.partial(init_state, config=config), model)
    state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated), state)
    audio = jax.ShapeDtypeStruct((config.data.batch, 1, samples), jnp.float32, sharding=sharded)
    step = functools.partial(train_step, config=config, adversarial=True)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=replicated)
    start = time.process_time()
    compiled = jitted.lower(state, audio).compile()
    seconds = time.process_time() - start
    memory = compiled.memory_analysis()
    exchanged: collections.Counter[str] = collections.Counter()
    for name, bytes_ in collectives(compiled.as_text()):
        exchanged[name] += bytes_
    discriminator_state = state.discriminator_state
    trained = [state.codec, discriminator_state.networks] if discriminator_state else [state.codec]
    row = {
        "date": datetime.date.today().isoformat(),
        "topology": topology,
        "dtype": config.dtype,
        "batch": config.data.batch,
        "compile_cpu_s": round(seconds),
        "arguments_MB": round(memory.argument_size_in_bytes / 1e6),
        "temporary_MB": round(memory.temp_size_in_bytes / 1e6),
        "gradients_MB": round(sum(leaf.size for leaf in jax.tree.leaves(trained)) * 4 / 1e6, 1),
        "exchanged_MB": {name: round(bytes_ / 1e6, 3) for name, bytes_ in exchanged.items()},
    }
    print(json.dumps(row), flush=True)
    return row


def collectives(text: str) -> list[tuple[str, int]]:
    """Return the opcode and source of each collective in a compiled program, and the bytes of its result."""
    result = []
    for line in text.splitlines():
        if match := re.search(rf" = (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(", line):
            scope = re.search(r'op_name="([^"]*)"', line)
            result.append((f"{match[2]} {scope[1].rpartition('/')[2] if scope else ''}".strip(), size(match[1])))
    return result


def analyze(topology: str, name: str, operation: str, dtype: Any) -> dict[str, Any]:
    """Return memory traffic and cycles per second of audio, and the seconds of compilation."""
    config = PUBLISHED_CONFIGS[name]
    devices = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices
    mesh = Mesh(np.array(devices), ("data",))
    samples = round(SECONDS * config.sampling_rate / config.pad_multiple) * config.pad_multiple
    audio_seconds = CLIPS * samples / config.sampling_rate

    def rows(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, PartitionSpec("data"))
        return jax.ShapeDtypeStruct((CLIPS * len(devices), *shape), dtype, sharding=sharding)

    precision = "highest" if dtype == jnp.float32 else "default"
    model = nnx.eval_shape(lambda: snax.SNAC(config, precision=precision, rngs=nnx.Rngs(0)))
    replicated = NamedSharding(mesh, PartitionSpec())
    model = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=replicated), model)
    if operation == "encode":
        lowered = jax.jit(snax.SNAC._encode).lower(model, rows((1, samples), dtype))
    else:
        frames = samples // config.hop_length
        codes = tuple(rows((frames // stride,), jnp.int32) for stride in config.vq_strides)
        lowered = jax.jit(snax.SNAC._decode).lower(model, codes, None)
    start = time.perf_counter()
    compiled = lowered.compile()
    compile_seconds = time.perf_counter() - start
    text = compiled.as_text()
    costs = list(instruction_costs(text))
    kinds = collections.defaultdict(lambda: [0.0, 0.0, 0.0])
    for cost in costs:
        for i, amount in enumerate((cost.main_memory_bytes / 1e6, cost.bytes / 1e6, cost.cycles / 1e3)):
            kinds[cost.instruction.kind][i] += amount / audio_seconds
    memory = compiled.memory_analysis()
    return {
        "topology": topology,
        "model": name,
        "what": operation,
        "dtype": jnp.dtype(dtype).name,
        "compile_s": round(compile_seconds, 1),
        "collectives": len(re.findall(rf" (?:{'|'.join(COLLECTIVES)})[\w-]*\(", text)),
        "temporary_MB": round(memory.temp_size_in_bytes / audio_seconds / 1e6, 2),
        "main_memory_GB": round(sum(cost.main_memory_bytes for cost in costs) / audio_seconds / 1e9, 4),
        "with_vector_memory_GB": round(sum(cost.bytes for cost in costs) / audio_seconds / 1e9, 3),
        "estimated_kilocycles": round(sum(cost.cycles for cost in costs) / audio_seconds / 1e3, 1),
        "kinds": {kind: [round(x, 3) for x in amounts] for kind, amounts in kinds.items()},
    }


def print_kinds(row: dict[str, Any]) -> None:
    print(f"\n{row['model']}, {row['what']}, {row['dtype']}, per second of audio")
    print(f"{'':16} {'main memory, MB':>15} {'with vector memory, MB':>22} {'estimated kilocycles':>21}")
    for kind, amounts in sorted(row["kinds"].items(), key=lambda item: -item[1][2]):
        print(f"{kind:16} {amounts[0]:15.2f} {amounts[1]:22.1f} {amounts[2]:21.1f}")


if __name__ == "__main__":
    main()
