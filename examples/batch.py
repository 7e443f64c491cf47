"""Encode and decode clips of different lengths at once: `python examples/batch.py [AUDIO ...]`.

Each clip gets the tokens that it gets alone.
"""

import sys
from pathlib import Path

import snax
from snax.data.audio import read

from demo import CLIP, load


def main() -> None:
    bundled = (path for path in CLIP.parent.iterdir() if path.suffix in (".wav", ".flac"))
    paths = [Path(argument) for argument in sys.argv[1:]] or sorted(bundled)
    model, _ = load()
    clips = (read(path, model.config.sampling_rate)[0] for path in paths)  # a generator: files are read as needed

    encoded = []
    for path, clip in zip(paths, snax.encode_many(model, clips), strict=True):
        encoded.append(clip)
        tokens = [len(level) for level in clip.codes]
        print(f"{path.name:<20} {clip.samples} samples encoded to {' + '.join(map(str, tokens))} tokens")

    for path, clip, audio in zip(paths, encoded, snax.decode_many(model, encoded), strict=True):
        assert len(audio) == clip.samples  # padding is removed
        print(f"{path.name:<20} decoded to {len(audio)} samples")


if __name__ == "__main__":
    main()
