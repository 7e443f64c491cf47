"""Count the tokens that differ from the reference's tokens in float64, and run the parity tests."""

import functools
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from torch.nn import functional

import snax
from snax.codec.config import PUBLISHED_CONFIGS
from tests.helpers.recordings import clip

from .common import NAMES, draw_weights, in_process, median_seconds, save, snax_model, torch_model

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


def varied_clips(name: str) -> np.ndarray:
    """Return speech and music from random positions with random gains, (clips, 1, samples) in whole pad multiples."""
    config, rng = PUBLISHED_CONFIGS[name], np.random.default_rng(0)
    files = ("speech_7s.wav", "speech_3s.wav", "guit_em9.flac", "loop_tabla.flac", "ambi_piano.flac")
    audio = np.concatenate([clip(file, config.sampling_rate, 60)[0, 0] for file in files])
    samples = SECONDS * config.sampling_rate // config.pad_multiple * config.pad_multiple
    starts, gains = rng.integers(len(audio), size=CLIPS), np.exp(rng.uniform(np.log(0.1), 0, CLIPS))
    clips = [gain * np.resize(np.roll(audio, -start), samples) for start, gain in zip(starts, gains, strict=True)]
    return np.stack(clips)[:, None].astype(np.float32)


def join(batches: Sequence[Sequence[Any]]) -> Codes:
    return [np.concatenate([np.asarray(codes) for codes in level]) for level in zip(*batches, strict=True)]


def parity(folder: Path) -> None:
    result: dict[str, Any] = {"audio": f"{CLIPS} clips of {SECONDS} s", "models": {}}
    for name in NAMES:
        draw_weights(folder, name)
        with ThreadPoolExecutor() as pool:
            exact = pool.submit(in_process, torch_tokens, folder, name)
            processes = [pool.submit(in_process, snax_tokens, folder, name) for _ in range(2)]
            first, second = (process.result() for process in processes)
        tokens = exact.result()[0]
        row = result["models"][name] = compare(name, *exact.result(), first, second)
        row["largest margin"] = {mode: margins(folder, name, codes, tokens) for mode, codes in first.items()}
        print(json.dumps(row, indent=1), flush=True)
        save("parity", result)
        row["precisions"] = in_process(precisions, folder, name)
        print(json.dumps(row["precisions"], indent=1), flush=True)
        save("parity", result)
    result["tests"] = run_tests()
    save("parity", result)


def run_tests() -> str:
    """Run the full-size parity tests on the GPU and return the last line of pytest's output."""
    command = [sys.executable, "-m", "pytest", "-n", "6", "--dist", "worksteal", "-q", "-W", "default"]
    command += ["tests/test_published.py", "-m", "not pretrained", "-k", "snac_24khz or snac_32khz"]
    output = subprocess.run(command, capture_output=True, text=True).stdout
    print(output[-3000:], flush=True)
    return output.strip().splitlines()[-1]


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


def margins(folder: Path, name: str, codes: Codes, exact: Codes) -> list[float]:
    """Return for each level how far the differing tokens are from ties.

    This is the cosine similarity to the token that float64 selects, minus that to the token in `codes`: the largest of
    all differing tokens whose coarser tokens are right.
    """
    residual = torch.from_numpy(np.load(folder / f"{name}_latents.npy"))
    right = torch.ones(residual.shape[0], residual.shape[2], dtype=torch.bool)
    largest = []
    with torch.inference_mode():
        for quantizer, level, expected in zip(
            torch_model(folder, name).quantizer.double().quantizers, *map(tensors, (codes, exact)), strict=True
        ):
            vectors = quantizer.in_proj(functional.avg_pool1d(residual, quantizer.stride)).transpose(1, 2)
            places = (level != expected) & right.unflatten(1, (-1, quantizer.stride)).all(2)
            similarity = functional.normalize(vectors[places]) @ functional.normalize(quantizer.codebook.weight).T
            difference = [similarity.gather(1, x[places][:, None]) for x in (expected, level)]
            largest.append(max((difference[0] - difference[1]).flatten().tolist(), default=0.0))
            right &= (level == expected).repeat_interleave(quantizer.stride, 1)
            z_q = quantizer.out_proj(quantizer.decode_code(expected))
            residual = residual - z_q.repeat_interleave(quantizer.stride, 2)
    return largest


def tensors(codes: Codes) -> list[torch.Tensor]:
    return [torch.from_numpy(np.asarray(level, np.int64)) for level in codes]


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
