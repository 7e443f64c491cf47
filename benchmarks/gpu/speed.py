"""Time snax, torch and torch.compile."""

import contextlib
import functools
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch

import snax
from benchmarks.speed import Decode, Encode, ask, flop, worker
from snax.codec.config import PUBLISHED_CONFIGS
from tests.helpers.recordings import clip

from .common import NAMES, draw_weights, median_seconds, peak_gib, save, snax_model, torch_model

CASES = {"1 s": (1, 1), "10 s": (1, 10), "60 s": (1, 60), "8 x 10 s": (8, 10), "64 x 10 s": (64, 10)}


def speech(name: str, case: str) -> np.ndarray:
    config = PUBLISHED_CONFIGS[name]
    batch, seconds = CASES[case]
    samples = seconds * config.sampling_rate // config.pad_multiple * config.pad_multiple
    return np.tile(np.resize(clip("speech_7s.wav", config.sampling_rate, 7), (1, 1, samples)), (batch, 1, 1))


def speed(folder: Path) -> None:
    for name in NAMES:
        draw_weights(folder, name)
    with contextlib.ExitStack() as stack:
        compiled, seconds = compile_in_torch(stack, folder)
        time_all(stack, folder, compiled, seconds)


def compile_in_torch(stack: contextlib.ExitStack, folder: Path) -> tuple[dict[Any, Connection], dict[Any, Any]]:
    """Start one process per model and case, all compiling at once. Returns the processes and their compile seconds."""
    pairs = [(name, case) for name in NAMES for case in CASES]
    compiled = {pair: stack.enter_context(worker(serve_torch, folder, True)) for pair in pairs}
    with ThreadPoolExecutor(len(pairs)) as pool:
        results = pool.map(lambda pair: ask(compiled[pair], "prepare", *pair), pairs)
        seconds = {pair: result["first calls"] for pair, result in zip(pairs, results, strict=True)}
    return compiled, seconds


def time_all(
    stack: contextlib.ExitStack, folder: Path, compiled: dict[Any, Connection], seconds: dict[Any, Any]
) -> None:
    eager = stack.enter_context(worker(serve_torch, folder, False))
    result: dict[str, Any] = {"float32 TFLOP/s of a matrix product": ask(eager, "ceiling"), "rows": []}
    for name in NAMES:
        snax_worker = stack.enter_context(worker(serve_snax, folder))
        for case in CASES:
            row = {"model": name, "case": case, "flop": ask(eager, "flop", name, case)}
            row["snax"] = timed(snax_worker, name, case)
            row["torch"] = timed(eager, name, case)
            row["torch, TF32"] = timed(eager, name, case, "tf32")
            row["torch.compile"] = timed(compiled[name, case], name, case) | {"first calls": seconds[name, case]}
            result["rows"].append(row)
            print(table_row(row), flush=True)
            save("speed", result)


def table_row(row: dict[str, Any]) -> str:
    cells = [f"{row['model']}  {row['case']:>9}"]
    for system in ("snax", "torch", "torch, TF32", "torch.compile"):
        result = row[system]
        cells.append(f"{system} {result['encode']:6.0f} {result['decode']:6.0f} ({sum(result['first calls']):.1f} s)")
    return "   ".join(cells)


def timed(pipe: Connection, name: str, case: str, *flags: str) -> dict[str, Any]:
    """Return the worker's result with speeds as multiples of real time."""
    batch, seconds = CASES[case]
    result = ask(pipe, "time", name, case, *flags)
    return result | {operation: batch * seconds / result[operation] for operation in ("encode", "decode")}


def serve_snax(pipe: Connection, folder: Path) -> None:
    key = jax.random.key(0)
    models: dict[str, snax.SNAC] = {}
    with contextlib.suppress(EOFError):
        while True:
            _, name, case = pipe.recv()
            if name not in models:
                models[name] = snax_model(folder, name)
            encode = functools.partial(models[name].encode, jax.device_put(speech(name, case)))
            before = time.perf_counter()
            codes = jax.block_until_ready(encode())
            between = time.perf_counter()
            decode = functools.partial(models[name].decode, codes, key=key)
            jax.block_until_ready(decode())
            result = {"first calls": [between - before, time.perf_counter() - between]}
            for operation, run in (("encode", encode), ("decode", decode)):
                result[operation] = median_seconds(lambda run=run: jax.block_until_ready(run()))
            result["peak GiB"] = peak_gib()
            pipe.send(result)


def serve_torch(pipe: Connection, folder: Path, compiled: bool) -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    cache: dict[Any, Any] = {}
    with contextlib.suppress(EOFError), torch.inference_mode():
        while True:
            request, *arguments = pipe.recv()
            if request == "ceiling":
                pipe.send(matmul_tflops())
                continue
            name, case, *flags = arguments
            if name not in cache:
                cache[name] = torch_model(folder, name).cuda()
            model = cache[name]
            audio = torch.from_numpy(speech(name, case)).cuda()
            if request == "flop":
                pipe.send(flop(model, audio))
                continue
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = "tf32" in flags
            encode, decode = Encode(model), Decode(model)
            if compiled:
                if (name, case) not in cache:
                    cache[name, case] = [torch.compile(module, dynamic=False) for module in (encode, decode)]
                encode, decode = cache[name, case]
            torch.cuda.reset_peak_memory_stats()
            before = time.perf_counter()
            codes = synchronized(encode(audio))
            between = time.perf_counter()
            synchronized(decode(*codes))
            result = {"first calls": [between - before, time.perf_counter() - between]}
            if request == "time":
                result["encode"] = median_seconds(lambda encode=encode, audio=audio: synchronized(encode(audio)))
                result["decode"] = median_seconds(lambda decode=decode, codes=codes: synchronized(decode(*codes)))
            result["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
            del audio, codes
            torch.cuda.empty_cache()
            pipe.send(result)


def matmul_tflops() -> float:
    """Return TFLOP/s of a large float32 product."""
    size = 8192
    a, b = (torch.randn(size, size, device="cuda") for _ in range(2))
    return 2 * size**3 / median_seconds(lambda: synchronized(a @ b)) / 1e12


def synchronized(result: Any) -> Any:
    torch.cuda.synchronize()
    return result
