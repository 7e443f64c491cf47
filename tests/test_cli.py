"""The commands on real files: what they write, what they refuse, and that nothing is lost."""

import contextlib
import dataclasses
import io
import os
import pty
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from helpers import small
from helpers.recordings import DATA

import snax
from snax import cli
from snax.data import audio
from snax.data.codes_file import CodesFile
from snax.extract.config import ExtractConfig
from snax.extract.run import extract

RATE = small.CONFIG.sampling_rate


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("models") / "small"
    snax.save(small.model(), path)
    return str(path)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Three files of three formats and rates, one of them below, and something that is no audio."""
    folder = tmp_path / "corpus"
    (folder / "below").mkdir(parents=True)
    speech = soundfile.read(DATA / "speech_3s.wav")[0][:16_000]
    soundfile.write(folder / "a.wav", speech, 16_000)
    soundfile.write(folder / "b.flac", np.stack([speech, speech[::-1]], axis=1), 44_100)
    soundfile.write(folder / "below" / "c.mp3", speech, 24_000)
    (folder / "notes.txt").write_text("not audio")
    return folder


def run(*arguments: Any) -> int:
    return cli.main([str(argument) for argument in arguments])


def test_encode_and_decode_a_folder(corpus: Path, tmp_path: Path, model_folder: str) -> None:
    assert run("encode", corpus, "-m", model_folder, "-o", tmp_path / "codes") == 0
    made = sorted(str(path.relative_to(tmp_path / "codes")) for path in (tmp_path / "codes").rglob("*.*"))
    assert made == ["a.codes.safetensors", "b.codes.safetensors", "below/c.codes.safetensors"]
    assert run("decode", tmp_path / "codes", "-o", tmp_path / "audio") == 0
    for name in ("a.wav", "b.flac", "below/c.mp3"):
        heard = audio.read(corpus / name, RATE)
        stem = tmp_path / "codes" / Path(name).with_suffix(".codes.safetensors")
        file = CodesFile.read(stem)
        assert (file.sampling_rate, file.samples) == (RATE, heard.shape[1])
        expected = small.model().encode(heard[None])
        for ours, level in zip(file.codes, expected, strict=True):
            assert ours.dtype == np.uint16
            np.testing.assert_array_equal(ours, level)
        decoded, rate = soundfile.read(tmp_path / "audio" / Path(name).with_suffix(".snac.wav"), dtype="int16")
        assert rate == RATE
        whole = np.clip(small.model().decode(expected)[0, 0, : heard.shape[1]], -1, 1)
        np.testing.assert_allclose(decoded, np.round(whole * 2**15), rtol=0, atol=1)  # steps of 16 bits


def test_channels_one_by_one(corpus: Path, model_folder: str) -> None:
    assert run("encode", corpus / "b.flac", "-m", model_folder, "--channels", "separate") == 0
    file = CodesFile.read(corpus / "b.codes.safetensors")
    expected = small.model().encode(audio.read(corpus / "b.flac", RATE, separate=True)[:, None])
    for ours, level in zip(file.codes, expected, strict=True):
        np.testing.assert_array_equal(ours, level)
    assert run("decode", corpus / "b.codes.safetensors") == 0
    assert soundfile.info(corpus / "b.snac.wav").channels == 2


def test_reconstruct(corpus: Path, model_folder: str) -> None:
    assert run("reconstruct", corpus / "below" / "*", "-m", model_folder) == 0
    heard = audio.read(corpus / "below" / "c.mp3", RATE)
    assert soundfile.info(corpus / "below" / "c.snac.wav").frames == heard.shape[1]
    assert run("reconstruct", corpus / "below", "-m", model_folder, "--force") == 0
    assert len(list((corpus / "below").iterdir())) == 2, "its own output is no input"


def test_a_bad_file_does_not_stop_the_others(
    corpus: Path, model_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (corpus / "aa.wav").write_bytes((corpus / "a.wav").read_bytes()[:1000])
    assert run("encode", corpus, "-m", model_folder) == 1
    assert f"snax: {corpus / 'aa.wav'}: the file is truncated: " in capsys.readouterr().err
    assert len(list(corpus.rglob("*.codes.safetensors"))) == 3


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    assert run(*arguments) == 2
    return capsys.readouterr().err


def test_nothing_is_overwritten(corpus: Path, model_folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    codes = corpus / "a.codes.safetensors"
    codes.write_text("precious")
    assert "Pass --force to overwrite them" in refused(capsys, "encode", corpus, "-m", model_folder)
    assert codes.read_text() == "precious"
    assert not (corpus / "b.codes.safetensors").exists()
    assert run("encode", corpus, "-m", model_folder, "--force") == 0
    assert CodesFile.read(codes).samples == 16_000


def test_refusals(corpus: Path, tmp_path: Path, model_folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such file or folder: nothing.wav" in refused(capsys, "encode", "nothing.wav", "-m", model_folder)
    (corpus / "a.mp3").write_bytes((corpus / "below" / "c.mp3").read_bytes())
    message = refused(capsys, "encode", corpus, "-m", model_folder)
    assert "would all be written to" in message
    (tmp_path / "empty").mkdir()
    assert "no files with .wav" in refused(capsys, "encode", tmp_path / "empty", "-m", model_folder)
    assert "cannot be read as a codes file" in refused(capsys, "decode", corpus / "notes.txt")


def test_names_that_look_like_patterns(corpus: Path, model_folder: str) -> None:
    """What is there by a name is meant by it."""
    (corpus / "a[b].wav").write_bytes((corpus / "a.wav").read_bytes())
    (corpus / "ab.wav").write_bytes(b"nothing that should be looked at")
    assert run("encode", corpus / "a[b].wav", "-m", model_folder) == 0
    assert (corpus / "a[b].codes.safetensors").exists()


def test_names_that_are_no_text(corpus: Path, model_folder: str) -> None:
    name = os.fsdecode(b"\xff\x1b\n.wav")
    (corpus / "a.wav").rename(corpus / name)
    assert run("reconstruct", corpus / name, "-m", model_folder) == 0
    assert (corpus / os.fsdecode(b"\xff\x1b\n.snac.wav")).exists()


def test_a_link_where_codes_go_is_replaced(corpus: Path, tmp_path: Path, model_folder: str) -> None:
    """And what it points at is left alone."""
    (tmp_path / "precious").write_text("precious")
    (corpus / "a.codes.safetensors").symlink_to(tmp_path / "precious")
    assert run("encode", corpus / "a.wav", "-m", model_folder) == 2
    assert run("encode", corpus / "a.wav", "-m", model_folder, "--force") == 0
    assert (tmp_path / "precious").read_text() == "precious"
    assert not (corpus / "a.codes.safetensors").is_symlink()


def test_codes_of_another_model(
    corpus: Path, tmp_path: Path, model_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("encode", corpus / "a.wav", "-m", model_folder) == 0
    other = tmp_path / "other"
    snax.save(snax.SNAC(small.CONFIG, rngs=snax.codec.model.nnx.Rngs(1)), other)
    assert run("decode", corpus / "a.codes.safetensors", "-m", other) == 1
    assert "the codes were made by the model" in capsys.readouterr().err
    assert not (corpus / "a.snac.wav").exists()


def test_codes_that_are_none(
    corpus: Path, tmp_path: Path, model_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("encode", corpus, "-m", model_folder) == 0
    file = CodesFile.read(corpus / "a.codes.safetensors")
    dataclasses.replace(file, codes=[level + 64 for level in file.codes]).write(corpus / "a.codes.safetensors")
    assert run("decode", corpus, "-m", model_folder) == 1
    assert "`codes[0]` must be between 0 and `codebook_size` - 1 (=63)" in capsys.readouterr().err
    assert len(list(corpus.rglob("*.snac.wav"))) == 2


def test_a_write_that_fails_leaves_nothing(
    corpus: Path, model_folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(self: CodesFile, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(CodesFile, "write", full)
    before = sorted(corpus.rglob("*"))
    assert "No space left" in refused(capsys, "encode", corpus, "-m", model_folder)
    assert sorted(corpus.rglob("*")) == before


def test_progress_bar_does_not_tear_log_lines(corpus: Path, model_folder: str) -> None:
    """On a terminal, each file's line is whole and on a line of its own, above the progress bar."""
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 200))
    line = [sys.executable, "-m", "snax.cli", "encode", corpus, "-m", model_folder]
    with subprocess.Popen(line, stderr=follower, stdout=follower) as process:
        os.close(follower)
        output = b""
        with contextlib.suppress(OSError):  # Linux reports the end of a terminal as an error
            while chunk := os.read(leader, 4096):
                output += chunk
    os.close(leader)
    assert process.returncode == 0, output
    assert b"/3 [" in output, "there is no progress bar"
    shown = [text.rpartition("\r")[2] for text in output.decode().replace("\r\n", "\n").split("\n")]
    log_lines = [text for text in shown if "->" in text]
    assert len(log_lines) == 3
    assert all(text.startswith("snax: ") and text.endswith(".codes.safetensors") for text in log_lines)


def test_mistakes_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    """The message has the option, the value and what is allowed, or the nearest name."""
    for arguments, message in (
        (["extract", "a", "-o", "x", "--clips-per-shrd", "3"], "Unknown option: --clips-per-shrd. Did you mean"),
        (
            ["extract", "a", "-o", "x", "--clips-per-shard", "0"],
            "--clips-per-shard (='0') must be greater than or equal to 1.",
        ),
        (["extract", "a", "-o", "x", "--max-quarantined", "nan"], "--max-quarantined (='nan') must be"),
        (["extract", "a", "-o", "x", "--tokens", "x"], "--tokens (='x') must be 'orpheus', 'shared' or 'separate'."),
        (["extract", "-o", "x"], "INPUTS is missing. See `snax extract --help`."),
        (["extract", "a"], "--out is missing."),
        (["encode", "a", "--channels", "mixx"], 'Did you mean "mix"?'),
        (["encod", "a"], 'Did you mean "encode"?'),
        (["train", "no-such-file.toml", "-o", "x"], "No such file or directory: 'no-such-file.toml'"),
    ):
        assert message in refused(capsys, *arguments)


def test_pipes(corpus: Path, model_folder: str) -> None:
    def piped(*arguments: str, given: bytes) -> bytes:
        command = [sys.executable, "-m", "snax.cli", *arguments]
        return subprocess.run(command, input=given, stdout=subprocess.PIPE, check=True).stdout

    codes = piped("encode", "-", "-m", model_folder, given=(corpus / "a.wav").read_bytes())
    wav = piped("decode", "-", "-m", model_folder, given=codes)
    decoded, rate = soundfile.read(io.BytesIO(wav))
    assert (rate, len(decoded)) == (RATE, 16_000)


def test_extract_and_info(corpus: Path, tmp_path: Path, model_folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    job = ExtractConfig([str(corpus)], out=str(tmp_path / "tokens"), model=model_folder, num_decoders=1)
    extract(small.model(), job)
    assert run("info", tmp_path / "tokens") == 0
    out = capsys.readouterr().out
    codes = sum(len(level) for row in snax.open_tokens(tmp_path / "tokens") for level in row["codes"])
    assert f"codes             {codes}\n" in out
    for fact in (
        "tokens            None\n",
        "clips             3\n",
        "committed         3\n",
        "shards            1\n",
        "channels          mix\n",
    ):
        assert fact in out
    (tmp_path / "tokens" / "_SUCCESS").unlink()
    assert run("info", tmp_path / "tokens") == 0
    assert (
        "finished          no: 1 of 1 shards so far; if it does not run, `snax extract` resumes it"
        in capsys.readouterr().out
    )


def test_info(corpus: Path, model_folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("encode", corpus / "a.wav", "-m", model_folder) == 0
    inputs = ["snac_24khz", model_folder, corpus / "b.flac", corpus / "a.codes.safetensors", corpus / "notes.txt"]
    assert run("info", *inputs) == 1
    out, err = capsys.readouterr()
    assert f"snax: {corpus / 'notes.txt'}: not an audio file that" in err
    for fact in (
        "hubertsiuzdak/snac_24khz on the hub, revision d73ad176",
        "0.98 kbps",
        "12,665 parameters",
        "0.363 s, 16000 samples at 44100 Hz",
        "1.000 s, 16000 samples at 16000 Hz",
        "500 + 1000 + 2000 in 1 channels",
    ):
        assert fact in out


def test_the_second_process_compiles_nothing(tmp_path: Path, model_folder: str) -> None:
    """The compilation cache is on without any setting. JAX logs what it finds there."""
    environment = {name: value for name, value in os.environ.items() if "COMPILATION_CACHE" not in name}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_LOGGING_LEVEL": "DEBUG"}
    environment["JAX_PLATFORMS"] = "cpu"
    line = [sys.executable, "-m", "snax.cli", "encode", str(DATA / "speech_3s.wav"), "-m", model_folder, "--force"]
    logs = [
        subprocess.run([*line, "-o", str(tmp_path)], env=environment, check=True, capture_output=True, text=True).stderr
        for _ in range(2)
    ]
    assert ["cache hit for 'jit__encode'" in log for log in logs] == [False, True]
    assert list((tmp_path / "cache" / "snax" / "compiled").glob("jit__encode-*"))


def test_folders_of_a_pattern(corpus: Path, model_folder: str, tmp_path: Path) -> None:
    """Outputs keep the folders below the one in which the pattern begins."""
    assert run("encode", corpus / "b*", "-m", model_folder, "-o", tmp_path / "out") == 0
    made = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.safetensors"))
    assert "b.codes.safetensors" in made
    assert any(name.startswith("below/") for name in made)
