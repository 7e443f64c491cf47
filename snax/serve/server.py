"""The server: its socket, its signals and its end."""

import contextlib
import logging
import socket
import time
from types import FrameType

import uvicorn

from ..codec.model import SNAC
from ..weights import pretrained
from .app import App
from .config import ServeConfig
from .service import Service

_log = logging.getLogger(__name__)

# Seconds for clients to take what the operating system has not sent when the last stream ends.
FLUSH_SECONDS = 5


def run(config: ServeConfig) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        OSError: if the port cannot be opened.
        ValueError, ConnectionError, FileNotFoundError: if the model cannot be loaded, as in `snax.load`.
    """
    with bind(config) as listener:  # before the slow parts, so that a wrong port fails at once
        Server(pretrained.load(config.model), config).run(sockets=[listener])


def bind(config: ServeConfig) -> socket.socket:
    """Bind a socket, without listening yet."""
    with contextlib.ExitStack() as on_error:
        try:
            info = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
            listener = on_error.enter_context(socket.socket(*info[:3]))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                # Accepted sockets inherit it. Without it, a client that stops reading would keep its buffers for ever.
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1000 * config.idle_timeout))
            listener.bind(info[4])
        except OSError as error:
            raise OSError(
                f"{config.host}:{config.port} cannot be opened: {error}. Use another --host or --port (0: any free)."
            ) from error
        on_error.pop_all()
    return listener


class Server(uvicorn.Server):
    """A server that finishes its streams before it exits.

    Args:
        model: the codec.
        config: the configuration.
    """

    def __init__(self, model: SNAC, config: ServeConfig):
        self._service = Service(model, config.slots, max_wait=config.max_wait, max_seconds=config.max_seconds)
        self._serve_config, self._deadline = config, 0.0
        super().__init__(
            uvicorn.Config(
                App(self._service, model.config, config).starlette,
                lifespan="on",
                ws_max_size=config.max_message,
                # Pings would close a connection whose client waits for its own input to be read. `idle_timeout` and
                # TCP_USER_TIMEOUT find clients that have vanished.
                ws_ping_interval=None,
                ws_per_message_deflate=False,  # audio hardly shrinks
                timeout_graceful_shutdown=FLUSH_SECONDS,
                log_config=None,
                log_level="warning",
                access_log=False,
            )
        )

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal.

        Raises:
            RuntimeError: if a step fails, after which no stream can go on.
        """
        super().run(sockets)
        if self._service.error is not None:
            raise RuntimeError("A decoding step failed.") from self._service.error

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Compile, listen, and log the address."""
        await super().startup(sockets)
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        _log.info("ready on http://%s:%d", f"[{host}]" if ":" in host else host, port)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal, and exit at the second. uvicorn would close all WebSockets at the first."""
        if self._service.draining:
            super().handle_exit(sig, frame)
            self.force_exit = True
        else:
            self._deadline = time.monotonic() + self._serve_config.drain_seconds
            self._service.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Return whether to exit. uvicorn calls this ten times per second."""
        is_drained = not self.server_state.tasks or time.monotonic() > self._deadline
        if self._service.error is not None or (self._service.draining and is_drained):
            self.should_exit = True
        return await super().on_tick(counter)
