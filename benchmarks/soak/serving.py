"""Run `snax serve` with 24 clients, of which some misbehave.

Every clip that a good client gets must equal an in-process decode, and no bad client may keep a slot. In the end no
stream is active, and SIGTERM ends the server with exit code 0.
"""

import asyncio
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

import snax
from benchmarks.soak.clients import BAD, GOOD, BusyError, Clip, Server
from benchmarks.soak.processes import memory_mb, session
from snax.tokens import ORPHEUS_NUMBERS, token_layout

GOOD_CLIENTS, BAD_CLIENTS, SLOTS = 16, 8, 8
LENGTHS, CLIPS_PER_LENGTH = 10, 5  # each length compiles a program
# A hang, not a speed limit.
DEADLINE = 300.0


def serving(seconds: float) -> dict[str, Any]:
    line = [sys.executable, "-m", "snax.cli", "serve", "-m", "mini_16khz", "--port", "0", "--slots", str(SLOTS)]
    line += ["--idle-timeout", "10", "--max-wait", "2"]
    expected = clips()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")  # a pipe that nobody reads would block the server
        with log.open("w") as file:
            environment = os.environ | {"JAX_PLATFORMS": "cpu"}
            process = subprocess.Popen(line, env=environment, stderr=file, start_new_session=True)
        try:
            result = asyncio.run(soak(wait_for_url(process, log), process, expected, seconds))
            process.send_signal(signal.SIGTERM)
            assert process.wait(DEADLINE) == 0
            place = log.read_text().find("Traceback")
            assert place == -1, log.read_text()[max(0, place - 1000) : place + 5000]
        except BaseException:
            print(log.read_text()[-10_000:], file=sys.stderr)
            raise
        finally:
            process.kill()
            process.wait()
    return result


def clips() -> list[Clip]:
    """Return clips of 1 to 20 s with random codes."""
    model, rng, clips = snax.load("mini_16khz"), np.random.default_rng(0), []
    group_seconds = model.config.pad_multiple / model.config.sampling_rate
    layout = token_layout("orpheus", model.config)
    for groups in rng.integers(round(1 / group_seconds), round(20 / group_seconds), size=LENGTHS):
        shape = (CLIPS_PER_LENGTH, int(groups))
        codes = [
            rng.integers(model.config.codebook_size, size=(shape[0], shape[1] * n), dtype=np.int32) for n in (1, 2, 4)
        ]
        audio = np.asarray(model.decode(codes))[:, 0]
        pcm = np.round(np.clip(audio, -1, 1) * 32767).astype(np.int16)
        ids, numbers = np.asarray(layout.flatten(codes)), np.asarray(ORPHEUS_NUMBERS.flatten(codes))
        clips += [Clip(*arrays, model.config.sampling_rate) for arrays in zip(ids, numbers, pcm, strict=True)]
    return clips


def wait_for_url(process: subprocess.Popen[bytes], log: Path) -> str:
    end = time.monotonic() + DEADLINE
    while not (ready := re.search(r"ready on (http://127\.0\.0\.1:\d+)$", log.read_text(), re.MULTILINE)):
        assert process.poll() is None, "The server has ended."
        assert time.monotonic() < end, "The server is not ready."
        time.sleep(0.1)
    return ready[1]


async def soak(url: str, process: subprocess.Popen[bytes], clips: list[Clip], seconds: float) -> dict[str, Any]:
    start, memory, most_active = time.monotonic(), list[int](), 0
    results, counts = dict[str, Counter[str]](), Counter[str]()

    async def run_client(number: int) -> None:
        rng, kinds = random.Random(number), GOOD if number < GOOD_CLIENTS else BAD
        while time.monotonic() - start < seconds:
            kind, clip = rng.choice([*kinds]), rng.choice(clips)
            is_busy = True
            while is_busy:
                try:
                    async with asyncio.timeout(DEADLINE):
                        result = await kinds[kind](server, clip, rng)
                    is_busy = False
                except BusyError:
                    result = "503"
                results.setdefault(kind, Counter())[result] += 1
                await asyncio.sleep(rng.uniform(0.1, 2))
            if result == "equal":
                counts["samples"] += len(clip.pcm)

    async def sample_each_minute() -> None:
        nonlocal most_active
        while time.monotonic() - start < seconds:
            health = await server.health()
            assert health["slots"] == SLOTS >= health["active"], health
            most_active = max(most_active, health["active"])
            assert (await server.http.get("/metrics")).status_code == 200
            memory.append(memory_mb([*session(process.pid)]))
            await asyncio.sleep(min(60, max(0, start + seconds - time.monotonic())))

    limits = httpx2.Limits(max_keepalive_connections=0)  # the server may close one while a request is on its way
    async with httpx2.AsyncClient(base_url=url, trust_env=False, timeout=DEADLINE, limits=limits) as http:
        server = Server(url, http)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(sample_each_minute())
            for number in range(GOOD_CLIENTS + BAD_CLIENTS):
                tasks.create_task(run_client(number))
        elapsed, end = time.monotonic() - start, time.monotonic() + DEADLINE
        while (health := await server.health())["active"] or health["waiting"]:
            assert time.monotonic() < end, f"A slot is lost: {health}"
            await asyncio.sleep(0.1)
        metrics = (await http.get("/metrics")).text
    samples = [sample for family in text_string_to_metric_families(metrics) for sample in family.samples]
    return {
        "hours": round(elapsed / 3600, 2),
        "clients": {kind: dict(results[kind]) for kind in sorted(results)},
        "streams_by_result": {s.labels["result"]: int(s.value) for s in samples if s.name == "snax_streams_total"},
        "most_active": most_active,
        "audio_seconds_compared": round(counts["samples"] / clips[0].rate),
        "audio_seconds_made": round(next(s.value for s in samples if s.name == "snax_audio_seconds_total")),
        "step_ms_p50": quantile(samples, 0.5),
        "step_ms_p99": quantile(samples, 0.99),
        "MB_each_minute": memory,
    }


def quantile(samples: list[Any], q: float) -> float:
    """Return a quantile of snax_step_seconds in ms, as Prometheus estimates it: linear within its bucket."""
    buckets = [(float(s.labels["le"]), s.value) for s in samples if s.name == "snax_step_seconds_bucket"]
    low, below, target = 0.0, 0.0, q * buckets[-1][1]
    for high, count in buckets[:-1]:
        if count >= target:
            return round(1000 * (low + (high - low) * (target - below) / (count - below)), 1)
        low, below = high, count
    return 1000 * low  # the last finite bound
