"""SIGTERM during training, which clusters send before they take a machine away."""

import contextlib
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

from .. import signals


class PreemptedError(Exception):
    """Training was stopped by SIGTERM. The same command resumes it."""


@contextlib.contextmanager
def deferred_preemption() -> Iterator[Callable[[int], bool]]:
    """Make SIGTERM wait for the end of a step.

    Yields:
        A function of the number of steps taken. It returns whether to save a checkpoint and to stop now. Every process
        must call it after every step. In a job with several processes, one of them gets the signal, and JAX's
        preemption service (`distributed.join`) makes all processes stop after the same step.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
    else:
        with signals.deferred_sigterm() as received:
            yield lambda step: received.is_set()
