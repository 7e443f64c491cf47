"""Good and bad clients of `snax serve`. Each returns its result, for example the close code or the HTTP status."""

import asyncio
import contextlib
import json
import random
import socket
import struct
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import httpx2
import numpy as np
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

# In int16 steps. The server and `decode` are different programs, which round differently in float32. A sample near the
# middle between two steps may be rounded to either.
AUDIO_BOUND = 1
GROUP = 7  # tokens
# A buffer of a second of audio, so that the server notices a slow reader. With much smaller ones, TCP itself stalls.
SMALL_BUFFER = socket.SOL_SOCKET, socket.SO_RCVBUF, 32768
MAX_MESSAGE = 60_000  # bytes, below the default of `--max-message`; the text of 20 s is longer


class BusyError(Exception):
    """The server has answered 503."""


class Clip(NamedTuple):
    """A clip: Orpheus' token ids, the numbers of its text tokens, and int16 audio."""

    ids: np.ndarray
    numbers: np.ndarray
    pcm: np.ndarray
    rate: int

    def text(self) -> str:
        return "".join(f"<custom_token_{number}>" for number in self.numbers)

    def compare(self, audio: bytes) -> str:
        np.testing.assert_allclose(np.frombuffer(audio, "<i2"), self.pcm, rtol=0, atol=AUDIO_BOUND)
        return "equal"


class Server(NamedTuple):
    """The address of a server, and a client of its HTTP interface."""

    url: str
    http: httpx2.AsyncClient

    async def health(self) -> dict[str, Any]:
        response = await self.http.get("/health")
        assert response.status_code == 200, response.text
        return response.json()

    @contextlib.asynccontextmanager
    async def connect(self, query: str = "", **options: Any) -> AsyncIterator[ClientConnection]:
        url = self.url.replace("http://", "ws://") + f"/v1/stream?{query}"
        # Messages are read when the client asks for them, or else no reader would be slow.
        options = {
            "proxy": None,
            "compression": None,
            "ping_interval": None,
            "open_timeout": 300,
            "max_queue": 1,
        } | options
        try:
            async with connect(url, **options) as websocket:
                yield websocket
        except InvalidStatus as error:
            if error.response.status_code != 503:
                raise
            raise BusyError from None

    def slow_socket(self) -> socket.socket:
        raw = socket.socket()
        raw.setsockopt(*SMALL_BUFFER)
        raw.connect(self.address)
        return raw

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", int(self.url.rpartition(":")[2])

    async def post(self, content: str, length: int, body: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Start a request whose body may be shorter than its Content-Length."""
        reader, writer = await asyncio.open_connection(*self.address)
        head = f"POST /v1/audio HTTP/1.1\r\nHost: x\r\nContent-Type: {content}\r\nContent-Length: {length}\r\n\r\n"
        writer.write(head.encode() + body)
        return reader, writer


# Good clients.


async def talk(websocket: ClientConnection, clip: Clip, messages: list[Any], pause: float, read_pause: float) -> str:
    """Send messages and receive audio at the same time, with pauses after each message."""

    async def send() -> None:
        for message in messages:
            for start in range(0, len(message), MAX_MESSAGE):
                await websocket.send(message[start : start + MAX_MESSAGE])
            await asyncio.sleep(pause)
        await websocket.send("")

    audio = []
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(send())
        while isinstance(message := await websocket.recv(), bytes):
            audio.append(message)
            await asyncio.sleep(read_pause * len(message) / 2 / clip.rate)
    assert json.loads(message) == {"samples": len(clip.pcm), "dropped": 0}
    await websocket.wait_closed()
    assert websocket.close_code == 1000
    return clip.compare(b"".join(audio))


def cut(data: Any, rng: random.Random) -> list[Any]:
    places = sorted(rng.sample(range(1, len(data)), rng.randint(1, 30)))
    return [data[start:stop] for start, stop in zip([0, *places], [*places, len(data)], strict=True)]


async def websocket_whole(server: Server, clip: Clip, rng: random.Random) -> str:
    async with server.connect() as websocket:
        return await talk(websocket, clip, [rng.choice([clip.text(), clip.ids.tobytes()])], 0, 0)


async def websocket_pieces(server: Server, clip: Clip, rng: random.Random) -> str:
    async with server.connect() as websocket:
        pieces = cut(rng.choice([clip.text(), clip.ids]), rng)
        messages = [piece if isinstance(piece, str) else piece.tobytes() for piece in pieces]
        return await talk(websocket, clip, messages, rng.uniform(0, 0.5), 0)


async def websocket_slow_reader(server: Server, clip: Clip, rng: random.Random) -> str:
    # Not much slower than the audio plays: the server waits until 48 KiB of its buffer are sent, for at most 10 s.
    async with server.connect(sock=server.slow_socket()) as websocket:
        return await talk(websocket, clip, [clip.ids.tobytes()], 0, rng.uniform(0.7, 1.2))


async def http(server: Server, clip: Clip, rng: random.Random, read_pause: float = 0) -> str:
    bodies = {
        "text/plain": clip.text().encode(),
        "application/octet-stream": clip.ids.tobytes(),
        "application/json": json.dumps({"tokens": clip.ids.tolist()}).encode(),
    }
    content, form, body = rng.choice([*bodies]), rng.choice(["pcm", "wav"]), bytearray()
    request = server.http.stream(
        "POST", f"/v1/audio?format={form}", content=bodies[content], headers={"Content-Type": content}
    )
    async with request as response:
        if response.status_code == 503:
            raise BusyError
        assert response.status_code == 200
        async for part in response.aiter_raw():
            body += part
            await asyncio.sleep(read_pause * len(part) / 2 / clip.rate)
    if form == "wav":
        assert struct.unpack("<I", body[40:44])[0] == len(body) - 44
    return clip.compare(bytes(body[44 * (form == "wav") :]))


async def http_slow_reader(server: Server, clip: Clip, rng: random.Random) -> str:
    transport = httpx2.AsyncHTTPTransport(socket_options=[SMALL_BUFFER])
    async with httpx2.AsyncClient(base_url=server.url, transport=transport, timeout=server.http.timeout) as client:
        return await http(server._replace(http=client), clip, rng, rng.uniform(0.7, 1.2))


# Bad clients.


def vanish(transport: Any, rng: random.Random) -> str:
    """Abort the TCP connection, at times with a reset."""
    if rng.random() < 0.5 and not transport.is_closing():  # the server may have closed it, and then it has no socket
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()
    return "vanished"


async def closed(websocket: ClientConnection, messages: list[Any]) -> str:
    """Send messages. Return the code with which the server closes the connection."""
    with contextlib.suppress(ConnectionClosed):
        for message in messages:
            await websocket.send(message)
        while True:
            await websocket.recv()
    return str(websocket.close_code)


async def status(server: Server, content: str, length: int, body: bytes) -> str:
    reader, writer = await server.post(content, length, body)
    line = await reader.readline()
    writer.close()
    return line.split()[1].decode()


async def websocket_vanishes(server: Server, clip: Clip, rng: random.Random) -> str:
    async with server.connect() as websocket:
        await websocket.send(clip.ids.tobytes())
        await asyncio.sleep(rng.uniform(0, 3))
        return vanish(websocket.transport, rng)


async def http_vanishes(server: Server, clip: Clip, rng: random.Random) -> str:
    body = clip.ids.tobytes()[: rng.choice([None, 100])]
    _, writer = await server.post("application/octet-stream", clip.ids.nbytes, body)
    await asyncio.sleep(rng.uniform(0, 3))
    return vanish(writer.transport, rng)


async def malformed(server: Server, clip: Clip, rng: random.Random) -> str:
    cases: list[tuple[str, list[Any], str]] = [
        ("", [b"12345"], "1007"),
        ("on_error=raise", [clip.ids[1:].tobytes()], "1007"),
        ("on_error=raise", [f"text <custom_token_{clip.numbers[3]}>"], "1007"),
        ("", ["<custom", bytes(4)], "1003"),
    ]
    query, messages, code = rng.choice(cases)
    async with server.connect(query) as websocket:
        result = await closed(websocket, messages)
    assert result == code
    return result


async def malformed_body(server: Server, clip: Clip, rng: random.Random) -> str:
    content, body, code = rng.choice(
        [
            ("application/octet-stream", b"12345", "400"),
            ("text/plain", b"\xff", "400"),
            ("application/json", b'{"tokens": [', "400"),
            ("audio/wav", b"RIFF", "415"),
        ]
    )
    result = await status(server, content, len(body), body)
    assert result == code
    return result


async def too_large_message(server: Server, clip: Clip, rng: random.Random) -> str:
    async with server.connect() as websocket:
        result = await closed(websocket, [clip.ids.tobytes(), bytes(rng.randint(66_000, 900_000))])
    assert result in ("1009", "1006")  # a reset, because of bytes that the server has not read, loses the close frame
    return result


async def too_large_body(server: Server, clip: Clip, rng: random.Random) -> str:
    result = await status(server, "text/plain", 5 * 2**20, b"<custom_token_10>")
    assert result == "413"
    return result


async def flood(server: Server, clip: Clip, rng: random.Random) -> str:
    async with server.connect(sock=server.slow_socket()) as websocket:
        with contextlib.suppress(TimeoutError, ConnectionClosed):
            async with asyncio.timeout(rng.uniform(1, 10)):
                while True:
                    await websocket.send(clip.ids.tobytes())
        return vanish(websocket.transport, rng)


async def silent(server: Server, clip: Clip, rng: random.Random) -> str:
    async with server.connect() as websocket:
        result = await closed(websocket, [clip.ids[:GROUP].tobytes()] * rng.randint(0, 1))
    assert result == "1008"
    return result


async def silent_body(server: Server, clip: Clip, rng: random.Random) -> str:
    result = await status(server, "text/plain", 100, b"<custom_token_10>")
    assert result == "408"
    return result


async def silent_connection(server: Server, clip: Clip, rng: random.Random) -> str:
    _, writer = await asyncio.open_connection(*server.address)
    await asyncio.sleep(rng.uniform(0, 8))
    return vanish(writer.transport, rng)


async def close_at_once(server: Server, clip: Clip, rng: random.Random) -> str:
    async with server.connect():
        return "closed"


async def wrong_tokens(server: Server, clip: Clip, rng: random.Random) -> str:
    """Insert tokens of slot 3 before a group. The server drops them, and the audio of the groups stays."""
    place, count = GROUP * rng.randrange(len(clip.ids) // GROUP), rng.randint(1, 100)
    ids = np.concatenate([clip.ids[:place], np.repeat(clip.ids[3], count), clip.ids[place:]])
    async with server.connect() as websocket:
        await websocket.send(ids.tobytes())
        await websocket.send("")
        audio = []
        while isinstance(message := await websocket.recv(), bytes):
            audio.append(message)
    assert json.loads(message) == {"samples": len(clip.pcm), "dropped": count}
    return clip.compare(b"".join(audio))


GOOD = {
    "websocket": websocket_whole,
    "websocket, pieces": websocket_pieces,
    "websocket, slow reader": websocket_slow_reader,
    "http": http,
    "http, slow reader": http_slow_reader,
}
BAD = {
    "websocket vanishes": websocket_vanishes,
    "http vanishes": http_vanishes,
    "malformed messages": malformed,
    "malformed body": malformed_body,
    "too large message": too_large_message,
    "too large body": too_large_body,
    "flood without reading": flood,
    "silent websocket": silent,
    "silent body": silent_body,
    "silent connection": silent_connection,
    "close at once": close_at_once,
    "wrong tokens": wrong_tokens,
}
