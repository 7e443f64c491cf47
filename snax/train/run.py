"""The training loop. A run that was interrupted continues from its last checkpoint.

The folder of a run contains:

config.json         the configuration; a resumed run may change the fields in `config.FREE_FIELDS` only
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
from .config import FREE_FIELDS, ConfigError, TrainConfig, to_dict
from .data import DataError, DecodedCorpus, crops, decode_corpus
from .metric_writer import MetricWriter
from .preemption import PreemptedError, deferred_preemption
from .quantizer_init import fit_quantizer
from .step import TrainState, compiler_options, init_state, train_step
from .validation import validate

# Evaluations during training score this many held-out clips, the first ones. `snax eval` scores all clips.
_NUM_EVAL_CLIPS = 32


class DivergedError(ValueError):
    """A loss or gradient norm that is not finite."""


def train(config: TrainConfig, out: Path, source: str | None, decoders: int) -> Path:
    """Train up to step `config.steps`, continuing an earlier run in the same folder.

    Args:
        config: the configuration.
        out: the folder of the run.
        source: the model to start from, as in `snax.load`. None to start from random weights.
        decoders: the number of processes that decode the corpus.

    Returns:
        The folder of the last saved model.

    Raises:
        ConfigError: if the folder belongs to another run, or not exactly one of `config.model` and `source` is given.
        CorpusError, DataError: if the corpus cannot be used, or devices cannot share a batch equally.
        DivergedError: if a loss or gradient norm is not finite.
        PreemptedError: after SIGTERM, with a checkpoint of the last step.
        ValueError, OSError: if the model cannot be loaded, as in `snax.load`.
    """
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    replicated, sharded = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    if config.data.batch % jax.device_count():
        raise DataError(
            f"`data.batch` (={config.data.batch}) must be divisible by the number of devices (={jax.device_count()})."
        )
    model = _initial_model(config, source, replicated)
    _claim_folder(out, config, source)  # after loading, so that a model that cannot be loaded leaves no folder
    distributed.barrier("claimed")  # before any process writes other files
    model_config = model.config
    corpus, held_out = _decode_data(config, model_config.sampling_rate, out, decoders)
    batches = iter(crops(corpus, config.data.crop_samples(model_config), config.data, config.seed))
    checkpoints = ocp.training.Checkpointer(
        out.absolute() / "checkpoints",
        save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
        preservation_policy=ocp.training.preservation_policies.LatestN(2),
        cleanup_tmp_directories=True,
    )
    if checkpoints.latest is None and source is None:
        audio = jax.make_array_from_process_local_data(sharded, next(batches))
        program = jax.jit(fit_quantizer, out_shardings=replicated, compiler_options=compiler_options(False))
        model = _compile(program, model, audio)(model, audio)
    state = _init_or_restore_state(checkpoints, model, config, batches, replicated)
    done = int(state.step)
    if done > config.steps:
        raise ConfigError(
            f"`steps` (={config.steps}) must be at least {done}, the steps that the run in {out} has taken."
        )
    writer = None
    if jax.process_index() == 0:
        writer = MetricWriter(out, done, config.steps, model_config.sampling_rate)

    start_step = config.steps if config.discriminators is None else config.discriminators.start_step
    programs = dict[bool, jax.stages.Compiled]()
    unlogged: list[dict[str, jax.Array]] = []
    start_time, latest_model = time.perf_counter(), out / "models" / str(config.steps)
    with deferred_preemption() as is_preempted:
        preempted = False
        while done < config.steps and not preempted:
            audio = jax.make_array_from_process_local_data(sharded, next(batches))
            if (adversarial := done >= start_step) not in programs:
                step = functools.partial(train_step, config=config, adversarial=adversarial)
                options = compiler_options(adversarial)
                program = jax.jit(step, donate_argnums=0, out_shardings=replicated, compiler_options=options)
                programs[adversarial] = _compile(program, state, audio)
            state, metrics = programs[adversarial](state, audio)
            jax.block_until_ready(unlogged[-1:])  # at most two steps are in progress, so that SIGTERM waits for no more
            unlogged.append(metrics)
            done += 1
            preempted = is_preempted(done)
            is_last = preempted or done == config.steps
            if done % config.log_every == 0 or is_last:
                means = {
                    name: float(np.mean([values[name] for values in unlogged if name in values])) for name in metrics
                }
                _check_finite(means, done)
                seconds = time.perf_counter() - start_time
                if writer is not None:
                    writer.write_train(done, means, len(unlogged) / seconds)
                unlogged, start_time = [], time.perf_counter()
            if done % config.eval_every == 0 or done == config.steps:
                latest_model = out / "models" / str(done)
                if not latest_model.exists():
                    checkpoint.save(state.ema, latest_model)
                if held_out is not None and writer is not None:
                    writer.write_eval(done, *validate(_on_one_device(state.ema), held_out, _NUM_EVAL_CLIPS))
                # Evaluation in process 0 may take longer than the deadline of collectives.
                distributed.barrier("validated")
                start_time = time.perf_counter()
            # At `start_step` another program is compiled. A cluster may not wait for that after SIGTERM.
            if done % config.checkpoint_every == 0 or done == start_step or is_last:
                checkpoints.save_async(
                    done, _named_leaves(state), force=True, custom_metadata={"data": batches.get_state()}
                )
        checkpoints.close()
    if writer is not None:
        writer.close()
    if preempted and done < config.steps:
        raise PreemptedError(f"stopped by SIGTERM after step {done}. Run the same command again to resume.")
    return latest_model


def _claim_folder(out: Path, config: TrainConfig, source: str | None) -> None:
    """Write the configuration to a new folder, or check that the folder belongs to a run with the same one.

    Fields that do not change the trained weights may differ, so that a run can be extended.
    """
    table = to_dict(config) | {"init_from": source}
    path = out / "config.json"
    if path.exists():
        old, new = _flatten(json.loads(path.read_text())), _flatten(table)
        changes = [
            f"`{name}` was {old.get(name)!r}, now {new.get(name)!r}"
            for name in sorted(old.keys() | new.keys())
            if old.get(name) != new.get(name) and name not in FREE_FIELDS
        ]
        if changes:
            raise ConfigError(
                f"{out} contains a run with another configuration: {'; '.join(changes)}. "
                "Use a new output directory, or delete this one."
            )
    elif jax.process_index() == 0:
        out.mkdir(parents=True, exist_ok=True)
        if names := sorted(file.name for file in out.iterdir()):
            raise ConfigError(
                f"{out} is not empty and does not contain a run: it has {', '.join(names[:3])}. "
                "Use a new output directory."
            )
    if jax.process_index() == 0:
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(table, indent=1))


def _flatten(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Replace nested tables by fields with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in table.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _initial_model(config: TrainConfig, source: str | None, sharding: NamedSharding) -> SNAC:
    """Load the model to start from, or initialize one with random weights."""
    if (source is None) == (config.model is None):
        given = "neither" if source is None else "both"
        raise ConfigError(
            f"exactly one of `model` in the configuration and --init-from is required, but {given} was given."
        )
    if source is not None:
        return pretrained.load(source, sharding=sharding)
    assert config.model is not None
    return SNAC(config.model, rngs=nnx.Rngs(config.seed))


def _decode_data(
    config: TrainConfig, rate: int, out: Path, decoders: int
) -> tuple[DecodedCorpus, DecodedCorpus | None]:
    """Decode this process's part of the corpus, and in process 0 the held-out clips. Wait for the other processes."""
    process, data = jax.process_index(), config.data
    folder = out if process == 0 else out / f"process-{process}"
    corpus = decode_corpus(data.inputs, rate, folder / "audio", decoders, process, jax.process_count())
    held_out = None
    if data.held_out and process == 0:
        held_out = decode_corpus(data.held_out, rate, folder / "held_out", decoders)
    distributed.barrier("decoded")  # the next steps contain collectives, which have deadlines
    return corpus, held_out


def _compile(program: jax.stages.Wrapped, *arguments: Any) -> jax.stages.Compiled:
    """Compile the program for the arguments, and wait for the other processes.

    Collectives have deadlines, and compilation times differ: one process may find the program in its cache.
    """
    compiled = program.lower(*arguments).compile()
    distributed.barrier("compiled")
    return compiled


def _init_or_restore_state(
    checkpoints: ocp.training.Checkpointer, model: SNAC, config: TrainConfig, batches: Any, sharding: NamedSharding
) -> TrainState:
    """Restore the state and the position in `batches` from the last checkpoint. Without one, initialize the state."""
    make_state = functools.partial(init_state, config=config)
    if checkpoints.latest is None:
        return jax.jit(make_state, out_shardings=sharding)(model)
    abstract = jax.eval_shape(make_state, model)
    abstract_leaves = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        for name, leaf in _named_leaves(abstract).items()
    }
    leaves = checkpoints.load(checkpoints.latest, abstract_leaves)
    batches.set_state(checkpoints.metadata(checkpoints.latest).custom_metadata["data"])
    return jax.tree.unflatten(jax.tree.structure(abstract), [leaves[name] for name in abstract_leaves])


def _named_leaves(state: TrainState) -> dict[str, Any]:
    """Return the arrays of the state by name. Orbax restores dictionaries of arrays, but not modules."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.leaves_with_path(state)
    }


def _on_one_device(model: SNAC) -> SNAC:
    """Copy replicated arrays to one device."""
    return jax.tree.map(lambda parameter: jnp.asarray(parameter.addressable_data(0)), model)


def _check_finite(means: dict[str, float], step: int) -> None:
    not_finite = [name for name, value in means.items() if not np.isfinite(value)]
    if not_finite:
        raise DivergedError(
            f"training diverged: at step {step} these metrics are not finite: {', '.join(not_finite)}. "
            "Try a lower `optimizer.learning_rate` or `optimizer.max_grad_norm` in a new output directory."
        )
