"""The command `snax train`."""

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from .. import extras
from ..options import Cluster

_log = logging.getLogger(__name__)


def train(
    config: Path,
    *,
    out: Annotated[Path, Parameter(alias="-o")],
    init_from: str | None = None,
    cluster: Cluster = Cluster(),
) -> int:
    """Train or fine-tune a codec.

    Args:
        config: A TOML file. See docs/training.md and recipes/.
        out: Output folder.
        init_from: The model to fine-tune: name, folder, URL or hub id.
    """
    try:
        import jax

        from .. import compilation_cache, distributed, signals
        from . import run
        from .config import read
        from .preemption import PreemptedError
    except ImportError as error:
        raise extras.missing(error, "train") from error
    train_config = read(config)
    compilation_cache.enable()
    signals.exit_on_sigterm()
    distributed.join(cluster.coordinator, cluster.num_processes, cluster.process_id, preemption_service=True)
    with signals.exit_on_error():
        try:
            last = run.train(train_config, out, init_from, os.cpu_count() or 1)
        except PreemptedError as error:
            _log.warning("%s", error)
            return os.EX_TEMPFAIL
    if jax.process_index() == 0:
        print(f"Load the trained codec with snax.load({os.fspath(last)!r}).", file=sys.stderr)
    return 0
