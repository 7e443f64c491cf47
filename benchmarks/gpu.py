"""snax and the PyTorch reference on one NVIDIA GPU: `python -m benchmarks.gpu parity|speed`.

`parity` runs the full-size parity tests on the GPU and counts the tokens that differ from the reference's in float64:
for clips alone, in batches and in rows, and for each matmul precision. `speed` times snax, torch and torch.compile.
Both write benchmarks/gpu.json. Weights are drawn, and scaled so that the model behaves like a trained one. Needs
jax[cuda12], a torch with CUDA, snac, pytest and pytest-xdist.
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
# Their names here and in JAX. All but the first round the factors of float32 products to fewer digits.
PRECISIONS = {
    "highest": "highest",
    "X6": "BF16_BF16_F32_X6",
    "X3": "BF16_BF16_F32_X3",
    "TF32x3": "TF32_TF32_F32_X3",
    "TF32": "TF32_TF32_F32",
}
CLIPS, SECONDS, BATCH = 128, 10, 16  # whose tokens are counted: 105,000 at 24 kHz

Codes = list[np.ndarray]  # for each level (clips, frames)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("block", choices=["parity", "speed"])
    block = parser.parse_args().block
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # torch needs memory too
    with tempfile.TemporaryDirectory() as folder:
        {"parity": parity, "speed": speed}[block](Path(folder))


def save(block: str, result: Any) -> None:
    everything = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    everything[block] = {"machine": machine()} | result
    RESULTS.write_text(json.dumps(everything, indent=1) + "\n")


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
    """Speech and music from random places at random loudness, (clips, 1, samples), of whole pad multiples."""
    config, rng = PUBLISHED_CONFIGS[name], np.random.default_rng(0)
    files = ("speech_7s.wav", "speech_3s.wav", "guit_em9.flac", "loop_tabla.flac", "ambi_piano.flac")
    audio = np.concatenate([clip(file, config.sampling_rate, 60)[0, 0] for file in files])
    samples = SECONDS * config.sampling_rate // config.pad_multiple * config.pad_multiple
    places, gains = rng.integers(len(audio), size=CLIPS), np.exp(rng.uniform(np.log(0.1), 0, CLIPS))
    rolled = [gain * np.resize(np.roll(audio, -place), samples) for place, gain in zip(places, gains, strict=True)]
    return np.stack(rolled)[:, None].astype(np.float32)


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
            exact = pool.submit(in_process, exact_in_torch, folder, name)
            processes = [pool.submit(in_process, ways, folder, name) for _ in range(2)]
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
    """Run the full-size parity tests on the GPU. Returns the last line of pytest's output."""
    command = [sys.executable, "-m", "pytest", "-n", "6", "--dist", "worksteal", "-q", "-W", "default"]
    command += ["tests/test_published.py", "-m", "not pretrained", "-k", "snac_24khz or snac_32khz"]
    found = subprocess.run(command, capture_output=True, text=True)
    print(found.stdout[-3000:], flush=True)
    return found.stdout.strip().splitlines()[-1]


def in_process(function: Callable[..., Any], *args: Any) -> Any:
    """Call `function` in a process of its own, so that its GPU memory is free afterwards."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def exact_in_torch(folder: Path, name: str) -> tuple[Codes, dict[str, Any]]:
    """The reference's tokens in float64; and how its float32 differs from them, with TF32 off and on."""
    model, clips = torch_model(folder, name).cuda(), torch.from_numpy(varied_clips(name)).cuda()

    def encode() -> tuple[Codes, torch.Tensor]:
        dtype, latents, codes = next(model.parameters()).dtype, [], []
        for batch in clips.split(BATCH):
            latents.append(model.encoder(batch.to(dtype)))
            codes.append([level.cpu() for level in model.quantizer(latents[-1])[1]])
        return join(codes), torch.cat(latents)

    found = {}
    with torch.inference_mode():
        for tf32 in (False, True):
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
            found["torch, TF32" if tf32 else "torch"] = encode()
        model.double()
        exact, latents = encode()
    np.save(folder / f"{name}_latents.npy", latents.cpu().numpy())
    return exact, {
        system: {"differ": differing(codes, exact), "latents": relative(theirs, latents)}
        for system, (codes, theirs) in found.items()
    }


def relative(latents: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest difference over the RMS."""
    return ((latents - exact).abs().max() / exact.square().mean().sqrt()).item()


def ways(folder: Path, name: str) -> dict[str, Codes]:
    """The tokens of the same clips alone, in batches and in packed rows."""
    model, clips = snax_model(folder, name), varied_clips(name)
    found = {
        "alone": join([model.encode(audio[None]) for audio in clips]),
        f"in batches of {BATCH}": join([model.encode(batch) for batch in np.split(clips, CLIPS // BATCH)]),
    }
    for rows in (1, 8):
        encoded = snax.encode_many(model, clips[:, 0], rows=rows)
        found[f"in rows, {rows} at a time"] = join([[level[None] for level in each.codes] for each in encoded])
    return found


def compare(
    name: str, exact: Codes, reference: dict[str, Any], first: dict[str, Codes], second: dict[str, Codes]
) -> dict[str, Any]:
    tokens = sum(level.size for level in exact)
    result = {"tokens": tokens, "differ from float64": {}, "differ from the other process": {}}
    for system, found in reference.items():
        result["differ from float64"][system] = found["differ"]
    for way, codes in first.items():
        result["differ from float64"][f"snax, {way}"] = differing(codes, exact)
        result["differ from the other process"][way] = differing(codes, second[way])
    result["differ between ways"] = max(differing(codes, first["alone"]) for codes in first.values())
    result["latents off float64"] = {system: found["latents"] for system, found in reference.items()}
    return result


def differing(ours: Codes, theirs: Codes) -> list[int]:
    """How many tokens are not the same, for each level."""
    return [int((a != b).sum()) for a, b in zip(ours, theirs, strict=True)]


def precisions(folder: Path, name: str) -> dict[str, Any]:
    """For each precision: tokens that differ from "highest", the latents' error, and the speed of encoding a batch."""
    clips, latents = varied_clips(name), torch.from_numpy(np.load(folder / f"{name}_latents.npy"))
    batches = [jax.device_put(batch) for batch in np.split(clips, CLIPS // BATCH)]
    found: dict[str, Any] = {}
    highest: Codes = []
    for label, precision in PRECISIONS.items():
        model = snax_model(folder, name, precision)
        ours = [model.audio_to_latents(batch) for batch in batches]
        codes = join([model.quantize(each)[1] for each in ours])
        highest = highest or codes
        encode = functools.partial(model.audio_to_latents, batches[0])
        found[label] = {
            "differ": differing(codes, highest),
            "latents": relative(torch.from_numpy(np.concatenate(ours).swapaxes(1, 2)), latents),
            "x real time": BATCH * SECONDS / turn(lambda encode=encode: jax.block_until_ready(encode())),
        }
    return found


# Speed.


def speed(folder: Path) -> None:
    for name in NAMES:
        draw_weights(folder, name)
    with contextlib.ExitStack() as stack:
        compiled, seconds = compile_in_torch(stack, folder)
        time_all(stack, folder, compiled, seconds)


def compile_in_torch(stack: contextlib.ExitStack, folder: Path) -> tuple[dict[Any, Connection], dict[Any, Any]]:
    """One process per model and case, all compiling at once. Returns the processes and their compile seconds."""
    each = [(name, case) for name in NAMES for case in CASES]
    compiled = {one: stack.enter_context(worker(serve_torch, folder, True)) for one in each}
    with ThreadPoolExecutor(len(each)) as pool:
        first = dict(zip(each, pool.map(lambda one: ask(compiled[one], "prepare", *one), each), strict=True))
    return compiled, {one: found["first calls"] for one, found in first.items()}


def time_all(
    stack: contextlib.ExitStack, folder: Path, compiled: dict[Any, Connection], seconds: dict[Any, Any]
) -> None:
    eager = stack.enter_context(worker(serve_torch, folder, False))
    result: dict[str, Any] = {"float32 TFLOP/s of a matrix product": ask(eager, "ceiling"), "rows": []}
    for name in NAMES:
        ours = stack.enter_context(worker(serve_snax, folder))
        for case in CASES:
            row = {"model": name, "case": case, "flop": ask(eager, "flop", name, case)}
            row["snax"] = timed(ours, name, case)
            row["torch"] = timed(eager, name, case)
            row["torch, TF32"] = timed(eager, name, case, "tf32")
            row["torch.compile"] = timed(compiled[name, case], name, case) | {"first calls": seconds[name, case]}
            result["rows"].append(row)
            print(table_row(row), flush=True)
            save("speed", result)


def table_row(row: dict[str, Any]) -> str:
    cells = [f"{row['model']}  {row['case']:>9}"]
    for system in ("snax", "torch", "torch, TF32", "torch.compile"):
        found = row[system]
        cells.append(f"{system} {found['encode']:6.0f} {found['decode']:6.0f} ({sum(found['first calls']):.1f} s)")
    return "   ".join(cells)


def timed(pipe: Connection, name: str, case: str, *flags: str) -> dict[str, Any]:
    """Multiples of real time."""
    batch, seconds = CASES[case]
    found = ask(pipe, "time", name, case, *flags)
    return found | {what: batch * seconds / found[what] for what in ("encode", "decode")}


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
            found = {"first calls": [between - before, time.perf_counter() - between]}
            for what, run in (("encode", encode), ("decode", decode)):
                found[what] = turn(lambda run=run: jax.block_until_ready(run()))
            found["peak GiB"] = jax.devices()[0].memory_stats()["peak_bytes_in_use"] / 2**30
            pipe.send(found)


def serve_torch(pipe: Connection, folder: Path, compiled: bool) -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    cache: dict[Any, Any] = {}
    with contextlib.suppress(EOFError), torch.inference_mode():
        while True:
            what, *rest = pipe.recv()
            if what == "ceiling":
                pipe.send(ceiling())
                continue
            name, case, *flags = rest
            if name not in cache:
                cache[name] = torch_model(folder, name).cuda()
            model = cache[name]
            audio = torch.from_numpy(speech(name, case)).cuda()
            if what == "flop":
                pipe.send(flop(model, audio))
                continue
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = "tf32" in flags
            encode, decode = Encode(model), Decode(model)
            if compiled:
                if (name, case) not in cache:
                    cache[name, case] = [torch.compile(each, dynamic=False) for each in (encode, decode)]
                encode, decode = cache[name, case]
            torch.cuda.reset_peak_memory_stats()
            before = time.perf_counter()
            codes = synchronized(encode(audio))
            between = time.perf_counter()
            synchronized(decode(*codes))
            found = {"first calls": [between - before, time.perf_counter() - between]}
            if what == "time":
                found["encode"] = turn(lambda encode=encode, audio=audio: synchronized(encode(audio)))
                found["decode"] = turn(lambda decode=decode, codes=codes: synchronized(decode(*codes)))
            found["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
            del audio, codes
            torch.cuda.empty_cache()
            pipe.send(found)


def ceiling() -> float:
    """TFLOP/s of a large float32 product."""
    size = 8192
    a, b = (torch.randn(size, size, device="cuda") for _ in range(2))
    return 2 * size**3 / turn(lambda: synchronized(a @ b)) / 1e12


def flop(model: snac.SNAC, audio: torch.Tensor) -> dict[str, float]:
    """Floating-point operations of the reference's convolutions and linear layers."""
    counted = 0

    def count(module: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        nonlocal counted
        if isinstance(module, torch.nn.ConvTranspose1d):
            counted += 2 * inputs[0].numel() * module.out_channels // module.groups * module.kernel_size[0]
        elif isinstance(module, torch.nn.Conv1d):
            counted += 2 * output.numel() * module.in_channels // module.groups * module.kernel_size[0]
        elif isinstance(module, torch.nn.Linear):
            counted += 2 * output.numel() * module.in_features

    hooks = [module.register_forward_hook(count) for module in model.modules()]
    codes = Encode(model)(audio)
    encode, counted = counted, 0
    Decode(model)(*codes)
    for hook in hooks:
        hook.remove()
    return {"encode": encode, "decode": counted}


def synchronized(result: Any) -> Any:
    torch.cuda.synchronize()
    return result


def turn(run: Callable[[], Any]) -> float:
    """The median of at least four runs and 0.3 seconds', after one to warm up."""
    run()
    times: list[float] = []
    while sum(times) < 0.3 or len(times) < 4:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    main()
