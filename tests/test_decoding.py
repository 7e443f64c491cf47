"""Decoders in processes of their own: what a bad clip does to them and to the others."""

import io
import json
import multiprocessing
import os
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


class _Does:
    """Content that does something when a decoder takes it out of its pipe, as a decoder's bug would."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def test_a_decoder_ends_quietly_with_its_parent() -> None:
    spawn = multiprocessing.get_context("spawn")
    for read_first in (True, False):  # an answer that nobody took resets the pipe
        ours, theirs = spawn.Pipe()
        decoder = spawn.Process(target=decoding._serve, args=(theirs, 16_000, False, 10.0))
        decoder.start()
        theirs.close()
        ours.send(b"no audio")
        assert ours.poll(60)
        if read_first:
            ours.recv()
        ours.close()
        decoder.join(60)
        assert decoder.exitcode == 0


def test_a_decoder_that_crashes_or_hangs_harms_its_clip_alone() -> None:
    good = CLIPS["000_16.wav"]
    contents = [good, _Does(os.abort), good, _Does(time.sleep, 1000), good, _Does(bytearray, 2**40), good, good]
    decoders = decoding.DecoderPool(2, 16_000, separate=False, max_seconds=10)
    with (
        mock.patch.object(decoding, "TIMEOUT_S", 3),
        mock.patch.object(decoding, "isinstance", lambda content, kind: type(content) is kind, create=True),
    ):
        found = dict(decoders.map(enumerate(contents)))
    reasons = {i: item.audio.reason for i, item in found.items() if hasattr(item.audio, "reason")}
    assert reasons == {
        1: "crashes its decoder (SIGABRT).",
        3: "takes more than 3 seconds to read and decode.",
        5: "crashes its decoder (exit code 1).",
    }
    for i in (0, 2, 4, 6, 7):
        np.testing.assert_array_equal(found[i].audio, audio.read(io.BytesIO(good), 16_000))
    decoders.close()


@pytest.mark.parametrize("waiting", [0, decoding.MAX_BUFFERED])
def test_any_bytes_are_audio_or_not(waiting: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real files with bytes changed, cut out and put in: nothing crashes, hangs, or is anything else; however much of
    what is decoded may wait."""
    monkeypatch.setattr(decoding, "MAX_BUFFERED", waiting)
    rng = np.random.default_rng(0)
    contents = []
    for i in range(300):
        content = bytearray(list(CLIPS.values())[i % len(CLIPS)])
        for _ in range(rng.integers(1, 10)):
            at = int(rng.integers(len(content)) ** rng.uniform(0.3, 1))  # rather near the beginning, in the header
            if i % 3 == 0:
                content[at] = rng.integers(256)
            elif i % 3 == 1:
                del content[at : at + rng.integers(50)]
            else:
                content[at:at] = rng.bytes(rng.integers(50))
        contents.append(bytes(content))
    decoders = decoding.DecoderPool(2, 16_000, separate=False, max_seconds=10)
    numbers, found = zip(*((i, decoded.audio) for i, decoded in decoders.map(enumerate(contents))), strict=True)
    decoders.close()
    assert numbers == tuple(range(300))
    reasons = [item.reason for item in found if isinstance(item, Unreadable)]
    assert not [reason for reason in reasons if "crashes" in reason or "seconds to read" in reason]
    assert 100 < len(reasons) < 290, "this is no test"  # how many depends on what decoders find in their memory
    for item in found:
        if isinstance(item, np.ndarray):
            assert np.abs(item).max() < 2 * audio.LOUDEST  # resampling overshoots
            assert 0 < item.size <= 160_000


def test_what_is_no_file(tmp_path: Path) -> None:
    """A manifest's clips that are not there in one way or another are unreadable, and no reason to stop."""
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "loop.wav").symlink_to("loop.wav")
    (tmp_path / "a.wav").write_bytes(b"a")
    names = {"pipe.wav": "is no regular file.", "/dev/zero": "is no regular file.", ".": "is a folder."}
    names |= dict.fromkeys(["loop.wav", "a.wav/b.wav", "x" * 300 + ".wav", "x/" * 3000], "is not there.")
    (tmp_path / "m.jsonl").write_text("".join(json.dumps({"path": name}) + "\n" for name in names))
    (shard,) = plan([str(tmp_path / "m.jsonl")], 100)
    assert [decoding._bytes(source.file) for source in shard] == [Unreadable(reason) for reason in names.values()]
