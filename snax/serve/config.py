"""Configuration of `snax serve`."""

from typing import Annotated

from cyclopts import Parameter
from pydantic import Field
from pydantic.dataclasses import dataclass

from ..options import ModelName

# At most a day, which also excludes infinity.
Seconds = Annotated[float, Field(gt=0, le=86_400)]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """The configuration of a server. Each field is an option of `snax serve`.

    Args:
        model: Name of the model, as `/health` reports it.
        host: Address to listen on. The server has no authentication, so only this machine can connect by default.
        port: Port to listen on. 0 is any free port.
        slots: Number of streams that are decoded at the same time. Each step computes all of them.
        max_wait: Seconds that a new stream waits for a free slot before it is rejected.
        max_seconds: Seconds of audio in a stream.
        idle_timeout: A stream is closed after so many seconds in which its client neither sends nor receives.
        max_message: Bytes in a WebSocket message.
        max_body: Bytes in an HTTP body.
        drain_seconds: Seconds that running streams have to finish after SIGTERM or SIGINT.
    """

    model: ModelName = "snac_24khz"
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535)] = 8000
    slots: Annotated[int, Field(ge=1)] = 16
    max_wait: Annotated[float, Field(ge=0, le=86_400)] = 2.0
    max_seconds: Seconds = 600.0
    idle_timeout: Seconds = 30.0
    max_message: Annotated[int, Field(ge=1)] = 65_536
    max_body: Annotated[int, Field(ge=1)] = 4 * 2**20
    drain_seconds: Annotated[float, Field(ge=0, le=86_400)] = 30.0
