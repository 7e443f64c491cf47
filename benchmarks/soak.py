"""Hours of use, and whether memory grows or anything is lost: `python -m benchmarks.soak streaming|extraction [HOURS]`.

streaming: one stream of snac_24khz (drawn weights) that never ends, a coarse frame a push, its codes repeating; every
round must sound exactly like the first, and the process stay as large as it was.
extraction: two processes make shards with snac_24khz (drawn weights) of copies of 1,500 clips, a tar and a table among
them. They are killed, and files of theirs damaged, again and again; in the end every copy of every clip must be there
once, with the codes that one copy alone has.
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
from snax.codec.config import PUBLISHED_CONFIGS

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
    state, rounds, memory = decoder.init_state(), 0, []
    before: np.ndarray | None = None
    begin, next_look = time.monotonic(), 0.0
    while (now := time.monotonic() - begin) < seconds:
        heard = []
        for group in range(groups):
            state, audio = decoder.step(state, tuple(level[group] for level in codes))
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
    from helpers import corpora, jobs

    chance, counts, memory = random.Random(0), Counter[str](), []
    with tempfile.TemporaryDirectory() as name:
        folder, out = Path(name), Path(name, "out")
        snax.save(snax.SNAC(PUBLISHED_CONFIGS["snac_24khz"], rngs=nnx.Rngs(0)), folder / "model")
        once = corpora.folder(
            folder / "once", corpora.clips(1_400, seed=1) | {f"bad{i}.wav": b"bad" for i in range(20)}
        )
        corpora.table(once / "a.parquet", corpora.clips(40, seed=2))
        corpora.tar(once / "a.tar", corpora.clips(40, seed=3))

        def start(corpus: Path, where: Path, processes: int) -> list[Any]:
            return jobs.start([corpus], where, folder / "model", processes, clips_per_shard=250, num_workers=1)

        begin = time.monotonic()
        jobs.finish(start(once, folder / "alone", 1))
        copies = max(1, round(seconds / (time.monotonic() - begin)))
        for copy in range(copies):
            shutil.copytree(once, folder / "corpus" / f"{copy:04}", copy_function=os.link)

        begin = time.monotonic()
        while True:
            running = start(folder / "corpus", out, 2)
            started = time.monotonic()
            killed, looked = started + chance.uniform(30, 600), started
            while time.monotonic() < killed and any(process.poll() is None for process in running):
                time.sleep(1)
                if time.monotonic() > looked + 60:
                    looked = time.monotonic()
                    size = resident([pid for process in running for pid in session(process.pid)])
                    memory.append([round(looked - begin), round(looked - started), size])
            if all(process.poll() is not None for process in running):
                break
            for process in running[: chance.randint(1, 2)]:  # one of them, and the other must not wait for ever
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    counts["kills"] += 1
            for process in running:
                process.communicate(timeout=300)
            counts["files_damaged"] += damage(out, chance)
        jobs.finish(running)
        took = time.monotonic() - begin

        expected, found = dict(clips(folder / "alone", once)), Counter[tuple[str, ...]]()
        for (path, member), codes in clips(out, folder / "corpus"):
            copy, _, path = path.partition("/")
            found[copy, path, member] += 1
            for level, same in zip(codes, expected[path, member], strict=True):
                np.testing.assert_array_equal(level, same)
        assert set(found.values()) == {1}
        assert len(found) == copies * len(expected) == copies * 1_480
        quarantined = (out / "_quarantine.jsonl").read_text().splitlines()
        assert len(quarantined) == len(set(quarantined)) == copies * 20
    return {
        "hours": round(took / 3600, 2),
        "clips": copies * 1_500,
        **counts,
        "clips_lost_or_twice_or_with_other_codes": 0,  # or an assertion would have failed above
        "MB_by_second_and_second_since_start": memory,
    }


def clips(out: Path, corpus: Path) -> Iterator[tuple[tuple[str, str], list[np.ndarray]]]:
    """The codes in all shards, each with its file in the corpus and its name in that file, if it has one."""
    rows = snax.open_tokens(out)
    for row in (rows[i] for i in range(len(rows))):
        yield (str(Path(row["source"]).relative_to(corpus)), row["member"] or ""), row["codes"]


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
