"""Decoder processes: isolation of bad clips, timeouts, memory limits, and missing files."""

import io
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from helpers import corpora

from snax.data import audio, decoding
from snax.data.corpus import plan
from snax.data.reading import Unreadable

CLIPS = corpora.clips(12)


class _CallOnUnpickling:
    """Content that calls a function in the decoder process when it is unpickled, to simulate a bug in a decoder."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def test_decoder_exits_when_its_parent_does() -> None:
    spawn = multiprocessing.get_context("spawn")
    for read_first in (True, False):  # closing a pipe with unread data resets it, which raises another error
        parent_pipe, decoder_pipe = spawn.Pipe()
        decoder = spawn.Process(target=decoding._serve, args=(decoder_pipe, 16_000, False, 10.0))
        decoder.start()
        decoder_pipe.close()
        assert parent_pipe.recv() == "ready"
        parent_pipe.send(b"no audio")
        assert parent_pipe.poll(60)
        if read_first:
            parent_pipe.recv()
        parent_pipe.close()
        decoder.join(60)
        assert decoder.exitcode == 0


def test_crash_or_hang_affects_only_one_clip() -> None:
    good = CLIPS["000_16.wav"]
    crash, hang, memory_error = (
        _CallOnUnpickling(*call) for call in [(os.abort,), (time.sleep, 1000), (bytearray, 2**40)]
    )
    contents = [good, crash, good, hang, good, memory_error, good, good]
    decoders = decoding.DecoderPool(2, 16_000, separate=False, max_seconds=10)
    with (
        mock.patch.object(decoding, "TIMEOUT_S", 3),
        mock.patch.object(decoding, "isinstance", lambda content, kind: type(content) is kind, create=True),
    ):
        decoded = dict(decoders.map(enumerate(contents)))
    reasons = {i: item.audio.reason for i, item in decoded.items() if hasattr(item.audio, "reason")}
    assert reasons == {
        1: "the decoder process crashed (SIGABRT).",
        3: "reading and decoding timed out after 3 seconds.",
        5: "the decoder process crashed (exit code 1).",
    }
    for i in (0, 2, 4, 6, 7):
        np.testing.assert_array_equal(decoded[i].audio, audio.read(io.BytesIO(good), 16_000))
    decoders.close()


def test_script_without_main_guard_is_told_so(tmp_path: Path) -> None:
    """Decoder processes import the script, and would start decoders themselves."""
    script = tmp_path / "script.py"
    script.write_text(
        "from snax.data import decoding\n"
        "pool = decoding.DecoderPool(1, 16_000, separate=False, max_seconds=10)\n"
        "print(list(pool.map([(0, b'no audio')])))\n"
    )
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "A decoder process ended at its start (exit code 1)." in result.stderr
    assert 'under `if __name__ == "__main__":`' in result.stderr


@pytest.mark.parametrize("max_buffered", [0, decoding.MAX_BUFFERED])
def test_corrupt_files_are_decoded_or_rejected(max_buffered: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real files with bytes changed, deleted and inserted never crash or block a decoder, for any size of the queue."""
    monkeypatch.setattr(decoding, "MAX_BUFFERED", max_buffered)
    rng = np.random.default_rng(0)
    contents = []
    for i in range(300):
        content = bytearray(list(CLIPS.values())[i % len(CLIPS)])
        for _ in range(rng.integers(1, 10)):
            offset = int(rng.integers(len(content)) ** rng.uniform(0.3, 1))  # more often in the header
            if i % 3 == 0:
                content[offset] = rng.integers(256)
            elif i % 3 == 1:
                del content[offset : offset + rng.integers(50)]
            else:
                content[offset:offset] = rng.bytes(rng.integers(50))
        contents.append(bytes(content))
    decoders = decoding.DecoderPool(2, 16_000, separate=False, max_seconds=10)
    indices, results = zip(*((i, decoded.audio) for i, decoded in decoders.map(enumerate(contents))), strict=True)
    decoders.close()
    assert indices == tuple(range(300))
    reasons = [result.reason for result in results if isinstance(result, Unreadable)]
    assert not [reason for reason in reasons if "crashed" in reason or "timed out" in reason]
    # The number varies, because decoders read uninitialized memory.
    assert 100 < len(reasons) < 290, "the corrupt files are not a useful mix"
    for result in results:
        if isinstance(result, np.ndarray):
            assert np.abs(result).max() < 2 * audio.MAX_AMPLITUDE  # resampling overshoots
            assert 0 < result.size <= 160_000


def test_missing_and_special_files_are_unreadable(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "loop.wav").symlink_to("loop.wav")
    (tmp_path / "a.wav").write_bytes(b"a")
    reasons = dict.fromkeys(["pipe.wav", "/dev/zero"], "it is not a regular file.") | {".": "it is a folder."}
    reasons |= dict.fromkeys(["loop.wav", "a.wav/b.wav", "x" * 300 + ".wav", "x/" * 3000], "file not found.")
    (tmp_path / "m.jsonl").write_text("".join(json.dumps({"path": name}) + "\n" for name in reasons))
    (shard,) = plan([str(tmp_path / "m.jsonl")], 100)
    assert [decoding._read_file(source.file) for source in shard] == [Unreadable(reason) for reason in reasons.values()]
