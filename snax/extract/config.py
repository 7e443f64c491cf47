"""Configuration of `snax extract`."""

import dataclasses
from typing import Annotated, Literal

from cyclopts import Group, Parameter
from pydantic import Field
from pydantic.dataclasses import dataclass

from ..data.audio import MAX_SECONDS
from ..options import AudioInputs, Channels, ModelName


@Parameter(name="*")
@dataclass(frozen=True)
class ExtractConfig:
    """The configuration of an extraction. Each field is an option of `snax extract`.

    Args:
        inputs: Audio files, folders, patterns, manifests, tables and tars. See `snax.data.corpus.plan`.
        out: Output folder or URL.
        model: Name of the model, as it is recorded with the shards.
        clips_per_shard: Maximum number of clips in a shard. A run that is stopped loses at most one shard.
        channels: Mix the channels to mono, or write a row for each of them.
        tokens: Also write a column of language-model tokens: the ids of Orpheus, or ids from 0 with one range shared by
            all slots of a group, or with a separate range for each slot.
        max_seconds: Clips that are longer go to quarantine.
        max_quarantined: The run stops when more than this fraction of clips, and more than ten, are in quarantine.
        retry_quarantined: Write shards again that have clips in quarantine.
        num_decoders: Number of processes that read and decode audio. Default: one for each core that this process may
            use, at most 16. A decoder runs at about 1000 times real time.
    """

    inputs: AudioInputs
    _: dataclasses.KW_ONLY
    out: Annotated[str, Parameter(alias="-o")]
    model: ModelName = "snac_24khz"
    clips_per_shard: Annotated[int, Field(ge=1)] = 1000
    channels: Channels = "mix"
    tokens: Literal["orpheus", "shared", "separate"] | None = None
    max_seconds: Annotated[float, Field(gt=0)] = MAX_SECONDS
    max_quarantined: Annotated[float, Field(ge=0, le=1)] = 0.1
    retry_quarantined: bool = False
    num_decoders: Annotated[int, Field(ge=1)] | None = None


@Parameter(name="*", group=Group("Ray cluster", help="Workers that come and go. Without these options: one process."))
@dataclass(frozen=True, kw_only=True)
class RayOptions:
    """The workers of an extraction on a Ray cluster.

    Args:
        workers: Number of workers: one for each TPU host or GPU, or for each group of cores. Workers without a place
            wait until a node joins.
        ray_address: Address of the Ray cluster. Default: RAY_ADDRESS, or a cluster on this machine, which is started if
            there is none.
        worker_cpus: Number of cores of each worker. Default: an equal share.
    """

    workers: Annotated[int, Field(ge=0)] = 0
    ray_address: str | None = None
    worker_cpus: Annotated[int, Field(ge=1)] | None = None
