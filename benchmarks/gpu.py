"""Compare snax with the PyTorch reference on one NVIDIA GPU: `python -m benchmarks.gpu parity|speed`.

`parity` runs the full-size parity tests on the GPU. It also counts the tokens that differ from the reference's float64
tokens: for clips alone, in batches and in packed rows, and for each matmul precision. `speed` times snax, torch and
torch.compile. Both write benchmarks/gpu.json. Weights are random, scaled so that the model behaves like a trained one.
Needs jax[cuda12], torch with CUDA, snac, pytest and pytest-xdist.
"""

import argparse
import contextlib
import datetime
import functools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax
import numpy as np
import snac
import torch

import snax
from benchmarks.speed import Decode, Encode, ask, worker
from snax.codec.config import PUBLISHED_CONFIGS
from snax.weights.torch_weights import from_torch
from tests.helpers.recordings import clip
from tests.helpers.reference import numpy_state_dict, trained_like

RESULTS = Path(__file__).parent / "gpu.json"
NAMES = ("snac_24khz", "snac_32khz")
CASES = {"1 s": (1, 1), "10 s": (1, 10), "60 s": (1, 60), "8 x 10 s": (8, 10), "64 x 10 s": (64, 10)}
# Short names of JAX's precisions. All but the first round the factors of float32 products to fewer digits.
PRECISIONS = {
    "highest": "highest",
    "X6": "BF16_BF16_F32_X6",
    "X3": "BF16_BF16_F32_X3",
    "TF32x3": "TF32_TF32_F32_X3",
    "TF32": "TF32_TF32_F32",
}
CLIPS, SECONDS, BATCH = 128, 10, 16  # of `parity`: 105,000 tokens at 24 kHz

Codes = list[np.ndarray]  # (clips, frames) for each level


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("block", choices=["parity", "speed"])
    block = parser.parse_args().block
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # leave memory for torch
    with tempfile.TemporaryDirectory() as folder:
        {"parity": parity, "speed": speed}[block](Path(folder))


def save(block: str, result: Any) -> None:
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[block] = {"machine": machine()} | result
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


@functools.cache
def machine() -> dict[str, str]:
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    card, driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().split(", ")
    versions = {"jax": jax.__version__, "torch": torch.__version__, "cuda": str(torch.version.cuda)}
    return {"date": datetime.date.today().isoformat(), "card": card, "driver": driver, **versions}


# Models and audio.


def draw_weights(folder: Path, name: str) -> None:
    config = PUBLISHED_CONFIGS[name]
    speech = clip("speech_7s.wav", config.sampling_rate, 4)
    torch.save(trained_like(config.to_dict(), speech).state_dict(), folder / f"{name}.pt")


def torch_model(folder: Path, name: str) -> snac.SNAC:
    model = snac.SNAC(**PUBLISHED_CONFIGS[name].to_dict()).eval()
    model.load_state_dict(torch.load(folder / f"{name}.pt"))
    return model


def snax_model(folder: Path, name: str, precision: str = "highest") -> snax.SNAC:
    state_dict = numpy_state_dict(torch_model(folder, name))
    return jax.device_put(from_torch(state_dict, PUBLISHED_CONFIGS[name], precision=precision))


def varied_clips(name: str) -> np.ndarray:
    """Return speech and music from random positions with random gains, (clips, 1, samples) in whole pad multiples."""
    config, rng = PUBLISHED_CONFIGS[name], np.random.default_rng(0)
    files = ("speech_7s.wav", "speech_3s.wav", "guit_em9.flac", "loop_tabla.flac", "ambi_piano.flac")
    audio = np.concatenate([clip(file, config.sampling_rate, 60)[0, 0] for file in files])
    samples = SECONDS * config.sampling_rate // config.pad_multiple * config.pad_multiple
    starts, gains = rng.integers(len(audio), size=CLIPS), np.exp(rng.uniform(np.log(0.1), 0, CLIPS))
    clips = [gain * np.resize(np.roll(audio, -start), samples) for start, gain in zip(starts, gains, strict=True)]
    return np.stack(clips)[:, None].astype(np.float32)


def speech(name: str, case: str) -> np.ndarray:
    config = PUBLISHED_CONFIGS[name]
    batch, seconds = CASES[case]
    samples = seconds * config.sampling_rate // config.pad_multiple * config.pad_multiple
    return np.tile(np.resize(clip("speech_7s.wav", config.sampling_rate, 7), (1, 1, samples)), (batch, 1, 1))


def join(batches: Sequence[Sequence[Any]]) -> Codes:
    return [np.concatenate([np.asarray(codes) for codes in level]) for level in zip(*batches, strict=True)]


# Parity.


def parity(folder: Path) -> None:
    result: dict[str, Any] = {"audio": f"{CLIPS} clips of {SECONDS} s", "models": {}}
    for name in NAMES:
        draw_weights(folder, name)
    with ThreadPoolExecutor() as pool:
        tests = pool.submit(run_tests)
        for name in NAMES:
            exact = pool.submit(in_process, torch_tokens, folder, name)
            processes = [pool.submit(in_process, snax_tokens, folder, name) for _ in range(2)]
            result["models"][name] = compare(name, *exact.result(), *(process.result() for process in processes))
            print(json.dumps(result["models"][name], indent=1), flush=True)
            save("parity", result)
        result["tests"] = tests.result()
    save("parity", result)
    for name in NAMES:
        result["models"][name]["precisions"] = in_process(precisions, folder, name)
        print(json.dumps(result["models"][name]["precisions"], indent=1), flush=True)
        save("parity", result)


def run_tests() -> str:
    """Run the full-size parity tests on the GPU and return the last line of pytest's output."""
    command = [sys.executable, "-m", "pytest", "-n", "6", "--dist", "worksteal", "-q", "-W", "default"]
    command += ["tests/test_published.py", "-m", "not pretrained", "-k", "snac_24khz or snac_32khz"]
    output = subprocess.run(command, capture_output=True, text=True).stdout
    print(output[-3000:], flush=True)
    return output.strip().splitlines()[-1]


def in_process(function: Callable[..., Any], *args: Any) -> Any:
    """Call `function` in a process of its own, which frees its GPU memory afterwards."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def torch_tokens(folder: Path, name: str) -> tuple[Codes, dict[str, Any]]:
    """Return the reference's tokens in float64, and the errors of its float32 results with TF32 off and on."""
    model, clips = torch_model(folder, name).cuda(), torch.from_numpy(varied_clips(name)).cuda()

    def encode() -> tuple[Codes, torch.Tensor]:
        dtype, latents, codes = next(model.parameters()).dtype, [], []
        for batch in clips.split(BATCH):
            latents.append(model.encoder(batch.to(dtype)))
            codes.append([level.cpu() for level in model.quantizer(latents[-1])[1]])
        return join(codes), torch.cat(latents)

    results = {}
    with torch.inference_mode():
        for tf32 in (False, True):
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
            results["torch, TF32" if tf32 else "torch"] = encode()
        model.double()
        exact, exact_latents = encode()
    np.save(folder / f"{name}_latents.npy", exact_latents.cpu().numpy())
    return exact, {
        system: {"differ": count_differences(codes, exact), "latents": relative_error(latents, exact_latents)}
        for system, (codes, latents) in results.items()
    }


def relative_error(latents: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the largest difference over the RMS."""
    return ((latents - exact).abs().max() / exact.square().mean().sqrt()).item()


def snax_tokens(folder: Path, name: str) -> dict[str, Codes]:
    """Return the tokens of the same clips encoded alone, in batches and in packed rows."""
    model, clips = snax_model(folder, name), varied_clips(name)
    results = {
        "alone": join([model.encode(audio[None]) for audio in clips]),
        f"in batches of {BATCH}": join([model.encode(batch) for batch in np.split(clips, CLIPS // BATCH)]),
    }
    for rows in (1, 8):
        encoded = snax.encode_many(model, clips[:, 0], rows=rows)
        results[f"in rows, {rows} at a time"] = join([[level[None] for level in result.codes] for result in encoded])
    return results


def compare(
    name: str, exact: Codes, reference: dict[str, Any], first: dict[str, Codes], second: dict[str, Codes]
) -> dict[str, Any]:
    tokens = sum(level.size for level in exact)
    result = {"tokens": tokens, "differ from float64": {}, "differ from the other process": {}}
    for system, errors in reference.items():
        result["differ from float64"][system] = errors["differ"]
    for mode, codes in first.items():
        result["differ from float64"][f"snax, {mode}"] = count_differences(codes, exact)
        result["differ from the other process"][mode] = count_differences(codes, second[mode])
    result["differ between ways"] = max(count_differences(codes, first["alone"]) for codes in first.values())
    result["latents off float64"] = {system: errors["latents"] for system, errors in reference.items()}
    return result


def count_differences(codes: Codes, expected: Codes) -> list[int]:
    """Return the number of tokens that differ, for each level."""
    return [int((a != b).sum()) for a, b in zip(codes, expected, strict=True)]


def precisions(folder: Path, name: str) -> dict[str, Any]:
    """Return for each precision the tokens that differ from "highest", the latents' error and the encoding speed."""
    clips, exact_latents = varied_clips(name), torch.from_numpy(np.load(folder / f"{name}_latents.npy"))
    batches = [jax.device_put(batch) for batch in np.split(clips, CLIPS // BATCH)]
    result: dict[str, Any] = {}
    highest: Codes = []
    for label, precision in PRECISIONS.items():
        model = snax_model(folder, name, precision)
        latents = [model.audio_to_latents(batch) for batch in batches]
        codes = join([model.quantize(batch)[1] for batch in latents])
        highest = highest or codes
        encode = functools.partial(model.audio_to_latents, batches[0])
        result[label] = {
            "differ": count_differences(codes, highest),
            "latents": relative_error(torch.from_numpy(np.concatenate(latents).swapaxes(1, 2)), exact_latents),
            "x real time": BATCH * SECONDS / median_seconds(lambda encode=encode: jax.block_until_ready(encode())),
        }
    return result


# Speed.


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
            result["peak GiB"] = jax.devices()[0].memory_stats()["peak_bytes_in_use"] / 2**30
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


def flop(model: snac.SNAC, audio: torch.Tensor) -> dict[str, float]:
    """Count the floating-point operations of the reference's convolutions and linear layers."""
    total = 0

    def count(module: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        nonlocal total
        if isinstance(module, torch.nn.ConvTranspose1d):
            total += 2 * inputs[0].numel() * module.out_channels // module.groups * module.kernel_size[0]
        elif isinstance(module, torch.nn.Conv1d):
            total += 2 * output.numel() * module.in_channels // module.groups * module.kernel_size[0]
        elif isinstance(module, torch.nn.Linear):
            total += 2 * output.numel() * module.in_features

    hooks = [module.register_forward_hook(count) for module in model.modules()]
    codes = Encode(model)(audio)
    encode, total = total, 0
    Decode(model)(*codes)
    for hook in hooks:
        hook.remove()
    return {"encode": encode, "decode": total}


def synchronized(result: Any) -> Any:
    torch.cuda.synchronize()
    return result


def median_seconds(run: Callable[[], Any]) -> float:
    """Return the median time of at least four runs and at least 0.3 s, after one warm-up run."""
    run()
    times: list[float] = []
    while sum(times) < 0.3 or len(times) < 4:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    main()
