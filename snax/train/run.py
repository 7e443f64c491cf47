"""A training run: from settings to models, whenever it is killed.

settings.json       what the run was told; another run must be told the same
audio/, held_out/   decoded audio, of process 0; other processes have folders of their own
checkpoints/12000   all that the next step needs, the place in the data too; the last two are kept
models/12000        the averaged codec for `snax.load`
log.jsonl           a line each time that something was measured
tensorboard/        the same, with audio and spectrograms of the held-out clips
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
from . import settings as told
from .data import DataError, Stored, crops, store
from .journal import Journal
from .settings import Settings, SettingsError
from .start import fit_quantizer
from .step import State, begin, step
from .validation import validate

# Held-out clips that are evaluated while training, the first of them; `snax eval` takes all.
_VALIDATED = 32


class DivergedError(ValueError):
    """Losses that are no numbers any more."""


def train(settings: Settings, out: Path, source: str | None, decoders: int) -> Path:
    """Trains to the end, from where an earlier run in the same folder stopped; returns the folder of the last model.

    Args:
        source: the model to train on, as in `snax.load`; None for one whose weights are drawn.
        decoders: processes that decode the corpus.

    Raises:
        SettingsError: if the folder is of another run, or the settings and `source` do not say which model.
        CorpusError, DataError: for a corpus that can't be used.
        ValueError, OSError: as `snax.load` does.
    """
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    everywhere, divided = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    if settings.data.batch % jax.device_count():
        raise DataError(f"a batch of {settings.data.batch} can't be divided among {jax.device_count()} devices.")
    model = _model(settings, source, everywhere)
    _claim(out, settings, source)  # not before: a model that can't be had leaves the folder to another
    distributed.barrier("claimed")  # before anything else is in it
    config = model.config
    stored, held_out = _decoded(settings, config.sampling_rate, out, decoders)
    batches = iter(crops(stored, settings.data.crop_samples(config), settings.data, settings.seed))
    checkpoints = ocp.training.Checkpointer(
        out.absolute() / "checkpoints",
        save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
        preservation_policy=ocp.training.preservation_policies.LatestN(2),
        cleanup_tmp_directories=True,
    )
    if checkpoints.latest is None and source is None:
        audio = jax.make_array_from_process_local_data(divided, next(batches))
        model = _compiled(jax.jit(fit_quantizer, out_shardings=everywhere), model, audio)(model, audio)
    state = _resumed(checkpoints, model, settings, batches, everywhere)
    done = int(state.step)
    journal = Journal(out, done, settings.steps, config.sampling_rate) if jax.process_index() == 0 else None

    begins = settings.steps if settings.discriminators is None else settings.discriminators.begin
    steps = dict[bool, jax.stages.Compiled]()
    measured: list[dict[str, jax.Array]] = []
    last, latest = time.perf_counter(), out / "models" / str(settings.steps)
    while done < settings.steps:
        audio = jax.make_array_from_process_local_data(divided, next(batches))
        if (judged := done >= begins) not in steps:
            program = functools.partial(step, settings=settings, judged=judged)
            steps[judged] = _compiled(jax.jit(program, donate_argnums=0, out_shardings=everywhere), state, audio)
        state, metrics = steps[judged](state, audio)
        measured.append(metrics)
        done += 1
        if done % settings.log == 0 or done == settings.steps:
            means = {name: float(np.mean([each[name] for each in measured if name in each])) for name in metrics}
            _check_finite(means, done)
            seconds = time.perf_counter() - last
            if journal is not None:
                journal.trained(done, means, len(measured) / seconds)
            measured, last = [], time.perf_counter()
        if done % settings.evaluate == 0 or done == settings.steps:
            latest = out / "models" / str(done)
            if not latest.exists():
                checkpoint.save(state.average, latest)
            if held_out is not None and journal is not None:
                journal.validated(done, *validate(_on_one_device(state.average), held_out, _VALIDATED))
            distributed.barrier("validated")  # by the first process, for as long as it takes
            last = time.perf_counter()
        if done % settings.checkpoint == 0 or done == settings.steps:
            checkpoints.save_async(done, _leaves(state), force=True, custom_metadata={"data": batches.get_state()})
    checkpoints.close()
    if journal is not None:
        journal.close()
    return latest


def _claim(out: Path, settings: Settings, source: str | None) -> None:
    """Makes the folder this run's, or sees that it is."""
    ours = json.dumps(told.to_dict(settings) | {"from": source}, indent=1)
    path = out / "settings.json"
    if path.exists():
        if (theirs := path.read_text()) != ours:
            changed = sorted(key for key, value in json.loads(ours).items() if json.loads(theirs).get(key) != value)
            raise SettingsError(
                f"{out} has a run with other settings, in {', '.join(changed)}: choose another folder, or delete it."
            )
    elif jax.process_index() == 0:
        out.mkdir(parents=True, exist_ok=True)
        if others := sorted(each.name for each in out.iterdir()):
            raise SettingsError(f"{out} is not empty, and not of a run: it has {', '.join(others[:3])}.")
        with atomic_write(path) as temporary:
            temporary.write_text(ours)


def _model(settings: Settings, source: str | None, sharding: NamedSharding) -> SNAC:
    if (source is None) == (settings.model is None):
        raise SettingsError("a run begins with either the `model` of its settings or one to start --from.")
    if source is not None:
        return pretrained.load(source, sharding=sharding)
    assert settings.model is not None
    return SNAC(settings.model, rngs=nnx.Rngs(settings.seed))


def _decoded(settings: Settings, rate: int, out: Path, decoders: int) -> tuple[Stored, Stored | None]:
    """This process's part of the corpus, and in process 0 the held-out clips; once all processes have theirs."""
    process, data = jax.process_index(), settings.data
    folder = out if process == 0 else out / f"process-{process}"
    stored = store(data.inputs, rate, folder / "audio", decoders, process, jax.process_count())
    held_out = None
    if data.held_out and process == 0:
        held_out = store(data.held_out, rate, folder / "held_out", decoders)
    distributed.barrier("decoded")  # what they do together from here on has deadlines
    return stored, held_out


def _compiled(program: jax.stages.Wrapped, *arguments: Any) -> jax.stages.Compiled:
    """The program for such arguments, once all processes have it: one may find in its cache what takes another long,
    and what they then compute together has deadlines."""
    compiled = program.lower(*arguments).compile()
    distributed.barrier("compiled")
    return compiled


def _resumed(
    checkpoints: ocp.training.Checkpointer, model: SNAC, settings: Settings, batches: Any, sharding: NamedSharding
) -> State:
    """The state of the last checkpoint, with `batches` put where it was; that before the first step if none."""
    make = functools.partial(begin, settings=settings)
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


def _leaves(state: State) -> dict[str, Any]:
    """The state's arrays by name: Orbax restores those of a dictionary, but not those of modules."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.leaves_with_path(state)
    }


def _on_one_device(model: SNAC) -> SNAC:
    """A copy of what is everywhere."""
    return jax.tree.map(lambda parameter: jnp.asarray(parameter.addressable_data(0)), model)


def _check_finite(means: dict[str, float], step: int) -> None:
    wrong = [name for name, value in means.items() if not np.isfinite(value)]
    if wrong:
        raise DivergedError(
            f"at step {step} these are no numbers any more: {', '.join(wrong)}. The last checkpoint is from before: "
            "a lower learning rate or `optimizer.clip` may help."
        )
