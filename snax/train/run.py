"""The training loop. A run that was killed continues from its last checkpoint. The folder of a run has:

settings.json       the configuration; the folder can't be used with another one
audio/, held_out/   decoded audio of process 0; other processes have their own folders
checkpoints/12000   the training state and the position in the data; the last two are kept
models/12000        the codec with averaged weights, for `snax.load`
log.jsonl           a line for each time that metrics are logged
tensorboard/        the same metrics, with audio and spectrograms of held-out clips
"""

import functools
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from .. import distributed
from ..atomic import atomic_write
from ..codec.model import SNAC
from ..weights import checkpoint, pretrained
from .config import ConfigError, TrainConfig, to_dict
from .data import DataError, Stored, crops, store
from .metric_writer import MetricWriter
from .quantizer_init import fit_quantizer
from .step import TrainState, init_state, train_step
from .validation import validate

# The number of held-out clips in an evaluation during training, the first ones. `snax eval` takes all.
_VALIDATED = 32


class DivergedError(ValueError):
    """A loss or gradient that is not finite."""


def train(config: TrainConfig, out: Path, source: str | None, decoders: int) -> Path:
    """Train to the last step, continuing an earlier run in the same folder. Returns the folder of the last model.

    Args:
        config: the configuration.
        out: the folder of the run.
        source: the model to start from, as in `snax.load`. None to start from random weights.
        decoders: the number of processes that decode the corpus.

    Raises:
        ConfigError: if the folder belongs to another run, or not exactly one of `config.model` and `source` is given.
        CorpusError, DataError: for a corpus that can't be used.
        ValueError, OSError: as `snax.load` does.
    """
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    everywhere, divided = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    if config.data.batch % jax.device_count():
        raise DataError(f"a batch of {config.data.batch} can't be divided among {jax.device_count()} devices.")
    model = _model(config, source, everywhere)
    _claim(out, config, source)  # after loading: if the model can't be loaded, no folder is made
    distributed.barrier("claimed")  # before other files are written
    model_config = model.config
    stored, held_out = _decoded(config, model_config.sampling_rate, out, decoders)
    batches = iter(crops(stored, config.data.crop_samples(model_config), config.data, config.seed))
    checkpoints = ocp.training.Checkpointer(
        out.absolute() / "checkpoints",
        save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
        preservation_policy=ocp.training.preservation_policies.LatestN(2),
        cleanup_tmp_directories=True,
    )
    if checkpoints.latest is None and source is None:
        audio = jax.make_array_from_process_local_data(divided, next(batches))
        model = _compiled(jax.jit(fit_quantizer, out_shardings=everywhere), model, audio)(model, audio)
    state = _resumed(checkpoints, model, config, batches, everywhere)
    done = int(state.step)
    writer = None
    if jax.process_index() == 0:
        writer = MetricWriter(out, done, config.steps, model_config.sampling_rate)

    start_step = config.steps if config.discriminators is None else config.discriminators.start_step
    programs = dict[bool, jax.stages.Compiled]()
    measured: list[dict[str, jax.Array]] = []
    last, latest = time.perf_counter(), out / "models" / str(config.steps)
    while done < config.steps:
        audio = jax.make_array_from_process_local_data(divided, next(batches))
        if (adversarial := done >= start_step) not in programs:
            step = functools.partial(train_step, config=config, adversarial=adversarial)
            program = jax.jit(step, donate_argnums=0, out_shardings=everywhere)
            programs[adversarial] = _compiled(program, state, audio)
        state, metrics = programs[adversarial](state, audio)
        measured.append(metrics)
        done += 1
        if done % config.log_every == 0 or done == config.steps:
            means = {name: float(np.mean([values[name] for values in measured if name in values])) for name in metrics}
            _check_finite(means, done)
            seconds = time.perf_counter() - last
            if writer is not None:
                writer.write_train(done, means, len(measured) / seconds)
            measured, last = [], time.perf_counter()
        if done % config.eval_every == 0 or done == config.steps:
            latest = out / "models" / str(done)
            if not latest.exists():
                checkpoint.save(state.ema, latest)
            if held_out is not None and writer is not None:
                writer.write_eval(done, *validate(_on_one_device(state.ema), held_out, _VALIDATED))
            distributed.barrier("validated")  # process 0 does it, however long it takes
            last = time.perf_counter()
        if done % config.checkpoint_every == 0 or done == config.steps:
            checkpoints.save_async(done, _leaves(state), force=True, custom_metadata={"data": batches.get_state()})
    checkpoints.close()
    if writer is not None:
        writer.close()
    return latest


def _claim(out: Path, config: TrainConfig, source: str | None) -> None:
    """Write the configuration to a new folder, or check that the folder has the same one."""
    text = json.dumps(to_dict(config) | {"from": source}, indent=1)
    path = out / "settings.json"
    if path.exists():
        if (found := path.read_text()) != text:
            changed = sorted(key for key, value in json.loads(text).items() if json.loads(found).get(key) != value)
            raise ConfigError(
                f"{out} has a run with other settings, in {', '.join(changed)}: choose another folder, or delete it."
            )
    elif jax.process_index() == 0:
        out.mkdir(parents=True, exist_ok=True)
        if others := sorted(file.name for file in out.iterdir()):
            raise ConfigError(f"{out} is not empty, and not of a run: it has {', '.join(others[:3])}.")
        with atomic_write(path) as temporary:
            temporary.write_text(text)


def _model(config: TrainConfig, source: str | None, sharding: NamedSharding) -> SNAC:
    if (source is None) == (config.model is None):
        raise ConfigError("a run begins with either the `model` of its settings or one to start --from.")
    if source is not None:
        return pretrained.load(source, sharding=sharding)
    assert config.model is not None
    return SNAC(config.model, rngs=nnx.Rngs(config.seed))


def _decoded(config: TrainConfig, rate: int, out: Path, decoders: int) -> tuple[Stored, Stored | None]:
    """This process's part of the corpus, and in process 0 the held-out clips. Waits for the other processes."""
    process, data = jax.process_index(), config.data
    folder = out if process == 0 else out / f"process-{process}"
    stored = store(data.inputs, rate, folder / "audio", decoders, process, jax.process_count())
    held_out = None
    if data.held_out and process == 0:
        held_out = store(data.held_out, rate, folder / "held_out", decoders)
    distributed.barrier("decoded")  # from here on there are collectives, which have deadlines
    return stored, held_out


def _compiled(program: jax.stages.Wrapped, *arguments: Any) -> jax.stages.Compiled:
    """Compile the program for the arguments, and wait for the other processes.

    Collectives have deadlines, and compilation times differ: one process may find the program in its cache.
    """
    compiled = program.lower(*arguments).compile()
    distributed.barrier("compiled")
    return compiled


def _resumed(
    checkpoints: ocp.training.Checkpointer, model: SNAC, config: TrainConfig, batches: Any, sharding: NamedSharding
) -> TrainState:
    """The state and the position in `batches` of the last checkpoint, or the initial state if there is none."""
    make = functools.partial(init_state, config=config)
    if checkpoints.latest is None:
        return jax.jit(make, out_shardings=sharding)(model)
    abstract = jax.eval_shape(make, model)
    wanted = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        for name, leaf in _leaves(abstract).items()
    }
    leaves = checkpoints.load(checkpoints.latest, wanted)
    batches.set_state(checkpoints.metadata(checkpoints.latest).custom_metadata["data"])
    return jax.tree.unflatten(jax.tree.structure(abstract), [leaves[name] for name in wanted])


def _leaves(state: TrainState) -> dict[str, Any]:
    """The arrays of the state by name. Orbax restores dictionaries of arrays, but not modules."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.leaves_with_path(state)
    }


def _on_one_device(model: SNAC) -> SNAC:
    """Copy replicated arrays to one device."""
    return jax.tree.map(lambda parameter: jnp.asarray(parameter.addressable_data(0)), model)


def _check_finite(means: dict[str, float], step: int) -> None:
    wrong = [name for name, value in means.items() if not np.isfinite(value)]
    if wrong:
        raise DivergedError(
            f"at step {step} these are no numbers any more: {', '.join(wrong)}. The last checkpoint is from before: "
            "a lower learning rate or `optimizer.max_grad_norm` may help."
        )
