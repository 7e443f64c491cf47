"""The command `snax serve`."""

from .. import extras
from .config import ServeConfig


def serve(config: ServeConfig = ServeConfig()) -> int:
    """Decode streams of tokens to speech over WebSocket and HTTP. See docs/serving.md."""
    try:
        import websockets  # noqa: F401  # uvicorn would start without it, and refuse all WebSockets

        from .. import compilation_cache
        from . import server
    except ImportError as error:
        raise extras.missing(error, "serve") from error
    compilation_cache.enable()
    server.run(config)
    return 0
