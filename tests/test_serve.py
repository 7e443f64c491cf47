"""`snax serve`: real servers and real clients. Each stream gets its own audio, whatever the other clients do."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import functools
import io
import itertools
import json
import logging
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import httpx2
import numpy as np
import pytest
import soundfile
from helpers import jobs, small
from prometheus_client.parser import text_string_to_metric_families
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState
from websockets.exceptions import ConnectionClosed, ConnectionClosedError, InvalidStatus
from websockets.sync.client import ClientConnection, connect

import snax
from snax.serve import app
from snax.serve.config import ServeConfig
from snax.serve.server import Server, bind
from snax.serve.service import BusyError, Service
from snax.tokens import ORPHEUS_NUMBERS, token_layout

# 64 ms of audio per group. Orpheus' tokens fit the model.
CONFIG = dataclasses.replace(
    small.CONFIG, latent_dim=0, encoder_rates=(4, 8, 8), decoder_rates=(8, 8, 4), codebook_size=4096
)
GROUPS = 12
GROUP_SECONDS = CONFIG.pad_multiple / CONFIG.sampling_rate
LAYOUTS = ["orpheus", "shared", "separate"]
ORPHEUS = token_layout("orpheus", CONFIG)
# A hang, not a speed limit.
DEADLINE = 120.0


def codes_of(seed: int, groups: int = GROUPS, config: snax.SNACConfig = CONFIG) -> list[np.ndarray]:
    """Return random codes, one (1, frames / stride) array per level."""
    rng = np.random.default_rng(seed)
    return [rng.integers(config.codebook_size, size=(1, groups * n), dtype=np.int32) for n in (1, 2, 4)]


def ids_of(codes: list[np.ndarray], layout: snax.tokens.TokenLayout = ORPHEUS) -> np.ndarray:
    return np.asarray(layout.flatten(codes)[0])


def text_of(codes: list[np.ndarray], layout: snax.tokens.TokenLayout = ORPHEUS_NUMBERS) -> str:
    return "".join(f"<custom_token_{number}>" for number in ids_of(codes, layout))


def assert_audio(pcm: bytes | np.ndarray, codes: list[np.ndarray], model: snax.SNAC | None = None) -> None:
    """Compare with `decode`. The programs round differently in float32, so a sample may be rounded to the next step."""
    actual = np.frombuffer(pcm, "<i2") if isinstance(pcm, bytes) else pcm
    expected = np.asarray((model or small.model(CONFIG)).decode(codes))[0, 0]
    np.testing.assert_allclose(actual, np.round(np.clip(expected, -1, 1) * 32767), rtol=0, atol=1)


def cut(data: Any, seed: int) -> list[Any]:
    """Cut a sequence at random places into pieces that are not empty."""
    rng = np.random.default_rng(seed)
    places = [0, *np.unique(rng.integers(1, len(data), size=len(data) // 5)).tolist(), len(data)]
    return [data[start:stop] for start, stop in itertools.pairwise(places)]


@dataclasses.dataclass
class Running:
    """A server."""

    url: str
    http: httpx2.Client
    server: Server | None = None

    def connect(self, query: str = "", **options: Any) -> ClientConnection:
        url = self.url.replace("http://", "ws://") + f"/v1/stream?{query}"
        return connect(url, proxy=None, **({"close_timeout": 1} | options))

    def stream(self, messages: list[Any], query: str = "") -> tuple[bytes, dict[str, int]]:
        """Send messages and the end. Return the audio and the summary."""
        with self.connect(query) as websocket:
            for message in messages:
                websocket.send(message)
            websocket.send("")
            return finish(websocket)

    def audio(self, content: str, body: Any, query: str = "") -> httpx2.Response:
        return self.http.post(f"/v1/audio?{query}", content=body, headers={"Content-Type": content})

    def health(self) -> dict[str, Any]:
        return self.http.get("/health").json()

    def wait(self, **values: Any) -> None:
        """Wait until `/health` has these values."""
        end = time.monotonic() + DEADLINE
        while values.items() - (health := self.health()).items():
            assert time.monotonic() < end, health
            time.sleep(0.01)  # there is no event to wait for in another process

    def metric(self, name: str, **labels: str) -> float:
        families = text_string_to_metric_families(self.http.get("/metrics").text)
        (value,) = [s.value for family in families for s in family.samples if (s.name, s.labels) == (name, labels)]
        return value

    def result(self, name: str) -> float:
        return self.metric("snax_streams_total", result=name)


def finish(websocket: ClientConnection) -> tuple[bytes, dict[str, int]]:
    """Receive to the end. Return the audio and the summary."""
    audio = []
    while isinstance(message := websocket.recv(DEADLINE), bytes):
        audio.append(message)
    with pytest.raises(ConnectionClosed) as closed:
        websocket.recv(DEADLINE)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1000
    return b"".join(audio), json.loads(message)


def closed_by_server(websocket: ClientConnection) -> tuple[int, str]:
    """Receive until the server closes with an error. Return its code and reason."""
    with contextlib.suppress(ConnectionClosedError):
        while True:
            websocket.recv(DEADLINE)
    assert websocket.close_code is not None
    return websocket.close_code, websocket.close_reason or ""


class _Ready(logging.Handler):
    """Sets an event when the server listens."""

    def __init__(self) -> None:
        super().__init__()
        self.event = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("ready on "):
            self.event.set()


@contextlib.contextmanager
def serving(model: snax.SNAC, **options: Any) -> Iterator[Running]:
    """Run a server in a thread."""
    config, logger, ready = (
        ServeConfig(model="small", port=0, **options),
        logging.getLogger("snax.serve.server"),
        _Ready(),
    )
    logger.addHandler(ready)
    logger.setLevel(logging.INFO)
    with bind(config) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = Server(model, config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            assert ready.event.wait(DEADLINE)
            with httpx2.Client(base_url=url, trust_env=False, timeout=DEADLINE) as http:
                yield Running(url, http, server)
        finally:
            logger.removeHandler(ready)
            server.handle_exit(signal.SIGTERM, None)
            thread.join(DEADLINE)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def patient() -> Iterator[Running]:
    with serving(small.model(CONFIG), slots=8, max_wait=DEADLINE, idle_timeout=DEADLINE, max_body=100_000) as running:
        yield running


@pytest.fixture(scope="module")
def strict() -> Iterator[Running]:
    """A server with low limits, for a model that Orpheus' tokens do not fit."""
    model = small.model(dataclasses.replace(CONFIG, codebook_size=64))
    with serving(model, slots=2, max_wait=0.2, idle_timeout=1, max_seconds=30, drain_seconds=0) as running:
        yield running


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ids_in_pieces(patient: Running, layout: str) -> None:
    codes = codes_of(0)
    ids = ids_of(codes, token_layout(layout, CONFIG))
    pcm, summary = patient.stream([piece.tobytes() for piece in cut(ids, 1)], f"layout={layout}")
    assert_audio(pcm, codes)
    assert summary == {"samples": GROUPS * CONFIG.pad_multiple, "dropped": 0}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_text_cut_anywhere(patient: Running, layout: str) -> None:
    codes = codes_of(1)
    text = text_of(codes, ORPHEUS_NUMBERS if layout == "orpheus" else token_layout(layout, CONFIG))
    text = text.replace("><", ">\n and text <", 3)
    pcm, summary = patient.stream(cut(text, 2), f"layout={layout}")
    assert_audio(pcm, codes)
    assert summary["dropped"] == 0


def test_default_layout(patient: Running, strict: Running) -> None:
    """Orpheus' ids where they fit, or else separate ranges of ids."""
    codes = codes_of(2)
    assert_audio(patient.stream([ids_of(codes).tobytes()])[0], codes)
    config = dataclasses.replace(CONFIG, codebook_size=64)
    codes = codes_of(2, config=config)
    pcm, _ = strict.stream([ids_of(codes, token_layout("separate", config)).tobytes()])
    assert_audio(pcm, codes, small.model(config))


@pytest.mark.parametrize(("on_error", "lost"), [("resync", 3 * 7), ("skip", 3 * 7 + 2)])
def test_missing_token(patient: Running, on_error: str, lost: int) -> None:
    """In slot 2 of group 3. `resync` loses this group, and `skip` loses all tokens up to the next one of slot 2."""
    ids, before = ids_of(codes_of(3)), patient.metric("snax_dropped_tokens_total")
    pcm, summary = patient.stream([np.delete(ids, 3 * 7 + 2).tobytes()], f"on_error={on_error}")
    assert_audio(pcm, list(ORPHEUS.unflatten(np.delete(ids, slice(lost, lost + 7))[None])))
    assert summary == {"samples": (GROUPS - 1) * CONFIG.pad_multiple, "dropped": 6}
    assert patient.metric("snax_dropped_tokens_total") - before == 6


def test_websocket_wav(patient: Running) -> None:
    codes = codes_of(4)
    wav, _ = patient.stream([ids_of(codes).tobytes()], "format=wav")
    assert struct.unpack("<4sI", wav[:8]) == (b"RIFF", 0xFFFFFFFF)
    audio, rate = soundfile.read(io.BytesIO(wav), dtype="int16")
    assert rate == CONFIG.sampling_rate
    assert_audio(audio, codes)


BODIES: dict[str, Callable[[list[np.ndarray]], bytes]] = {
    "text/plain": lambda codes: text_of(codes).encode(),
    "text/plain; charset=utf-8": lambda codes: ("Grüße " + text_of(codes)).encode(),
    "application/octet-stream": lambda codes: ids_of(codes).tobytes(),
    "application/json": lambda codes: json.dumps({"tokens": ids_of(codes).tolist()}).encode(),
}


@pytest.mark.parametrize("content", BODIES)
def test_http(patient: Running, content: str) -> None:
    """The lengths in the header are exact."""
    codes = codes_of(5)
    response = patient.audio(content, BODIES[content](codes))
    assert response.status_code == 200
    assert response.headers["content-type"] == "audio/wav"
    assert response.headers["transfer-encoding"] == "chunked"
    assert struct.unpack("<4sI", response.content[:8]) == (b"RIFF", len(response.content) - 8)
    audio, rate = soundfile.read(io.BytesIO(response.content), dtype="int16")
    assert rate == CONFIG.sampling_rate
    assert_audio(audio, codes)
    assert_audio(patient.audio(content, BODIES[content](codes), "format=pcm").content, codes)


def test_audio_arrives_before_all_tokens_are_sent(patient: Running) -> None:
    codes = codes_of(6)
    ids = ids_of(codes)
    with patient.connect() as websocket:
        websocket.send(ids[: 6 * 7].tobytes())
        first = websocket.recv(DEADLINE)
        assert isinstance(first, bytes)
        websocket.send(ids[6 * 7 :].tobytes())
        websocket.send(b"")
        rest, _ = finish(websocket)
    assert_audio(first + rest, codes)


def test_empty_stream(patient: Running) -> None:
    assert patient.stream([]) == (b"", {"samples": 0, "dropped": 0})
    assert len(patient.stream([], "format=wav")[0]) == 44


def vanish(running: Running) -> None:
    with running.connect() as websocket:
        websocket.send(ids_of(codes_of(7, 50)).tobytes())
        websocket.recv(DEADLINE)
        websocket.socket.shutdown(socket.SHUT_RDWR)


def vanish_from_http(running: Running) -> None:
    body = ids_of(codes_of(7, 400)).tobytes()
    headers = {"Content-Type": "application/octet-stream"}
    with running.http.stream("POST", "/v1/audio", content=body, headers=headers) as response:
        next(response.iter_raw())


def send_malformed_ids(running: Running) -> None:
    with running.connect("on_error=raise") as websocket:
        websocket.send(ids_of(codes_of(8, 3)).tobytes())
        websocket.send(ids_of(codes_of(8))[1:].tobytes())
        assert closed_by_server(websocket)[0] == 1007


def send_too_large_message(running: Running) -> None:
    with running.connect() as websocket:
        websocket.send(ids_of(codes_of(9, 3)).tobytes())
        with contextlib.suppress(ConnectionClosed):
            websocket.send(bytes(70_000))
        assert closed_by_server(websocket)[0] == 1009


def slow_socket(running: Running) -> socket.socket:
    """Connect with a small receive buffer, so that little audio fits the operating system."""
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.connect(("127.0.0.1", int(running.url.rpartition(":")[2])))
    return raw


def flood_without_reading(running: Running) -> None:
    with running.connect(sock=slow_socket(running), max_queue=1) as websocket:
        for seed in range(20):
            websocket.send(ids_of(codes_of(seed, 20)).tobytes())
        websocket.socket.shutdown(socket.SHUT_RDWR)


def stay_idle(running: Running) -> None:
    with running.connect() as websocket:
        websocket.send(ids_of(codes_of(10, 1)).tobytes())
        websocket.ping().wait(DEADLINE)


BAD = [vanish, vanish_from_http, send_malformed_ids, send_too_large_message, flood_without_reading, stay_idle]


def test_clients_do_not_affect_each_other(patient: Running) -> None:
    """Many clients at once, and each gets its own audio while others misbehave."""

    def behave(client: int) -> None:
        for turn in range(4):
            codes = codes_of(100 * client + turn)
            if turn % 2:
                assert_audio(
                    patient.audio("application/octet-stream", ids_of(codes).tobytes(), "format=pcm").content, codes
                )
            else:
                pieces = [piece.tobytes() for piece in cut(ids_of(codes), turn)]
                assert_audio(patient.stream(pieces)[0], codes)

    def misbehave(bad: Callable[[Running], None]) -> None:
        for _ in range(3):
            bad(patient)

    finished = patient.result("finished")
    with concurrent.futures.ThreadPoolExecutor(20) as threads:
        running = [threads.submit(behave, client) for client in range(10)]
        running += [threads.submit(misbehave, bad) for bad in BAD]
        for future in running:
            future.result()
    patient.wait(active=0, waiting=0)
    assert patient.result("finished") - finished == 40


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.__name__)
def test_bad_client_frees_its_slot(patient: Running, bad: Callable[[Running], None]) -> None:
    before = sum(patient.result(name) for name in ("malformed", "too_long", "disconnected"))
    for _ in range(10):  # more than there are slots
        bad(patient)
    patient.wait(active=0)
    assert sum(patient.result(name) for name in ("malformed", "too_long", "disconnected")) - before == 10
    assert_audio(patient.stream([ids_of(codes_of(0)).tobytes()])[0], codes_of(0))


@pytest.mark.parametrize(
    ("query", "messages", "code", "reason"),
    [
        ("", [b"12345"], 1007, "little-endian int32, 4 bytes each, got 5 bytes"),
        ("on_error=raise", [struct.pack("<i", 140_000)], 1007, "a code of slot 0, 128266 to 132361, got 140000"),
        ("on_error=raise", ["<custom_token_4106>"], 1007, "a code of slot 0, 10 to 4105, got 4106"),
        ("", ["<custom", bytes(4)], 1003, "either text messages or binary messages"),
        ("", [ids_of(codes_of(0, 100)).tobytes(), b"", b"1234"], 1007, "Open a new connection for the next one"),
        ("", [bytes(65_540)], 1009, ""),
    ],
)
def test_malformed_messages(patient: Running, query: str, messages: list[Any], code: int, reason: str) -> None:
    result = "too_long" if code == 1009 else "malformed"
    before = patient.result(result)
    with patient.connect(query) as websocket:
        for message in messages:
            websocket.send(message)
        actual = closed_by_server(websocket)
    assert actual[0] == code
    assert reason in actual[1]
    patient.wait(active=0)
    assert patient.result(result) == before + 1


def test_text_that_is_not_utf_8(patient: Running) -> None:
    with patient.connect() as websocket:
        websocket.send(b"\xff\xff", text=True)
        assert closed_by_server(websocket)[0] == 1007
    patient.wait(active=0)


QUERIES = [
    ("format=mp3", "`format` (='mp3') must be one of pcm, wav"),
    ("layout=snac", "`layout` (='snac') must be one of orpheus, shared, separate"),
    ("on_error=ignore", "`on_error` (='ignore') must be one of raise, skip, resync"),
    ("layout=shared&on_error=resync", 'needs a layout with a `slot_step`. Use "skip" or "raise"'),
    ("voice=tara", "The parameter `voice` is not known. There are format, layout, on_error"),
]


@pytest.mark.parametrize(("query", "message"), QUERIES)
def test_malformed_queries(patient: Running, query: str, message: str) -> None:
    with pytest.raises(InvalidStatus) as refused:
        patient.connect(query)
    assert refused.value.response.status_code == 400
    assert message in json.loads(refused.value.response.body)["error"]
    response = patient.audio("text/plain", b"", query)
    assert response.status_code == 400
    assert message in response.json()["error"]


def test_orpheus_with_another_model(strict: Running) -> None:
    response = strict.audio("text/plain", b"", "layout=orpheus")
    assert response.status_code == 400
    assert "Use 'shared' or 'separate' tokens" in response.json()["error"]


@pytest.mark.parametrize(
    ("content", "body", "status", "message"),
    [
        ("audio/wav", b"", 415, "Content-Type is 'audio/wav', expected text/plain"),
        ("", b"", 415, "Content-Type is ''"),
        ("application/octet-stream", b"12345", 400, "4 bytes each, got 5 bytes"),
        ("application/octet-stream", bytes(64), 400, "not a whole group of 7 tokens"),
        ("text/plain", b"no tokens", 400, "not a whole group of 7 tokens, so there is no audio. 0 tokens were dropped"),
        ("text/plain", b"<custom_token_5000>", 400, "1 tokens were dropped"),
        ("text/plain", b"\xff", 400, "The text must be UTF-8"),
        ("application/json", b"{", 400, 'The body must be JSON, {"tokens": [...]}'),
        ("application/json", b"\xff", 400, "The body must be JSON"),
        ("application/json", b"[" * 90_000, 400, "nested too deeply"),
        ("application/json", b"[1, 2]", 400, 'The body must be {"tokens": [...]} with integers, got'),
        ("application/json", b'{"ids": [1]}', 400, "with integers"),
        ("application/json", b'{"tokens": [1.5]}', 400, "with integers"),
        ("application/json", b'{"tokens": [true]}', 400, "with integers"),
        ("application/json", b'{"tokens": [99999999999999999999]}', 400, "1 tokens were dropped"),
        ("text/plain", bytes(100_001), 413, "longer than 100000 bytes"),
        ("text/plain", 101 * [bytes(1000)], 413, "longer than 100000 bytes"),  # in chunks
    ],
)
def test_malformed_bodies(patient: Running, content: str, body: Any, status: int, message: str) -> None:
    result = "too_long" if status == 413 else "malformed"
    before = patient.result(result)
    response = patient.audio(content, iter(body) if isinstance(body, list) else body)
    assert response.status_code == status
    assert message in response.json()["error"]
    assert patient.result(result) == before + 1


def test_max_seconds(strict: Running) -> None:
    config = dataclasses.replace(CONFIG, codebook_size=64)
    ids = ids_of(codes_of(0, int(30 / GROUP_SECONDS) + 1, config), token_layout("separate", config))
    before = strict.result("too_long")
    response = strict.audio("application/octet-stream", ids.tobytes())
    assert response.status_code == 413
    assert "more than 30 s" in response.json()["error"]
    with strict.connect() as websocket:
        websocket.send(ids.tobytes())
        assert closed_by_server(websocket) == (
            1008,
            "The stream is longer than 30 s of audio. Divide the text into several streams.",
        )
    strict.wait(active=0)
    assert strict.result("too_long") == before + 2


def test_idle_client(strict: Running) -> None:
    before = strict.result("timeout")
    with strict.connect() as websocket:
        assert closed_by_server(websocket) == (1008, "The client has neither sent nor received for 1 s.")
    with socket.create_connection(("127.0.0.1", int(strict.url.rpartition(":")[2]))) as raw:
        raw.sendall(b"POST /v1/audio HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\nContent-Length: 9\r\n\r\n<cust")
        assert raw.recv(1000).startswith(b"HTTP/1.1 408 ")
    strict.wait(active=0)
    assert strict.result("timeout") == before + 2


@pytest.mark.parametrize("sends_on", [False, True])
def test_client_that_does_not_read(strict: Running, sends_on: bool) -> None:
    """It loses its slot, also if it goes on to send."""
    config = dataclasses.replace(CONFIG, codebook_size=64)
    group = ids_of(codes_of(0, 1, config), token_layout("separate", config)).tobytes()
    before, stop = strict.result("timeout") + strict.result("disconnected"), threading.Event()

    def keep_sending() -> None:
        with contextlib.suppress(ConnectionClosed, OSError):
            while not stop.wait(0.1):
                websocket.send(bytes([255, 255, 255, 255]))  # -1, which is ignored

    with strict.connect(sock=slow_socket(strict), max_queue=1) as websocket:
        thread = threading.Thread(target=keep_sending)
        for _ in range(int(29 / GROUP_SECONDS)):
            websocket.send(group)
        if sends_on:
            thread.start()
        strict.wait(active=0)
        end = time.monotonic() + DEADLINE
        while strict.result("timeout") + strict.result("disconnected") == before:
            assert time.monotonic() < end
        stop.set()
        if sends_on:
            thread.join()
        websocket.socket.shutdown(socket.SHUT_RDWR)


def test_full_pool(strict: Running) -> None:
    before = strict.result("rejected")
    config = dataclasses.replace(CONFIG, codebook_size=64)
    body = ids_of(codes_of(0, config=config), token_layout("separate", config)).tobytes()
    with contextlib.ExitStack() as stack:
        holders, stop = [stack.enter_context(strict.connect()) for _ in range(2)], threading.Event()

        def keep_slots() -> None:
            while not stop.wait(0.1):
                for holder in holders:
                    holder.send(" ")

        thread = threading.Thread(target=keep_slots)
        thread.start()
        try:
            with pytest.raises(InvalidStatus) as refused:
                strict.connect()
            assert refused.value.response.status_code == 503
            assert refused.value.response.headers["Retry-After"] == "1"
            assert "All 2 slots are in use" in json.loads(refused.value.response.body)["error"]
            response = strict.audio("application/octet-stream", body)
            assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
        finally:
            stop.set()
            thread.join()
    strict.wait(active=0)
    assert strict.result("rejected") == before + 2


def test_waiting_client_gets_a_slot(patient: Running) -> None:
    codes = codes_of(11)
    with contextlib.ExitStack() as stack:
        holders = [stack.enter_context(patient.connect()) for _ in range(8)]
        patient.wait(active=8, waiting=0)
        assert patient.metric("snax_active_streams") == 8
        with concurrent.futures.ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(patient.stream, [ids_of(codes).tobytes()])
            patient.wait(active=8, waiting=1)
            assert patient.metric("snax_waiting_streams") == 1
            holders[3].close()
            assert_audio(waiting.result(DEADLINE)[0], codes)
    patient.wait(active=0)


def test_health_and_metrics(patient: Running) -> None:
    assert patient.health() == {
        "status": "ok",
        "model": "small",
        "sampling_rate": CONFIG.sampling_rate,
        "slots": 8,
        "active": 0,
        "waiting": 0,
    }
    names = ("snax_audio_seconds_total", "snax_step_seconds_count", "snax_step_seconds_sum")
    before = [patient.metric(name) for name in names]
    finished = patient.result("finished")
    patient.stream([ids_of(codes_of(12)).tobytes()])
    audio, steps, seconds = [patient.metric(name) - value for name, value in zip(names, before, strict=True)]
    assert audio == pytest.approx(GROUPS * GROUP_SECONDS)
    assert steps >= GROUPS
    assert seconds > 0
    assert patient.result("finished") == finished + 1
    factor = patient.metric("snax_audio_seconds_total") / patient.metric("snax_step_seconds_sum")
    assert patient.metric("snax_real_time_factor") == pytest.approx(factor)


def test_streams_that_do_not_end_are_closed_after_drain_seconds() -> None:
    with serving(small.model(CONFIG), slots=1, drain_seconds=0) as running, running.connect() as websocket:
        running.server.handle_exit(signal.SIGTERM, None)
        assert closed_by_server(websocket)[0] == 1012


# The service without a server.


async def decode(service: Service, codes: list[np.ndarray]) -> np.ndarray:
    """Decode with one session."""
    with contextlib.closing(await service.open()) as session:

        async def feed() -> None:
            await session.feed([level[0] for level in codes])
            session.end()

        feeding, audio = asyncio.create_task(feed()), [chunk async for chunk in session]
        await feeding
        assert session.samples == sum(map(len, audio))
        return np.concatenate(audio)


def test_service() -> None:
    """More streams than slots."""

    async def run() -> list[np.ndarray]:
        async with Service(small.model(CONFIG), 3, max_wait=DEADLINE) as service:
            audio = await asyncio.gather(*(decode(service, codes_of(seed)) for seed in range(10)))
            assert (service.active, service.waiting) == (0, 0)
            return audio

    for seed, audio in enumerate(asyncio.run(run())):
        assert_audio(audio, codes_of(seed))


def test_slots_are_given_in_order_of_arrival() -> None:
    async def run() -> list[int]:
        order = []

        async def take(number: int) -> None:
            with contextlib.closing(await service.open()):
                order.append(number)

        async with Service(small.model(CONFIG), 1, max_wait=DEADLINE) as service:
            holder = await service.open()
            tasks = []
            for number in range(6):
                tasks.append(asyncio.create_task(take(number)))
                await asyncio.sleep(0)  # let it join the queue
            tasks[2].cancel()  # a client that gives up
            await asyncio.sleep(0)
            assert service.waiting == 5
            holder.close()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert (service.active, service.waiting) == (0, 0)
        return order

    assert asyncio.run(run()) == [0, 1, 3, 4, 5]


def test_busy_service() -> None:
    async def run() -> None:
        async with Service(small.model(CONFIG), 1, max_wait=0) as service:
            session = await service.open()
            with pytest.raises(BusyError, match="All 1 slots are in use, and none became free within 0 s"):
                await service.open()
            session.close()
            session.close()
            with pytest.raises(ValueError, match="The stream has ended"):
                await session.feed([level[0] for level in codes_of(0)])
            (await service.open()).close()
            service.draining = True
            with pytest.raises(BusyError, match="shutting down"):
                await service.open()

    asyncio.run(run())


def test_feed_waits_for_the_reader() -> None:
    codes = codes_of(0, 400)  # 26 s, more than `MAX_AHEAD`

    async def run() -> np.ndarray:
        async with Service(small.model(CONFIG), 1) as service:
            with contextlib.closing(await service.open()) as session:
                feeding = asyncio.create_task(session.feed([level[0] for level in codes]))
                assert not (await asyncio.wait([feeding], timeout=2))[0]
                audio = []
                while not feeding.done():
                    audio.append(await anext(session))
                await feeding
                session.end()
                return np.concatenate([*audio, *[chunk async for chunk in session]])

    assert_audio(asyncio.run(run()), codes)


def test_step_that_fails() -> None:
    """Sessions raise. The server exits with the error, so that its supervisor starts a new one."""

    async def run() -> None:
        async with Service(small.model(CONFIG), 1) as service:
            session = await service.open()
            with mock.patch.object(service._pool, "step", side_effect=RuntimeError("out of memory")):
                await session.feed([level[0] for level in codes_of(0)])
                with pytest.raises(RuntimeError, match="Decoding failed"):
                    await anext(session)
            assert "out of memory" in str(service.error)

    asyncio.run(run())
    with bind(ServeConfig(port=0)) as listener:
        server = Server(small.model(CONFIG), ServeConfig())
        server._service.error = RuntimeError("out of memory")
        with pytest.raises(RuntimeError, match="A decoding step failed"):
            server.run(sockets=[listener])


def test_default_host_is_loopback() -> None:
    with bind(ServeConfig(port=0)) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"


# The command.


@contextlib.contextmanager
def process(*options: str) -> Iterator[tuple[subprocess.Popen[str], Running]]:
    """Run `snax serve` with the bundled model."""
    line = [sys.executable, "-m", "snax.cli", "serve", "-m", "mini_16khz", "--port", "0", "--slots", "2", *options]
    running = jobs.run(line)
    assert running.stderr is not None
    try:
        log = ""
        while not (ready := re.search(r"ready on (http://127\.0\.0\.1:\d+)$", log, re.MULTILINE)):
            text = running.stderr.readline()
            assert text, log
            log += text
        with httpx2.Client(base_url=ready[1], trust_env=False, timeout=DEADLINE) as http:
            yield running, Running(ready[1], http)
    finally:
        running.kill()
        running.communicate()


@functools.cache
def mini() -> snax.SNAC:
    return snax.load("mini_16khz")


@pytest.mark.slow
def test_sigterm_drains() -> None:
    """The running stream finishes in full, new ones are rejected, and the exit code is 0."""
    codes = codes_of(0, 20)
    ids = ids_of(codes)
    with process() as (running, server):
        with server.connect() as websocket:
            websocket.send(ids[:70].tobytes())
            first = websocket.recv(DEADLINE)
            assert isinstance(first, bytes)
            running.send_signal(signal.SIGTERM)
            server.wait(status="draining", active=1)
            assert server.http.get("/health").status_code == 503
            with pytest.raises(InvalidStatus) as refused:
                server.connect()
            assert refused.value.response.status_code == 503
            response = server.audio("application/octet-stream", ids.tobytes())
            assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
            assert "shutting down" in response.json()["error"]
            websocket.send(ids[70:].tobytes())
            websocket.send(b"")
            rest, _ = finish(websocket)
        assert running.wait(DEADLINE) == 0
    assert_audio(first + rest, codes, mini())


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)])
def test_second_signal_ends_at_once(number: signal.Signals, code: int) -> None:
    with process("--drain-seconds", "86400") as (running, server), server.connect():
        running.send_signal(number)
        server.wait(status="draining", active=1)
        running.send_signal(number)
        assert running.wait(DEADLINE) == code


@pytest.mark.slow
def test_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        line = [sys.executable, "-m", "snax.cli", "serve", "-m", "mini_16khz", f"--port={other.getsockname()[1]}"]
        result = subprocess.run(line, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "cannot be opened: [Errno 98] Address already in use. Use another --host or --port" in result.stderr


@pytest.mark.slow
def test_documented_client(tmp_path: Path) -> None:
    """The client of docs/serving.md. test_docs runs its other code."""
    page = (Path(__file__).parents[1] / "docs" / "serving.md").read_text()
    (client,) = re.findall(r"^```py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    with process() as (_, server):
        port = server.url.rpartition(":")[2]
        script = client.replace(":8000", f":{port}").replace("speech.wav", str(tmp_path / "speech.wav"))
        subprocess.run([sys.executable, "-c", script], check=True)
    assert soundfile.info(tmp_path / "speech.wav").frames > 0


def test_only_one_coroutine_raises_a_disconnect() -> None:
    """Both coroutines of a stream may read. The result must be the disconnect, whoever comes first."""

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.disconnect", "code": 1006}

    async def read_twice() -> None:
        websocket = WebSocket({"type": "websocket", "headers": []}, receive, mock.AsyncMock())
        websocket.client_state = WebSocketState.CONNECTED
        first, second = (asyncio.create_task(app._receive(websocket)) for _ in range(2))
        await asyncio.wait([first, second], return_when=asyncio.FIRST_COMPLETED)
        assert isinstance(first.exception(), WebSocketDisconnect)
        assert not second.done()
        second.cancel()

    asyncio.run(read_twice())
