"""Several hosts as one job, through JAX's own runtime; and the signal that a host is about to be taken away."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

import jax

# The exit code for "stopped half-way, nothing lost: run me again" (EX_TEMPFAIL of sysexits.h).
RUN_AGAIN = 75
# A host with little to do waits for one with much; one that dies is noticed by its missing heartbeats.
_PATIENCE_MS = 7 * 24 * 3600 * 1000


def exit_on_sigterm() -> None:
    """From now on SIGTERM ends this process at once with `RUN_AGAIN`, wherever it is, be it compiling.

    Python's handlers wait until the main thread is back from what it computes; what is written to the wakeup
    descriptor does not, and a thread reads it.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.signal(signal.SIGTERM, lambda number, frame: None)  # without one nothing is written
    signal.set_wakeup_fd(write)

    def wait() -> None:
        while os.read(read, 1)[0] != signal.SIGTERM:
            pass
        print("snax: stopped by SIGTERM; the same command again goes on from here.", file=sys.stderr, flush=True)
        leave(RUN_AGAIN)

    threading.Thread(target=wait, daemon=True).start()


def leave(code: int) -> None:
    """Ends this process without waiting for the others, as JAX's own exit would: they notice and end too."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def leaving_on_errors() -> Iterator[None]:
    """In a job of several processes an error in the block is said and ends this process at once: an orderly end would
    wait for the others, and they for this process."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if jax.process_count() == 1:
            raise
        print(f"snax: process {jax.process_index()}: {type(error).__name__}: {error}", file=sys.stderr)
        leave(2)


def join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins the other processes of the job: those named, or those that JAX finds (TPU pods, Slurm, Open MPI), or none.

    Must be called before anything else of JAX is.
    """
    # Its service takes SIGTERM for itself.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except ValueError as error:
        # What JAX says when it finds no cluster: then, if nobody spoke of others, this process is the whole job.
        told = (coordinator, num_processes, process_id) != (None, None, None)
        if told or "coordinator_address should be defined" not in str(error):
            what = "Give all of --coordinator, --num-processes and --process-id, or none."
            raise ValueError(f"{error} {what}") from None


def enable_compilation_cache() -> None:
    """Keep compiled programs for later processes, unless JAX was given a folder for them.

    Compiling takes a second on a CPU and a minute on a TPU. The key of JAX's cache includes jaxlib's version, XLA's
    flags and, on CPUs, the processor's features, so machines of several kinds can share a home directory.
    """
    folder: str | None = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]  # JAX adds it as it runs
    if folder is None:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(home, "snax", "compiled"))
        # JAX's default, a second, leaves out programs for short clips.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def wait_for_all(place: str) -> None:
    """Returns when every process of the job has come to this place."""
    if jax.process_count() > 1:
        from orbax.checkpoint import multihost

        multihost.get_barrier_sync_fn()(key=f"snax: {place}", timeout_ms=_PATIENCE_MS)
