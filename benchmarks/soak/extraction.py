"""Extract shards with two processes from copies of 1,500 clips, a tar archive and a Parquet table among them.

The processes are killed and their output files are damaged, again and again. In the end every clip of every copy must
be in the shards once, with the codes of an undisturbed run. The model is snac_24khz with random weights.
"""

import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from helpers import corpora, jobs

import snax
from benchmarks.soak.processes import memory_mb, session
from snax.codec.config import PUBLISHED_CONFIGS


def extraction(seconds: float) -> dict[str, Any]:
    rng, counts, memory = random.Random(0), Counter[str](), []
    with tempfile.TemporaryDirectory() as name:
        folder, out = Path(name), Path(name, "out")
        snax.save(snax.SNAC(PUBLISHED_CONFIGS["snac_24khz"], rngs=nnx.Rngs(0)), folder / "model")
        original = corpora.folder(
            folder / "original", corpora.clips(1_400, seed=1) | {f"bad{i}.wav": b"bad" for i in range(20)}
        )
        corpora.table(original / "a.parquet", corpora.clips(40, seed=2))
        corpora.tar(original / "a.tar", corpora.clips(40, seed=3))

        def start(corpus: Path, out: Path, count: int) -> list[Any]:
            return jobs.start([corpus], out, folder / "model", count, clips_per_shard=250, num_decoders=1)

        begin = time.monotonic()
        jobs.finish(start(original, folder / "reference", 1))
        copies = max(1, round(seconds / (time.monotonic() - begin)))
        for copy in range(copies):
            shutil.copytree(original, folder / "corpus" / f"{copy:04}", copy_function=os.link)

        begin = time.monotonic()
        while True:
            processes = start(folder / "corpus", out, 2)
            started = last_sample = time.monotonic()
            kill_time = started + rng.uniform(30, 600)
            while time.monotonic() < kill_time and any(process.poll() is None for process in processes):
                time.sleep(1)
                if time.monotonic() > last_sample + 60:
                    last_sample = time.monotonic()
                    megabytes = memory_mb([pid for process in processes for pid in session(process.pid)])
                    memory.append([round(last_sample - begin), round(last_sample - started), megabytes])
            if all(process.poll() is not None for process in processes):
                break
            for process in processes[: rng.randint(1, 2)]:  # if only one is killed, the other must not hang
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    counts["kills"] += 1
            for process in processes:
                process.communicate(timeout=300)
            counts["files_damaged"] += damage(out, rng)
        jobs.finish(processes)
        elapsed = time.monotonic() - begin

        expected, occurrences = dict(clips(folder / "reference", original)), Counter[tuple[str, ...]]()
        for (path, member), codes in clips(out, folder / "corpus"):
            copy, _, path = path.partition("/")
            occurrences[copy, path, member] += 1
            for level, expected_level in zip(codes, expected[path, member], strict=True):
                np.testing.assert_array_equal(level, expected_level)
        assert set(occurrences.values()) == {1}
        assert len(occurrences) == copies * len(expected) == copies * 1_480
        quarantined = (out / "_quarantine.jsonl").read_text().splitlines()
        assert len(quarantined) == len(set(quarantined)) == copies * 20
    return {
        "hours": round(elapsed / 3600, 2),
        "clips": copies * 1_500,
        **counts,
        "clips_lost_or_twice_or_with_other_codes": 0,  # asserted above
        "MB_by_second_and_second_since_start": memory,
    }


def clips(out: Path, corpus: Path) -> Iterator[tuple[tuple[str, str], list[np.ndarray]]]:
    """Yield (file in the corpus, member of that file or "") and the codes of every clip in the shards."""
    rows = snax.open_tokens(out)
    for row in (rows[i] for i in range(len(rows))):
        yield (str(Path(row["source"]).relative_to(corpus)), row["member"] or ""), row["codes"]


def damage(out: Path, rng: random.Random) -> int:
    """Flip a bit in up to three output files, cut them in half or remove them. Returns the number of files."""
    files = sorted(path for path in out.rglob("*") if path.is_file() and path.name not in ("job.json", "plan.parquet"))
    victims = rng.sample(files, min(len(files), rng.randint(0, 3)))
    for path in victims:
        content = bytearray(path.read_bytes())
        match rng.choice(["flip", "cut", "remove"]):
            case "flip" if content:
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
                path.write_bytes(content)
            case "cut":
                path.write_bytes(content[: len(content) // 2])
            case _:
                path.unlink()
    return len(victims)
