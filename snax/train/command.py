"""The `snax train` command."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import jax

from .. import extras


def add(commands: Any) -> None:
    """Add the command to a parser."""
    what = "Trains a codec, or trains one on, on all devices and hosts. Stopped, the same command goes on."
    parser = commands.add_parser("train", help=what, description=what)
    parser.set_defaults(run=_run)
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a TOML file: see docs/training.md")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FOLDER", help="a new folder for the run")
    parser.add_argument("--from", dest="source", metavar="MODEL", help="train on: name, folder, URL or hub id")
    several = parser.add_argument_group("several processes", "On TPU pods, Slurm and Open MPI they find each other.")
    several.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 is, and a free port there")
    several.add_argument("--num-processes", type=int, metavar="N")
    several.add_argument("--process-id", type=int, metavar="I", help="0 to N - 1")


def _run(arguments: argparse.Namespace) -> int:
    try:
        from .. import distributed, signals
        from . import run
        from .config import read
    except ImportError as error:
        raise extras.missing(error, "train") from error
    config = read(arguments.config)
    signals.exit_on_sigterm()
    distributed.join(arguments.coordinator, arguments.num_processes, arguments.process_id)
    with signals.leaving_on_errors():
        last = run.train(config, arguments.out, arguments.source, os.cpu_count() or 1)
    if jax.process_index() == 0:
        print(f"The trained codec: snax.load({os.fspath(last)!r})", file=sys.stderr)
    return 0
