"""Several processes as one job, through JAX's distributed runtime."""

import jax

# A process with little to do waits this long for one with much to do. A process that dies is noticed by its missing
# heartbeats.
_BARRIER_TIMEOUT_MS = 7 * 24 * 3600 * 1000


def join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Join the other processes of the job: those named, or those that JAX finds (TPU pods, Slurm, Open MPI), or none.

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


def barrier(place: str) -> None:
    """Return when every process of the job has called this with the same `place`."""
    if jax.process_count() > 1:
        from orbax.checkpoint import multihost

        multihost.get_barrier_sync_fn()(key=f"snax: {place}", timeout_ms=_BARRIER_TIMEOUT_MS)
