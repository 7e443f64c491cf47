"""examples/orpheus_server.py with a language model that replays the tokens of a real clip, for HTTP and a browser."""

import asyncio
import contextlib
import importlib
import io
import json
import os
import random
import shutil
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import soundfile
import uvicorn
from helpers import recordings
from playwright.sync_api import sync_playwright
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

import snax
from snax.data.audio import read
from snax.tokens import ORPHEUS_NUMBERS

pytestmark = pytest.mark.slow

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


class Replay:
    """A server with OpenAI's completions API. It generates the tokens of a clip, in pieces that are cut anywhere."""

    def __init__(self, numbers: np.ndarray):
        self.requests: list[dict[str, Any]] = []
        self.stopped = threading.Event()
        """Set when a caller has gone before the end."""
        self.endless = False
        self._text = "".join(f"<custom_token_{number}>" for number in numbers)

    async def complete(self, request: Request) -> Response:
        self.requests.append(await request.json())
        return StreamingResponse(self._pieces(), media_type="text/event-stream")

    async def _pieces(self) -> AsyncIterator[str]:
        rng, text = random.Random(0), self._text
        try:
            while text or self.endless:
                text = text or self._text
                size = rng.randint(1, 200)
                piece, text = text[:size], text[size:]
                yield f"data: {json.dumps({'choices': [{'text': piece}]})}\n\n"
                await asyncio.sleep(0)
            yield "data: [DONE]\n\n"
        except (asyncio.CancelledError, GeneratorExit):
            self.stopped.set()
            raise


@contextlib.contextmanager
def running(app: Starlette) -> Iterator[str]:
    """Run an application on a free port. Yields its URL."""
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, log_level="error"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.02)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = server.force_exit = True
        thread.join()


@pytest.fixture(scope="module")
def model() -> snax.SNAC:
    return snax.load("mini_16khz")


@pytest.fixture(scope="module")
def codes(model: snax.SNAC) -> list[np.ndarray]:
    return [np.asarray(level) for level in model.encode(read(recordings.DATA / "speech_3s.wav", 16_000)[None])]


@pytest.fixture(scope="module")
def llm(codes: list[np.ndarray]) -> Replay:
    return Replay(ORPHEUS_NUMBERS.flatten(codes)[0])


@pytest.fixture(scope="module")
def url(model: snax.SNAC, llm: Replay) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "examples")
        example = importlib.import_module("orpheus_server")
    completions = Starlette(routes=[Route("/v1/completions", llm.complete, methods=["POST"])])
    with running(completions) as llm_url, running(example.app(model, f"{llm_url}/v1", slots=2)) as url:
        yield url


def test_speaks_what_the_language_model_generates(
    url: str, llm: Replay, model: snax.SNAC, codes: list[np.ndarray]
) -> None:
    response = httpx2.post(f"{url}/v1/audio/speech", json={"input": "Hello.", "voice": "tara"}, timeout=60)
    assert response.headers["content-type"] == "audio/wav"
    pcm, rate = soundfile.read(io.BytesIO(response.content), dtype="int16")
    assert rate == 16_000
    expected = np.clip(np.asarray(model.decode(codes))[0, 0], -1, 1) * 32767
    # Half a step of rounding, and float32 sums in another order.
    np.testing.assert_allclose(pcm, expected, rtol=0, atol=0.5 + 32767 * 1e-5)
    request = llm.requests[-1]
    assert request["stream"] is True
    assert "tara: Hello.<|eot_id|>" in request["prompt"]


def test_stops_the_language_model_when_the_caller_has_gone(url: str, llm: Replay) -> None:
    llm.endless = True
    try:
        for _ in range(3):  # more callers than slots, so their slots are free again
            llm.stopped.clear()
            with httpx2.stream("GET", f"{url}/speak?text=a&voice=b", timeout=60) as response:
                assert response.status_code == 200
                received = 0
                for part in response.iter_bytes():
                    received += len(part)
                    if received > 20_000:
                        break
            assert llm.stopped.wait(60)
    finally:
        llm.endless = False


@pytest.mark.parametrize("fields", [{"input": "", "voice": "a"}, {"input": "a" * 3000, "voice": "a"}, {"input": "a"}])
def test_rejects_bad_requests(url: str, fields: dict[str, str]) -> None:
    response = httpx2.post(f"{url}/v1/audio/speech", json=fields, timeout=60)
    assert response.status_code == 400
    assert "text of 1 to 2000 characters and the name of a voice" in response.json()["error"]


@pytest.mark.skipif(BROWSER is None and "CI" not in os.environ, reason="needs Chromium: apt install chromium")
def test_plays_in_a_browser(url: str) -> None:
    """A click on "Play" plays the whole clip."""
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
        browser = playwright.chromium.launch(executable_path=BROWSER, args=flags)
        tab = browser.new_page()
        tab.goto(url)
        tab.get_by_role("button", name="Play").click()
        tab.wait_for_function("document.querySelector('audio').ended", timeout=60_000)
        assert tab.evaluate("document.querySelector('audio').currentTime") == pytest.approx(3, abs=0.5)
        browser.close()
