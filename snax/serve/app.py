"""The WebSocket and HTTP interface of a `Service`."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, NamedTuple, NoReturn

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from ..codec.config import SNACConfig
from .config import ServeConfig
from .metrics import Result
from .requests import Codes, Options, Tokens, UnsupportedError, content_type, parse_options, wav_header
from .service import BusyError, Service, Session, TooLongError


class Failure(NamedTuple):
    """How the server reports that a stream has failed: to metrics, over HTTP, and with a WebSocket's close code."""

    result: Result
    status: int
    code: int
    message: str


class App:
    """The routes of the server."""

    def __init__(self, service: Service, codec: SNACConfig, config: ServeConfig):
        self._service, self._codec, self._config = service, codec, config
        routes = [
            WebSocketRoute("/v1/stream", self.stream),
            Route("/v1/audio", self.audio, methods=["POST"]),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
        ]
        self.starlette = Starlette(routes=routes, lifespan=self._lifespan)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        async with self._service:
            yield

    async def health(self, request: Request) -> Response:
        """Report the state, with status 503 while draining so that load balancers send no more streams."""
        service = self._service
        facts = {
            "status": "draining" if service.draining else "ok",
            "model": self._config.model,
            "sampling_rate": service.sampling_rate,
            "slots": service.slots,
            "active": service.active,
            "waiting": service.waiting,
        }
        return JSONResponse(facts, 503 if service.draining else 200)

    async def metrics(self, request: Request) -> Response:
        """Report Prometheus metrics."""
        return Response(self._service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def stream(self, websocket: WebSocket) -> None:
        """Decode the tokens of a WebSocket while they arrive."""
        tokens = None
        result: Result = "disconnected"
        try:
            options = parse_options(websocket.query_params, self._codec, "pcm")
            tokens = options.tokens
            with contextlib.closing(await self._service.open()) as session:
                await websocket.accept()
                async with self._idle_timeout() as touch:
                    await _run_until_first_ends(
                        self._send_messages(websocket, session, options, touch),
                        self._receive_messages(websocket, session, tokens, touch),
                    )
            result = "finished"
            await self._close(websocket, 1000, "")
        except Exception as error:
            failure = self._failure(error)
            result = failure.result
            if websocket.application_state == WebSocketState.CONNECTING and result != "disconnected":
                await websocket.send_denial_response(_error_response(failure))
            else:
                await self._close(websocket, failure.code, failure.message)
        finally:
            self._service.metrics.count_stream(result, tokens.dropped if tokens else 0)

    async def _receive_messages(
        self, websocket: WebSocket, session: Session, tokens: Tokens, touch: Callable[[], None]
    ) -> NoReturn:
        ended = False
        while True:
            data = await _receive(websocket)
            touch()
            if ended:
                raise ValueError("The stream has ended with an empty message. Open a new connection for the next one.")
            ended = not data
            if ended:
                session.end()
            else:
                await session.feed(tokens.feed(data))

    async def _send_messages(
        self, websocket: WebSocket, session: Session, options: Options, touch: Callable[[], None]
    ) -> None:
        async def send(message: Coroutine[Any, Any, None]) -> None:
            try:
                async with asyncio.timeout(self._config.idle_timeout):
                    await message
            except (WebSocketDisconnect, RuntimeError):
                # uvicorn has closed the connection, and its last message says why.
                while True:
                    await _receive(websocket)
            touch()

        if options.format == "wav":
            await send(websocket.send_bytes(wav_header(self._codec.sampling_rate, None)))
        async for audio in session:
            await send(websocket.send_bytes(audio.astype("<i2").tobytes()))
        summary = {"samples": session.samples, "dropped": options.tokens.dropped}
        await send(websocket.send_text(json.dumps(summary)))

    async def _close(self, websocket: WebSocket, code: int, reason: str) -> None:
        """Close a WebSocket that is still open, and do not wait for a client that reads nothing."""
        with contextlib.suppress(TimeoutError, WebSocketDisconnect, RuntimeError):
            if websocket.client_state == websocket.application_state == WebSocketState.CONNECTED:
                async with asyncio.timeout(self._config.idle_timeout):
                    # A close frame has room for 123 bytes.
                    await websocket.close(code, reason.encode()[:123].decode(errors="ignore"))

    async def audio(self, request: Request) -> ASGIApp:
        """Decode the tokens of a body."""
        try:
            options = parse_options(request.query_params, self._codec, "wav")
            content = content_type(request)
            body = await self._body(request)
            # In a thread: a million tokens take half a second.
            codes = await asyncio.to_thread(options.tokens.feed_body, content, body)
            self._check_length(codes, options.tokens)
        except Exception as error:
            return self._rejected(self._failure(error), 0)

        async def respond(scope: Scope, receive: Receive, send: Send) -> None:
            result: Result = "disconnected"
            dropped = options.tokens.dropped
            try:
                session = await self._service.open()
            except BusyError as error:
                await self._rejected(self._failure(error), dropped)(scope, receive, send)
                return
            try:
                with contextlib.closing(session):
                    async with self._idle_timeout() as touch:
                        await _run_until_first_ends(
                            self._send_body(send, session, options, self._samples(codes), touch),
                            _wait_for_disconnect(receive),
                            _feed(session, codes),
                        )
                result = "finished"
            except (TimeoutError, ClientDisconnect) as error:
                # The response has started. Without its last chunk, the client knows that audio is missing.
                result = self._failure(error).result
            finally:
                self._service.metrics.count_stream(result, dropped)

        return respond

    async def _body(self, request: Request) -> bytes:
        limit = self._config.max_body
        error = TooLongError(f"The body is longer than {limit} bytes. Send less, or use the WebSocket /v1/stream.")
        if int(request.headers.get("content-length", 0)) > limit:
            raise error
        body = bytearray()
        async with self._idle_timeout() as touch, contextlib.aclosing(request.stream()) as stream:
            async for part in stream:
                touch()
                body += part
                if len(body) > limit:
                    raise error
        return bytes(body)

    def _check_length(self, codes: Codes, tokens: Tokens) -> None:
        seconds = self._samples(codes) / self._codec.sampling_rate
        if not seconds:
            raise ValueError(
                f"The body has not a whole group of {len(tokens.layout.slots)} tokens, so there is no audio. "
                f"{tokens.dropped} tokens were dropped. Check `layout`."
            )
        if seconds > self._config.max_seconds:
            raise TooLongError(
                f"The tokens are {seconds:g} s of audio, more than {self._config.max_seconds:g} s. "
                "Divide the text into several requests."
            )
        if self._samples(codes) % self._codec.pad_multiple:
            raise ValueError(
                f"The tokens are {len(codes[0])} groups, but the attention window of this model needs a multiple of "
                f"{self._codec.pad_multiple // (self._codec.vq_strides[0] * self._codec.hop_length)}."
            )

    def _samples(self, codes: Codes) -> int:
        return len(codes[0]) * self._codec.vq_strides[0] * self._codec.hop_length

    async def _send_body(
        self, send: Send, session: Session, options: Options, samples: int, touch: Callable[[], None]
    ) -> None:
        async def send_part(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})
            touch()

        content = {"wav": "audio/wav", "pcm": "application/octet-stream"}[options.format]
        headers = [(b"content-type", content.encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if options.format == "wav":
            await send_part(wav_header(self._codec.sampling_rate, samples))
        async for audio in session:
            await send_part(audio.astype("<i2").tobytes())
        await send_part(b"", more=False)

    def _rejected(self, failure: Failure, dropped: int) -> Response:
        self._service.metrics.count_stream(failure.result, dropped)
        return _error_response(failure)

    @contextlib.asynccontextmanager
    async def _idle_timeout(self) -> AsyncIterator[Callable[[], None]]:
        """Raise TimeoutError after `idle_timeout` without a call of the function that this yields."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(self._config.idle_timeout) as timeout:
            yield lambda: timeout.reschedule(loop.time() + self._config.idle_timeout)

    def _failure(self, error: Exception) -> Failure:
        """Return how to report an error that a client caused. Others are raised again."""
        match error:
            case BusyError():
                return Failure("rejected", 503, 1013, str(error))
            case TooLongError():
                return Failure("too_long", 413, 1008, str(error))
            case UnsupportedError():
                return Failure("malformed", 415, 1003, str(error))
            case TimeoutError():
                message = f"The client has neither sent nor received for {self._config.idle_timeout:g} s."
                return Failure("timeout", 408, 1008, message)
            case WebSocketDisconnect(code=1009):  # from uvicorn, which has told the client
                return Failure("too_long", 413, 1009, "")
            case WebSocketDisconnect(code=1002 | 1007):
                return Failure("malformed", 400, 1007, "")
            case WebSocketDisconnect() | ClientDisconnect() | OSError():
                return Failure("disconnected", 400, 1001, "")
            case ValueError():
                return Failure("malformed", 400, 1007, str(error))
        raise error


def _error_response(failure: Failure) -> Response:
    headers = {"Retry-After": "1"} if failure.status == 503 else None
    return JSONResponse({"error": failure.message}, failure.status, headers)


async def _receive(websocket: WebSocket) -> str | bytes:
    if websocket.client_state == WebSocketState.DISCONNECTED:
        await asyncio.Future()  # never done: another coroutine has received the disconnect, and raises it
    message = await websocket.receive()
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message.get("code", 1005), message.get("reason"))
    text: str | None = message.get("text")
    return message["bytes"] if text is None else text


async def _wait_for_disconnect(receive: Receive) -> NoReturn:
    while (await receive())["type"] != "http.disconnect":
        pass
    raise ClientDisconnect


async def _feed(session: Session, codes: Codes) -> None:
    await session.feed(codes)
    session.end()


async def _run_until_first_ends(first: Coroutine[Any, Any, None], *others: Coroutine[Any, Any, None]) -> None:
    """Run coroutines until the first one returns or one of them raises. The rest are cancelled."""
    first_task = asyncio.create_task(first)
    tasks = [*map(asyncio.create_task, others), first_task]
    try:
        while running := [task for task in tasks if not task.done()]:
            await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            if first_task.done() and first_task.exception() is None:
                return  # uvicorn reports a disconnect after a complete response, too
            for task in tasks:
                if task.done():
                    task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
