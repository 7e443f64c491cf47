"""Turn a corpus of audio into batches of Orpheus token ids: `python examples/corpus.py`.

Extracts the bundled clips to token shards and reads them with Grain, as for training a language model. Needs the
`train` extra.
"""

import tempfile
from pathlib import Path
from typing import Any

import grain
import numpy as np

import snax
from snax.extract.config import ExtractConfig
from snax.extract.run import extract
from snax.tokens import ORPHEUS, ORPHEUS_END, ORPHEUS_PAD, ORPHEUS_START

from demo import CLIP, load

LENGTH, BATCH = 512, 2


def main() -> None:
    model, name = load()
    with tempfile.TemporaryDirectory() as folder:
        # On the command line: snax extract tests/data -o tokens --tokens orpheus
        config = ExtractConfig((str(CLIP.parent),), out=f"{folder}/tokens", model=name, tokens="orpheus")
        extract(model, config)
        print(*sorted(str(path.relative_to(folder)) for path in Path(folder, "tokens").iterdir()), sep="\n")

        source = snax.open_tokens(f"{folder}/tokens")
        dataset = grain.MapDataset.source(source).shuffle(seed=0).map(sequence).batch(BATCH)
        for batch in dataset:
            print(batch["clip"], batch["ids"].shape, batch["ids"][0, :8].tolist(), "...")

        # The shards also contain the codes. Ids convert back to codes, and codes to audio.
        row = source[0]
        ids = ORPHEUS.flatten([level[None] for level in row["codes"]])
        audio = model.decode(ORPHEUS.unflatten(ids))[0, 0, : row["num_samples"]]
        print(f"{row['id']}: {ids.size} ids -> {audio.size / row['sample_rate']:.2f} s")


def sequence(row: dict[str, Any]) -> dict[str, Any]:
    """Return the first ids of a clip between Orpheus' start and end ids, padded to `LENGTH`."""
    ids = [ORPHEUS_START, *row["tokens"][: LENGTH - 2].tolist(), ORPHEUS_END]
    return {"clip": row["id"], "ids": np.array(ids + [ORPHEUS_PAD] * (LENGTH - len(ids)), np.int32)}


if __name__ == "__main__":
    main()
