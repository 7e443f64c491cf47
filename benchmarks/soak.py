"""Soak tests, which run for hours: `python -m benchmarks.soak streaming|extraction [HOURS]`.

streaming: decode one endless stream, one coarse frame per step. The codes repeat. The samples of every round must equal
those of the round before, and memory must not grow.

extraction: two processes extract shards from copies of 1,500 clips, a tar archive and a Parquet table among them. They
are killed and their output files are damaged, again and again. In the end every clip of every copy must be in the
shards once, with the codes of an undisturbed run.

Both use snac_24khz with random weights. Results and the memory over time go to benchmarks/soak.json.
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
from snax.codec.config import PUBLISHED_CONFIGS

HERE = Path(__file__).parent


def main() -> None:
    name, hours = sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else 1.0
    result = {"streaming": streaming, "extraction": extraction}[name](3600 * hours)
    path = HERE / "soak.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results[name] = {"date": datetime.date.today().isoformat(), "device": machine()["device"], **result}
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results[name], indent=1))


def streaming(seconds: float) -> dict[str, Any]:
    config = PUBLISHED_CONFIGS["snac_24khz"]
    model = snax.SNAC(config, rngs=nnx.Rngs(0))
    rng, groups = np.random.default_rng(0), 50  # 4.3 s
    per_group = [max(config.vq_strides) // stride for stride in config.vq_strides]
    codes = [rng.integers(config.codebook_size, size=(groups, 1, count), dtype=np.int32) for count in per_group]
    decoder = snax.StreamDecoder(model)
    state, rounds, memory = decoder.init_state(), 0, []
    previous: np.ndarray | None = None
    start, next_sample = time.monotonic(), 0.0
    while (now := time.monotonic() - start) < seconds:
        steps = []
        for group in range(groups):
            state, audio = decoder.step(state, tuple(level[group] for level in codes))
            steps.append(np.asarray(audio))
        samples = np.concatenate(steps, axis=-1)
        if rounds >= 2:  # the first round starts without a past and is shorter by the latency
            assert previous is not None
            np.testing.assert_array_equal(samples, previous)
        previous, rounds = samples, rounds + 1
        if now >= next_sample:
            memory.append(memory_mb([os.getpid()]))
            next_sample += 60
    audio_seconds = rounds * groups * config.hop_length * max(config.vq_strides) / config.sampling_rate
    return {
        "hours": seconds / 3600,
        "hours_of_audio": round(audio_seconds / 3600, 2),
        "rounds_that_sound_alike": rounds - 2,
        "MB_each_minute": memory,
    }


def extraction(seconds: float) -> dict[str, Any]:
    sys.path.insert(0, str(HERE.parent / "tests"))
    from helpers import corpora, jobs

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


def session(leader: int) -> Iterator[int]:
    """Yield the processes of the leader's session: those that it started, and itself."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == leader:
                yield int(entry.name)


def memory_mb(pids: list[int]) -> int:
    """Return the memory of processes in MB. Shared pages count once (proportional set size)."""
    total = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # the process has ended
            continue
        total += next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)
    return total // 1024


if __name__ == "__main__":
    main()
