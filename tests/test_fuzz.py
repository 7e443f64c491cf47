"""Property tests of all parsers of untrusted input: each raises its documented error or returns valid values.

Each parser gets a hundred inputs in a normal run, and a hundred thousand with
`pytest tests/test_fuzz.py --hypothesis-profile=long`. An input that takes ten seconds fails as a hang.
"""

import hashlib
import io
import json
import math
import tarfile
import tempfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
from helpers import small
from hypothesis import example, given
from hypothesis import strategies as st

import snax
from snax import json_text
from snax.codec import config
from snax.data import corpus
from snax.data.codes_file import CodesFile
from snax.data.corpus import CorpusError, Source
from snax.data.reading import Clip, Unreadable, clips
from snax.extract.store import Store, StoreError
from snax.extract.table import Row, to_parquet
from snax.inference.packing import EncodedClip
from snax.tokens import ORPHEUS, TokenLayout, mini_omni_codes, mini_omni_streams
from snax.train import config as train_config
from snax.weights import checkpoint
from snax.weights.torch_files import read_state_dict

pytestmark = pytest.mark.usefixtures("as_users_see_it")

# JSON values, including unusual ones.
NUMBERS = st.integers() | st.floats() | st.sampled_from([0, 1, 2, 64, 2**31, 2**63, 10**100, math.inf])
SCALARS = st.none() | st.booleans() | NUMBERS | st.text(max_size=20)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=3)
)


@st.composite
def mutated(draw: st.DrawFn, *whole: bytes) -> bytes:
    """Draw one of `whole` and change, delete, insert and repeat some of its bytes."""
    content = draw(st.sampled_from(whole))
    for _ in range(draw(st.integers(0, 6))):
        start = draw(st.integers(0, len(content)))
        end = start + draw(st.integers(0, 20))
        kind = draw(st.sampled_from(["change", "delete", "insert", "repeat", "truncate"]))
        if kind == "change":
            content = content[:start] + draw(st.binary(max_size=4)) + content[start + 4 :]
        elif kind == "delete":
            content = content[:start] + content[end:]
        elif kind == "insert":
            content = content[:start] + draw(st.binary(max_size=20)) + content[start:]
        elif kind == "repeat":
            content = content[:start] + content[start:end] * draw(st.integers(2, 1000)) + content[end:]
        else:
            content = content[:start]
    return content


def altered(whole: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Return a strategy for `whole` with other values in some of its fields."""
    return st.dictionaries(st.sampled_from(sorted(whole)), VALUES, max_size=3).map(lambda changes: whole | changes)


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def assert_own_error(error: Exception, *phrases: str) -> None:
    """Check that the message contains one of the phrases, so that it is snax's and not that of a library."""
    assert any(phrase in str(error) for phrase in phrases), error


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def check_configuration(parse: Any) -> None:
    try:
        built = snax.SNACConfig.from_dict(parse())
    except ValueError:
        return
    assert built.pad_multiple <= config.MAX_PAD_MULTIPLE
    assert 0 <= built.bitrate < 1e12
    assert (built.bitrate == 0) == (built.codebook_size == 1)  # a single code carries no information
    assert snax.SNACConfig.from_dict(json.loads(json.dumps(built.to_dict()))) == built


CONFIGS = [as_json(codec_config.to_dict()) for codec_config in (small.CONFIG, *config.PUBLISHED_CONFIGS.values())]


@given(mutated(*CONFIGS, b"[" * 100_000, b'{"a":' * 100_000))
def test_config_json(content: bytes) -> None:
    check_configuration(lambda: json_text.parse(content))


@given(
    st.fixed_dictionaries({}, optional={field: VALUES | st.lists(NUMBERS) for field in small.CONFIG.to_dict()}),
    st.sampled_from(CONFIGS),
)
@example({"codebook_size": 1}, CONFIGS[0])
def test_config_fields(fields: dict[str, Any], content: bytes) -> None:
    check_configuration(lambda: json.loads(content) | fields)


def codes_file() -> bytes:
    with tempfile.NamedTemporaryFile() as file:
        levels = [np.arange(2 * count).reshape(2, count) for count in (2, 4, 8)]
        CodesFile(levels, "small", "ab" * 32, 16_000, 1000).write(file.name)
        return Path(file.name).read_bytes()


@given(mutated(codes_file()))
def test_codes_files(folder: Path, content: bytes) -> None:
    path = folder / "a.codes.safetensors"
    path.write_bytes(content)
    try:
        file = CodesFile.read(path)
    except ValueError as error:
        assert_own_error(error, str(path))
        return
    assert {level.ndim for level in file.codes} == {2}
    assert len({len(level) for level in file.codes}) == 1
    assert {level.dtype.kind for level in file.codes} <= set("iu")


WEIGHTS = {"encoder.bias": np.arange(3, dtype=np.float32), "decoder.kernel": np.ones((2, 1, 2), np.float32)}


def with_pickle(archive: bytes, content: bytes) -> bytes:
    """Replace the pickle in a torch archive. The archive gets a valid checksum, so that the pickle is read."""
    sink = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as original, zipfile.ZipFile(sink, "w") as changed:
        for name in original.namelist():
            changed.writestr(name, content if name.endswith("data.pkl") else original.read(name))
    return sink.getvalue()


def test_weights(folder: Path) -> None:
    """Torch archives, their pickles, and safetensors files."""
    torch = pytest.importorskip("torch", reason="the version matrix has no torch, because torch is pinned")
    sink = io.BytesIO()
    torch.save({name: torch.from_numpy(array) for name, array in WEIGHTS.items()}, sink)
    archive = sink.getvalue()
    with zipfile.ZipFile(sink) as original:
        (name,) = (name for name in original.namelist() if name.endswith("data.pkl"))
        pickle = original.read(name)
    files = {
        "a.bin": mutated(archive) | mutated(pickle).map(lambda content: with_pickle(archive, content)),
        "a.safetensors": mutated(safetensors.numpy.save(WEIGHTS)),
    }

    @given(st.sampled_from(sorted(files)).flatmap(lambda name: st.tuples(st.just(name), files[name])))
    @example(("a.bin", with_pickle(archive, pickle)))
    def check(file: tuple[str, bytes]) -> None:
        path = folder / file[0]
        path.write_bytes(file[1])
        try:
            state_dict = read_state_dict(path)
        except ValueError as error:
            assert_own_error(error, f"{path} cannot be read as weights")
            return
        assert all(isinstance(name, str) and isinstance(array, np.ndarray) for name, array in state_dict.items())
        assert sum(array.nbytes for array in state_dict.values()) <= len(file[1])

    check()


ORBAX = {"format": checkpoint.FORMAT, "config": small.CONFIG.to_dict()}


@given(VALUES | altered(ORBAX) | altered(ORBAX["config"]).map(lambda fields: ORBAX | {"config": fields}))
def test_orbax_metadata(metadata: Any) -> None:
    try:
        built = checkpoint._config("/a/model", metadata)
    except ValueError as error:
        assert_own_error(error, "/a/model")
        return
    assert snax.SNACConfig.from_dict(metadata["config"]) == built


LAYOUTS = st.sampled_from(
    [ORPHEUS, TokenLayout((4, 2, 1)), TokenLayout((8, 4, 2, 1), 64, 7, 100), TokenLayout((3, 1), 8)]
)
NEAR = st.integers(0, 2).flatmap(lambda i: st.integers(-5, 40_000).map(lambda n: n + [0, 128_266, 2**32 + 128_266][i]))
TOKENS = NEAR | st.integers(-(2**63), 2**63 - 1)


@given(LAYOUTS, st.lists(TOKENS, max_size=30), st.sampled_from([np.int64, np.int32, np.uint16]))
def test_token_streams(layout: TokenLayout, tokens: list[int], dtype: type[np.generic]) -> None:
    stream = np.array(tokens, np.int64).astype(dtype)[None]
    complete, rest = layout.split(stream)
    np.testing.assert_array_equal(np.concatenate([complete, rest], axis=1), stream)
    try:
        codes = layout.unflatten(complete)
    except ValueError as error:
        assert_own_error(error, "tokens[0, ")
        return
    assert all(((level >= 0) & (level < layout.codebook_size)).all() for level in codes)
    np.testing.assert_array_equal(layout.flatten(codes), complete)


POSITIONS = st.tuples(st.integers(0, 6), st.integers(0, 9))


@given(st.dictionaries(POSITIONS, TOKENS | st.integers(151_990, 152_010 + 7 * 4160), max_size=4))
def test_mini_omni_streams(changes: dict[tuple[int, int], int]) -> None:
    """Two groups of valid tokens, some of which are replaced."""
    streams = np.array(mini_omni_streams([np.full((1, 2 * n), 7, np.int32) for n in (1, 2, 4)]), np.int64)
    for position, token in changes.items():
        streams[0][position] = token
    expected = np.stack([streams[0, i, i + 1 : i + 3] - (152_000 + 4160 * i) for i in range(7)])
    valid = bool(((expected >= 0) & (expected < 4096)).all())
    try:
        codes = mini_omni_codes(streams)
    except ValueError as error:
        assert_own_error(error, "tokens[0, ")
        assert not valid
        return
    assert valid
    assert sorted(np.concatenate(codes, axis=1)[0]) == sorted(expected.ravel())


def parquet(**columns: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


NAMES = ["a.wav", "/b.wav", "gs://bucket/c.wav", "../d.flac"]
MANIFESTS = {
    "m.jsonl": "".join(json.dumps({"path": name, "id": name[:1], "text": "ä"}) + "\n" for name in NAMES).encode(),
    "m.csv": ("key,path\r\n" + "".join(f'{i},"{name}"\r\n' for i, name in enumerate(NAMES))).encode(),
    "m.parquet": parquet(path=NAMES, key=list("abcd")),
    "t.parquet": parquet(id=["a", "b", "c"], audio=[{"bytes": b"aa", "path": "a"}, {"bytes": None, "path": "b"}, None]),
}


def check_plan(path: Path) -> list[list[Source]]:
    """Plan from a manifest or table that may be corrupt, and check the plan."""
    try:
        shards = corpus.plan([str(path)], 2)
    except CorpusError as error:
        assert_own_error(error, path.name, "two clips have the same id")
        return []
    assert corpus.from_parquet(corpus.to_parquet(shards)) == shards
    for source in (source for shard in shards for source in shard):
        assert "\0" not in source.file
        assert source.file.startswith((f"{path.parent}/", "/")) or source.file.partition("://")[0].isalnum()
    return shards


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests(name: str, folder: Path) -> None:
    @given(mutated(MANIFESTS[name]))
    def check(content: bytes) -> None:
        (folder / name).write_bytes(content)
        for source in (source for shard in check_plan(folder / name) for source in shard if source.kind == "rows"):
            check_clips(source)

    check()


@given(st.lists(st.dictionaries(st.sampled_from(["path", "id", "file", "audio_path"]), VALUES | st.text()), max_size=5))
def test_manifest_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    path = folder / "lines.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    check_plan(path)


def check_clips(source: Source) -> None:
    """Check that each clip is accounted for, and that its fields can be written to any file."""
    pairs = list(clips(source))
    if source.kind == "rows":
        assert len(pairs) == source.end - source.first
    for clip, content in pairs:
        json.dumps(clip).encode()
        "".join(filter(None, clip)).encode()
        assert isinstance(content, bytes | str | Unreadable)


def tar() -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for name in ("a.wav", "b.txt", "c/d.flac"):
            entry = tarfile.TarInfo(name)
            entry.size = 700
            archive.addfile(entry, io.BytesIO(bytes(range(200)) * 4))
    return sink.getvalue()


@given(mutated(tar()))
def test_tars(folder: Path, content: bytes) -> None:
    (folder / "t.tar").write_bytes(content)
    check_clips(Source("tar", str(folder / "t.tar"), "t"))


PLAN = [[Source("file", "/a.wav", "a"), Source("file", "/b.wav", "b")], [Source("tar", "/t.tar", "t")]]


@given(mutated(corpus.to_parquet(PLAN)))
def test_plans(content: bytes) -> None:
    try:
        shards = corpus.from_parquet(content)
    except CorpusError as error:
        assert_own_error(error, "the plan is corrupt")
        return
    assert all(isinstance(source, Source) for shard in shards for source in shard)


SIDECAR = {"clips": 2, "committed": 2, "rows": 2, "samples": 9, "tokens": 7, "attempt": 1, "quarantined": []}
SIDECAR |= {"sha256": "ab" * 32}


@given(mutated(as_json(SIDECAR)) | altered(SIDECAR).map(as_json))
@example(as_json(SIDECAR | {"quarantined": None}))
def test_sidecars(folder: Path, content: bytes) -> None:
    store = Store(str(folder / "store"))
    store.write("_snax/00000.json", content)
    try:
        store.finish([PLAN[0]], 16_000)
    except StoreError as error:
        assert_own_error(error, "Shard 0")


def shard() -> bytes:
    codes = [np.arange(count, dtype=np.int32) for count in (2, 4, 8)]
    rows = [Row(Clip(f"clip{i}", "a.wav"), 0, EncodedClip(codes, 1000)) for i in range(3)]
    return to_parquet(rows, small.CONFIG, None, {})


def success(entry: dict[str, Any]) -> bytes:
    return as_json({"shards": [entry]})


SHARD = {"rows": 3, "sha256": hashlib.sha256(shard()).hexdigest()}


def check_tokens(folder: Path) -> None:
    try:
        source = snax.open_tokens(folder)
        for i in range(min(5, len(source))):
            assert all(isinstance(level, np.ndarray) for level in source[i]["codes"])
    except ValueError as error:
        assert_own_error(error, str(folder))


@given(mutated(success(SHARD)) | altered(SHARD).map(success))
@example(success(SHARD | {"rows": 10**30}))
@example(success(SHARD | {"rows": math.inf}))
@example(success(SHARD | {"rows": -3}))
def test_success_files(folder: Path, content: bytes) -> None:
    (folder / "finished").mkdir(exist_ok=True)
    (folder / "finished" / "tokens-00000-of-00001.parquet").write_bytes(shard())
    (folder / "finished" / "_SUCCESS").write_bytes(content)
    check_tokens(folder / "finished")


@given(mutated(shard()))
def test_shards(folder: Path, content: bytes) -> None:
    """The hash is valid, because an attacker who changes a shard can change its hash too."""
    (folder / "shards").mkdir(exist_ok=True)
    (folder / "shards" / "tokens-00000-of-00001.parquet").write_bytes(content)
    (folder / "shards" / "_SUCCESS").write_bytes(success({"rows": 3, "sha256": hashlib.sha256(content).hexdigest()}))
    check_tokens(folder / "shards")


RECIPES = [path.read_bytes() for path in sorted((Path(__file__).parents[1] / "recipes").glob("*.toml"))]


@given(mutated(*RECIPES))
def test_recipes(folder: Path, content: bytes) -> None:
    path = folder / "recipe.toml"
    path.write_bytes(content)
    try:
        train = train_config.read(path)
    except ValueError as error:
        assert_own_error(error, "recipe.toml")
        return
    assert train.steps > 0


RECIPE = tomllib.loads(RECIPES[-1].decode())


@given(
    altered(RECIPE)
    | st.sampled_from(["model", "data", "optimizer", "losses", "discriminators"]).flatmap(
        lambda section: altered(RECIPE[section]).map(lambda changes: RECIPE | {section: changes})
    )
)
def test_recipe_fields(table: dict[str, Any]) -> None:
    try:
        train = train_config.from_dict(table)
    except train_config.ConfigError:
        return
    assert json.loads(json.dumps(train_config.to_dict(train), allow_nan=False)) == train_config.to_dict(train)
