"""Types of options that several commands share."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Group, Parameter
from pydantic import Field

AudioInputs = Annotated[
    tuple[str, ...],
    Field(min_length=1),
    Parameter(
        help="Audio files, folders, patterns, manifests (.jsonl, .csv, .parquet with a column of paths), tables with "
        "audio (.parquet) and tars; local or URLs."
    ),
]
ModelName = Annotated[
    str, Parameter(alias="-m", help="Name, folder, URL or hub id of the model. See `snax info snac_24khz`.")
]
Channels = Annotated[
    Literal["mix", "separate"], Parameter(help="Mix the channels to mono, or process each of them on its own.")
]


@Parameter(name="*")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """Where a command writes files.

    Args:
        out: Output folder. Default: the folder of each input.
        force: Overwrite existing files.
    """

    out: Annotated[Path | None, Parameter(alias="-o")] = None
    force: Annotated[bool, Parameter(alias="-f")] = False


@Parameter(name="*", group=Group("Several processes", help="JAX finds the others on TPU pods, Slurm and Open MPI."))
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """The processes that run one job, for clusters that JAX does not recognize.

    Args:
        coordinator: HOST:PORT of process 0, with a free port.
        num_processes: Number of processes.
        process_id: Index of this process, from 0.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
