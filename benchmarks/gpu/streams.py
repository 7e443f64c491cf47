"""Time steps of many streams, in which every stream gets a coarse frame of 85 ms."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import serving
from benchmarks.many import clips
from snax.codec.config import PUBLISHED_CONFIGS

from .common import draw_weights, in_process, save, snax_model, torch_model

NAME = "snac_24khz"
SLOTS = (16, 64, 256, 1024)


def streams(folder: Path) -> None:
    draw_weights(folder, NAME)
    rows = []
    for slots in SLOTS:
        row: dict[str, Any] = {"slots": slots}
        row["StreamPool"] = in_process(time_pool, folder, slots)
        row["sliding window, torch"] = in_process(time_window, folder, slots)
        rows.append(row)
        print(json.dumps(row), flush=True)
        save("streams", {"frame ms": serving.FRAME_MS, "rows": rows})


def time_pool(folder: Path, slots: int) -> dict[str, float]:
    step = serving.BusyPool(snax_model(folder, NAME), stream_codes(folder, slots))
    return serving.summary(serving.time_steps(step))


def time_window(folder: Path, slots: int) -> dict[str, float]:
    """Time the sliding window of Orpheus servers, which decodes the last 28 tokens of each stream again, in torch."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    reference = torch_model(folder, NAME).cuda()

    def decode(codes: list[np.ndarray]) -> np.ndarray:
        return reference.decode([torch.from_numpy(level).cuda() for level in codes]).cpu().numpy()

    with torch.inference_mode():
        return serving.summary(serving.time_steps(serving.window(stream_codes(folder, slots), decode)))


def stream_codes(folder: Path, slots: int) -> list[np.ndarray]:
    audio = next(clips(PUBLISHED_CONFIGS[NAME].sampling_rate, 10))[None, None]
    with torch.inference_mode():
        codes = torch_model(folder, NAME).encode(torch.from_numpy(audio))
    return serving.split_groups([level.numpy() for level in codes], slots)
