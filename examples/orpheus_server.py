"""Speak what an Orpheus language model generates, while it generates it: `python examples/orpheus_server.py`.

The language model runs in another server with OpenAI's completions API, such as vLLM or llama.cpp:

    vllm serve canopylabs/orpheus-3b-0.1-ft
    python examples/orpheus_server.py --llm http://127.0.0.1:8000/v1

Open http://127.0.0.1:8080 and type, or use OpenAI's speech API:

    curl -N http://127.0.0.1:8080/v1/audio/speech -H 'content-type: application/json' \
      -d '{"input": "Hello there.", "voice": "tara"}' | ffplay -autoexit -

Needs the `serve` extra.
"""

import argparse
import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator

import httpx2
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

import snax
from snax.serve.requests import wav_header
from snax.serve.service import BusyError, Service, Session
from snax.tokens import ORPHEUS_NUMBERS, TokenParser

# As in Orpheus' own code: https://github.com/canopyai/Orpheus-TTS
PROMPT = "<custom_token_3><|begin_of_text|>{voice}: {text}<|eot_id|><custom_token_4><custom_token_5><custom_token_1>"
SAMPLING = {"temperature": 0.6, "top_p": 0.8, "repetition_penalty": 1.3, "stop": ["<custom_token_2>"]}
MAX_CHARACTERS, MAX_TOKENS = 2000, 8192

PAGE = """<!doctype html><meta charset="utf-8"><title>Orpheus with snax</title>
<style>body { font: 16px sans-serif; max-width: 40em; margin: 3em auto } textarea { width: 100%; height: 6em }</style>
<h1>Orpheus with snax</h1>
<form><textarea name="text">Hello there. This is spoken while it is generated.</textarea>
<p><input name="voice" value="tara" aria-label="voice"> <button>Play</button></form>
<audio controls></audio>
<script>
document.querySelector("form").onsubmit = event => {
  event.preventDefault()
  const audio = document.querySelector("audio")
  audio.src = "/speak?" + new URLSearchParams(new FormData(event.target))
  audio.play()
}
</script>"""


class SpeechResponse(StreamingResponse):
    """A WAV file of what a language model generates, while it generates it. Closes the session at the end."""

    def __init__(self, service: Service, session: Session, pieces: AsyncGenerator[str]):
        super().__init__(self._wav(service.sampling_rate, session, pieces), media_type="audio/wav")
        self._session = session

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.closing(self._session):  # also if the caller has gone before the first byte
            await super().__call__(scope, receive, send)

    @staticmethod
    async def _wav(sampling_rate: int, session: Session, pieces: AsyncGenerator[str]) -> AsyncIterator[bytes]:
        feeding = asyncio.create_task(feed(session, pieces))
        try:
            yield wav_header(sampling_rate, None)
            async for samples in session:
                yield samples.astype("<i2").tobytes()
            await feeding
        finally:  # also if the caller has gone
            feeding.cancel()


async def feed(session: Session, pieces: AsyncGenerator[str]) -> None:
    """Feed a stream with pieces of text."""
    parser = TokenParser(ORPHEUS_NUMBERS)
    try:
        async with contextlib.aclosing(pieces):  # so that the language model stops if this is cancelled
            async for piece in pieces:
                await session.feed(parser.feed_text(piece))
        session.end()
    except Exception:
        session.close()  # ends the audio
        raise


async def generate(llm: httpx2.AsyncClient, text: str, voice: str) -> AsyncGenerator[str]:
    """Yield the pieces of text that the language model generates."""
    body = SAMPLING | {"stream": True, "max_tokens": MAX_TOKENS, "prompt": PROMPT.format(text=text, voice=voice)}
    async with llm.stream("POST", "completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                yield json.loads(line.removeprefix("data: "))["choices"][0]["text"]


def app(model: snax.SNAC, llm_url: str, slots: int) -> Starlette:
    """Return the web application."""
    service, llm = Service(model, slots), httpx2.AsyncClient(base_url=llm_url, timeout=60)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with service, llm:
            yield

    async def page(request: Request) -> Response:
        return HTMLResponse(PAGE)

    async def speak(request: Request) -> Response:
        return await respond(request.query_params.get("text"), request.query_params.get("voice"))

    async def speech(request: Request) -> Response:
        body = await request.json()
        return await respond(body.get("input"), body.get("voice"))

    async def respond(text: object, voice: object) -> Response:
        if not isinstance(text, str) or not isinstance(voice, str) or not 0 < len(text) <= MAX_CHARACTERS:
            error = f"Send a text of 1 to {MAX_CHARACTERS} characters and the name of a voice."
            return JSONResponse({"error": error}, 400)
        try:
            session = await service.open()
        except BusyError as error:
            return JSONResponse({"error": str(error)}, 503, {"Retry-After": "1"})
        return SpeechResponse(service, session, generate(llm, text, voice))

    routes = [Route("/", page), Route("/speak", speak), Route("/v1/audio/speech", speech, methods=["POST"])]
    return Starlette(routes=routes, lifespan=lifespan)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", default="http://127.0.0.1:8000/v1", help="the language model's API")
    parser.add_argument("--model", default="snac_24khz", help="the codec, as in snax.load")
    parser.add_argument("--slots", type=int, default=16, help="callers at the same time")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    args = parser.parse_args()
    uvicorn.run(app(snax.load(args.model), args.llm, args.slots), host=args.host, port=args.port)


if __name__ == "__main__":
    main()
