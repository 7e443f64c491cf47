"""Hours of use, and whether memory grows or anything is lost: `python -m benchmarks.soak streaming|extraction [HOURS]`.

streaming: one stream of snac_24khz (drawn weights) that never ends, a coarse frame a push, its codes repeating; every
round must sound exactly like the first, and the process stay as large as it was.
extraction: two processes make shards of 1,500 clips, a tar and a table among them, and are killed, and their shards
damaged, again and again; each time that they have come to an end, the shards must be those of a run left alone.
Figures go to soak.json, with the memory of the processes all along.
"""

import datetime
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

import snax
from benchmarks.speed import machine
from snax.config import PUBLISHED_CONFIGS

HERE = Path(__file__).parent


def main() -> None:
    what, hours = sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else 1.0
    found = {"streaming": streaming, "extraction": extraction}[what](3600 * hours)
    path = HERE / "soak.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results[what] = {"date": datetime.date.today().isoformat(), "device": machine()["device"], **found}
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results[what], indent=1))


def streaming(seconds: float) -> dict[str, Any]:
    config = PUBLISHED_CONFIGS["snac_24khz"]
    model = snax.SNAC(config, rngs=nnx.Rngs(0))
    rng, groups = np.random.default_rng(0), 50  # 4.3 s
    per_group = [max(config.vq_strides) // stride for stride in config.vq_strides]
    codes = [rng.integers(config.codebook_size, size=(groups, 1, count), dtype=np.int32) for count in per_group]
    decoder = snax.StreamDecoder(model)
    state, rounds, memory = decoder.start(), 0, []
    before: np.ndarray | None = None
    begin, next_look = time.monotonic(), 0.0
    while (now := time.monotonic() - begin) < seconds:
        heard = []
        for group in range(groups):
            state, audio = decoder.push(state, tuple(level[group] for level in codes))
            heard.append(np.asarray(audio))
        sound = np.concatenate(heard, axis=-1)
        if rounds >= 2:  # the first begins with silence, and less comes out of it
            assert before is not None
            np.testing.assert_array_equal(sound, before)
        before, rounds = sound, rounds + 1
        if now >= next_look:
            memory.append(resident([os.getpid()]))
            next_look += 60
    assert before is not None
    audio_seconds = rounds * groups * config.hop_length * max(config.vq_strides) / config.sampling_rate
    return {
        "hours": seconds / 3600,
        "hours_of_audio": round(audio_seconds / 3600, 2),
        "rounds_that_sound_alike": rounds - 2,
        "MB_each_minute": memory,
    }


def extraction(seconds: float) -> dict[str, Any]:
    sys.path.insert(0, str(HERE.parent / "tests"))
    import corpora
    import jobs
    import small

    chance, counts, peaks = random.Random(0), Counter[str](), []
    with tempfile.TemporaryDirectory() as name:
        folder, out = Path(name), Path(name, "out")
        snax.save(small.model(), folder / "model")
        clips = corpora.clips(1_400, seed=1) | {f"bad{i}.wav": b"bad" for i in range(20)}
        corpora.folder(folder / "corpus", clips)
        corpora.table(folder / "corpus" / "a.parquet", corpora.clips(40, seed=2))
        corpora.tar(folder / "corpus" / "a.tar", corpora.clips(40, seed=3))

        def start(where: Path, processes: int) -> list[Any]:
            inputs = [folder / "corpus"]
            return jobs.start(inputs, where, folder / "model", processes, shard_clips=20, decoders=1)

        jobs.finish(start(folder / "alone", 1))
        expected = jobs.hashes(folder / "alone")
        quarantine = (folder / "alone" / "_quarantine.jsonl").read_text()
        assert len(quarantine.splitlines()) == 20
        begin = time.monotonic()
        while time.monotonic() - begin < seconds:
            running = start(out, 2)
            killed = time.monotonic() + chance.uniform(5, 60)
            peak = 0
            while time.monotonic() < killed and any(process.poll() is None for process in running):
                peak = max(peak, resident([pid for process in running for pid in session(process.pid)]))
                time.sleep(0.2)
            peaks.append((round(time.monotonic() - begin), peak))
            if any(process.poll() is None for process in running):
                for process in running[: chance.randint(1, 2)]:  # one of them, and the other must not wait for ever
                    if process.poll() is None:
                        os.killpg(process.pid, signal.SIGKILL)
                        counts["kills"] += 1
                for process in running:
                    process.communicate(timeout=300)
                counts["damages"] += damage(out, chance)
                continue
            jobs.finish(running)
            counts["finished"] += 1
            assert jobs.hashes(out) == expected
            assert (out / "_quarantine.jsonl").read_text() == quarantine
            shutil.rmtree(out)
    return {
        "hours": seconds / 3600,
        "clips": len(clips) + 80,
        "shards": len(expected),
        **counts,
        "finished_with_other_shards": 0,  # or an assertion would have failed above
        "MB_at_most_by_second": peaks,
    }


def damage(out: Path, chance: random.Random) -> int:
    """Does something bad to up to three of the files; how many."""
    files = sorted(path for path in out.rglob("*") if path.is_file() and path.name not in ("job.json", "plan.parquet"))
    some = chance.sample(files, min(len(files), chance.randint(0, 3)))
    for path in some:
        content = bytearray(path.read_bytes())
        match chance.choice(["flip", "cut", "remove"]):
            case "flip" if content:
                content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
                path.write_bytes(content)
            case "cut":
                path.write_bytes(content[: len(content) // 2])
            case _:
                path.unlink()
    return len(some)


def session(leader: int) -> Iterator[int]:
    """The processes that one has started, and itself."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == leader:
                yield int(entry.name)


def resident(pids: list[int]) -> int:
    """The memory of processes, in MB; what they share counts once for all of them."""
    total = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has ended
            continue
        total += next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)
    return total // 1024


if __name__ == "__main__":
    main()
