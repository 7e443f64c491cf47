"""Multi-process jobs with JAX's distributed runtime."""

import jax

# Long, because a process may wait for one with much more work. JAX detects dead processes by their heartbeats.
_BARRIER_TIMEOUT_MS = 7 * 24 * 3600 * 1000


def join(
    coordinator: str | None, num_processes: int | None, process_id: int | None, *, preemption_service: bool = False
) -> None:
    """Initialize JAX's distributed runtime. Must be called before any other JAX function.

    Without arguments, JAX detects the cluster (TPU pods, Slurm, Open MPI). Without a cluster, the job has one process.

    Args:
        coordinator: address and port of process 0, such as `10.0.0.1:1234`.
        num_processes: number of processes of the job.
        process_id: index of this process.
        preemption_service: whether JAX handles SIGTERM in a job with several processes, for
            `multihost_utils.reached_preemption_sync_point`. It replaces the handler of `signals.exit_on_sigterm`.

    Raises:
        ValueError: if only some of the arguments are given.
    """
    jax.config.update("jax_enable_preemption_service", preemption_service)
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except ValueError as error:
        # JAX raises this error if it finds no cluster. Without arguments it means a job of one process.
        explicit = (coordinator, num_processes, process_id) != (None, None, None)
        if explicit or "coordinator_address should be defined" not in str(error):
            raise ValueError(f"{error} Set all of --coordinator, --num-processes and --process-id, or none.") from None


def barrier(place: str) -> None:
    """Wait until every process of the job has called this function with the same `place`."""
    if jax.process_count() > 1:
        from orbax.checkpoint import multihost

        multihost.get_barrier_sync_fn()(key=f"snax: {place}", timeout_ms=_BARRIER_TIMEOUT_MS)
