"""Fine-tune a speech codec on music: `python examples/finetune.py MUSIC [OUT]`.

MUSIC is a folder of audio files, for example the 206 recordings of instruments (CC0) from
`npm pack supersonic-scsynth-samples`. Every tenth file is held out of training. Prints scores of the held-out files
before and after training, and draws spectrograms; docs/training.md shows the result.

Takes three minutes on two cores. Needs the `train` extra. On Linux GLIBC_TUNABLES=glibc.malloc.hugetlb=1
makes it faster.
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import snax
from snax.data.audio import read
from snax.evaluate import metrics
from snax.evaluate.pictures import spectrograms
from snax.train.config import Data, Losses, Optimizer, TrainConfig
from snax.train.run import train

STEPS = 200
SUFFIXES = (".flac", ".wav", ".ogg", ".mp3")


def main() -> None:
    music = Path(sys.argv[1])
    out = Path(sys.argv[2]) if len(sys.argv) > 2 else Path("finetuned")
    files = sorted(path for path in music.rglob("*") if path.suffix in SUFFIXES)
    held_out, training = files[::10], [path for i, path in enumerate(files) if i % 10]

    model = snax.load("mini_16khz")
    rate = model.config.sampling_rate
    clips = {path.name: read(path, rate)[0] for path in held_out}
    before = reconstruct(model, clips)

    config = TrainConfig(
        steps=STEPS,
        data=Data(inputs=tuple(map(str, training)), crop_seconds=0.64, batch=8),
        # Half of the initial learning rate of the model's first run, because this is a short run.
        optimizer=Optimizer(learning_rate=5e-4, warmup_steps=STEPS // 20, lr_decay=0.1 ** (1 / STEPS)),
        losses=Losses(spectral_convergence=20.0, commitment=1.0),
        ema_decay=0.95,
        log_every=20,
    )
    last = train(config, out / "run", "mini_16khz", decoders=2)
    after = reconstruct(snax.load(last), clips)

    print(f"{len(clips)} held-out clips (lower is better):")
    for metric, distance in (
        ("mel distance", lambda decoded, clip: metrics.mel_distance(decoded, clip, rate)),
        ("STFT distance", metrics.stft_distance),
    ):
        first, second = (
            np.mean([distance(decoded[name], clip) for name, clip in clips.items()]) for decoded in (before, after)
        )
        print(f"  {metric:14} before {first:.3f}, after {second:.3f}")
    name = max(clips, key=lambda name: len(clips[name]))
    figure = Figure(figsize=(10, 9), layout="constrained")
    figure.suptitle(name)
    spectrograms(figure, {"original": clips[name], "before": before[name], "after": after[name]}, rate)
    figure.savefig(out / "finetuned.png", dpi=100)
    print(f"spectrograms of the longest clip: {out / 'finetuned.png'}")
    print(f"the fine-tuned codec: snax.load({str(last)!r})")


def reconstruct(model: snax.SNAC, clips: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return dict(zip(clips, snax.decode_many(model, snax.encode_many(model, clips.values())), strict=True))


if __name__ == "__main__":
    main()
