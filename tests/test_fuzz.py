"""Every parser of ours, fed what a stranger might: it raises what it says it raises, or what it gives is sound.

A hundred inputs each with the other tests; `pytest tests/test_fuzz.py --hypothesis-profile=long` takes a hundred
thousand. An input that takes ten seconds counts as a hang.
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

# Values that JSON can have and that someone may not have thought of.
NUMBERS = st.integers() | st.floats() | st.sampled_from([0, 1, 2, 64, 2**31, 2**63, 10**100, math.inf])
SCALARS = st.none() | st.booleans() | NUMBERS | st.text(max_size=20)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=3)
)


@st.composite
def mutated(draw: st.DrawFn, *whole: bytes) -> bytes:
    """One of these with bytes changed, cut out, put in and repeated."""
    content = draw(st.sampled_from(whole))
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.integers(0, len(content)))
        end = at + draw(st.integers(0, 20))
        kind = draw(st.sampled_from(["change", "cut", "put in", "repeat", "end"]))
        if kind == "change":
            content = content[:at] + draw(st.binary(max_size=4)) + content[at + 4 :]
        elif kind == "cut":
            content = content[:at] + content[end:]
        elif kind == "put in":
            content = content[:at] + draw(st.binary(max_size=20)) + content[at:]
        elif kind == "repeat":
            content = content[:at] + content[at:end] * draw(st.integers(2, 1000)) + content[end:]
        else:
            content = content[:at]
    return content


def altered(whole: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """It, with something else in some of its fields."""
    return st.dictionaries(st.sampled_from(sorted(whole)), VALUES, max_size=3).map(lambda other: whole | other)


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def says(error: Exception, *what: str) -> None:
    """The message says one of these: it is ours, and not what a library happened to raise."""
    assert any(each in str(error) for each in what), error


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
    assert (built.bitrate == 0) == (built.codebook_size == 1)  # a code of which there is one says nothing
    assert snax.SNACConfig.from_dict(json.loads(json.dumps(built.to_dict()))) == built


CONFIGS = [json.dumps(each.to_dict()).encode() for each in (small.CONFIG, *config.PUBLISHED_CONFIGS.values())]


@given(mutated(*CONFIGS, b"[" * 100_000, b'{"a":' * 100_000))
def test_configurations(content: bytes) -> None:
    check_configuration(lambda: json_text.parse(content))


@given(
    st.fixed_dictionaries({}, optional={field: VALUES | st.lists(NUMBERS) for field in small.CONFIG.to_dict()}),
    st.sampled_from(CONFIGS),
)
@example({"codebook_size": 1}, CONFIGS[0])
def test_fields_of_configurations(fields: dict[str, Any], content: bytes) -> None:
    check_configuration(lambda: json.loads(content) | fields)


def codes_file() -> bytes:
    with tempfile.NamedTemporaryFile() as file:
        levels = [np.arange(2 * count).reshape(2, count) for count in (2, 4, 8)]
        CodesFile(levels, "small", "ab" * 32, 16_000, 1000).write(file.name)
        return Path(file.name).read_bytes()


@given(mutated(codes_file()))
def test_files_of_codes(folder: Path, content: bytes) -> None:
    path = folder / "a.codes.safetensors"
    path.write_bytes(content)
    try:
        file = CodesFile.read(path)
    except ValueError as error:
        says(error, str(path))
        return
    assert {level.ndim for level in file.codes} == {2}
    assert len({len(level) for level in file.codes}) == 1
    assert {level.dtype.kind for level in file.codes} <= set("iu")


WEIGHTS = {"encoder.bias": np.arange(3, dtype=np.float32), "decoder.kernel": np.ones((2, 1, 2), np.float32)}


def with_pickle(archive: bytes, content: bytes) -> bytes:
    """torch's archive with another pickle and a checksum that is right, without which nothing would look at it."""
    sink = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as whole, zipfile.ZipFile(sink, "w") as changed:
        for name in whole.namelist():
            changed.writestr(name, content if name.endswith("data.pkl") else whole.read(name))
    return sink.getvalue()


def test_weights(folder: Path) -> None:
    """torch's archives, their pickles, and safetensors."""
    torch = pytest.importorskip("torch", reason="the matrix of versions has no torch, which is pinned")
    sink = io.BytesIO()
    torch.save({name: torch.from_numpy(array) for name, array in WEIGHTS.items()}, sink)
    archive = sink.getvalue()
    with zipfile.ZipFile(sink) as whole:
        (name,) = (name for name in whole.namelist() if name.endswith("data.pkl"))
        pickle = whole.read(name)
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
            says(error, f"{path} can't be read as weights")
            return
        assert all(isinstance(name, str) and isinstance(array, np.ndarray) for name, array in state_dict.items())
        assert sum(array.nbytes for array in state_dict.values()) <= len(file[1])

    check()


ORBAX = {"format": checkpoint.FORMAT, "config": small.CONFIG.to_dict()}


@given(VALUES | altered(ORBAX) | altered(ORBAX["config"]).map(lambda fields: ORBAX | {"config": fields}))
def test_metadata_of_orbax(metadata: Any) -> None:
    try:
        built = checkpoint._config("/a/model", metadata)
    except ValueError as error:
        says(error, "/a/model")
        return
    assert snax.SNACConfig.from_dict(metadata["config"]) == built


LAYOUTS = st.sampled_from(
    [ORPHEUS, TokenLayout((4, 2, 1)), TokenLayout((8, 4, 2, 1), 64, 7, 100), TokenLayout((3, 1), 8)]
)
NEAR = st.integers(0, 2).flatmap(lambda i: st.integers(-5, 40_000).map(lambda n: n + [0, 128_266, 2**32 + 128_266][i]))
TOKENS = NEAR | st.integers(-(2**63), 2**63 - 1)


@given(LAYOUTS, st.lists(TOKENS, max_size=30), st.sampled_from([np.int64, np.int32, np.uint16]))
def test_streams_of_tokens(layout: TokenLayout, tokens: list[int], dtype: type[np.generic]) -> None:
    given = np.array(tokens, np.int64).astype(dtype)[None]
    whole, rest = layout.split(given)
    np.testing.assert_array_equal(np.concatenate([whole, rest], axis=1), given)
    try:
        codes = layout.unflatten(whole)
    except ValueError as error:
        says(error, "tokens[0, ")
        return
    assert all(((level >= 0) & (level < layout.codebook_size)).all() for level in codes)
    np.testing.assert_array_equal(layout.flatten(codes), whole)


PLACES = st.tuples(st.integers(0, 6), st.integers(0, 9))


@given(st.dictionaries(PLACES, TOKENS | st.integers(151_990, 152_010 + 7 * 4160), max_size=4))
def test_streams_of_mini_omni(changes: dict[tuple[int, int], int]) -> None:
    """Two groups, in which a model said something else here and there."""
    streams = np.array(mini_omni_streams([np.full((1, 2 * n), 7, np.int32) for n in (1, 2, 4)]), np.int64)
    for place, token in changes.items():
        streams[0][place] = token
    said = np.stack([streams[0, i, i + 1 : i + 3] - (152_000 + 4160 * i) for i in range(7)])
    sound = bool(((said >= 0) & (said < 4096)).all())
    try:
        codes = mini_omni_codes(streams)
    except ValueError as error:
        says(error, "tokens[0, ")
        assert not sound
        return
    assert sound
    assert sorted(np.concatenate(codes, axis=1)[0]) == sorted(said.ravel())


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
    """Of a file that is a manifest or not."""
    try:
        shards = corpus.plan([str(path)], 2)
    except CorpusError as error:
        says(error, path.name, "two clips would be called")
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
def test_lines_of_manifests(folder: Path, rows: list[dict[str, Any]]) -> None:
    path = folder / "lines.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    check_plan(path)


def check_clips(source: Source) -> None:
    """Each with what it is or why not, and names that any file can hold."""
    found = list(clips(source))
    if source.kind == "rows":
        assert len(found) == source.end - source.first
    for clip, content in found:
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
        says(error, "the plan is damaged")
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
        says(error, "shard 0")


def shard() -> bytes:
    codes = [np.arange(count, dtype=np.int32) for count in (2, 4, 8)]
    rows = [Row(Clip(f"clip{i}", "a.wav"), 0, EncodedClip(codes, 1000)) for i in range(3)]
    return to_parquet(rows, small.CONFIG, None, {})


def success(shard: dict[str, Any]) -> bytes:
    return as_json({"shards": [shard]})


SHARD = {"rows": 3, "sha256": hashlib.sha256(shard()).hexdigest()}


def check_tokens(folder: Path) -> None:
    try:
        source = snax.open_tokens(folder)
        for i in range(min(5, len(source))):
            assert all(isinstance(level, np.ndarray) for level in source[i]["codes"])
    except ValueError as error:
        says(error, str(folder))


@given(mutated(success(SHARD)) | altered(SHARD).map(success))
@example(success(SHARD | {"rows": 10**30}))
@example(success(SHARD | {"rows": math.inf}))
@example(success(SHARD | {"rows": -3}))
def test_last_words_of_extractions(folder: Path, content: bytes) -> None:
    (folder / "finished").mkdir(exist_ok=True)
    (folder / "finished" / "tokens-00000-of-00001.parquet").write_bytes(shard())
    (folder / "finished" / "_SUCCESS").write_bytes(content)
    check_tokens(folder / "finished")


@given(mutated(shard()))
def test_shards_of_strangers(folder: Path, content: bytes) -> None:
    """With the right hash: who changes a shard can change that too."""
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
        says(error, "recipe.toml")
        return
    assert train.steps > 0


RECIPE = tomllib.loads(RECIPES[-1].decode())


@given(
    altered(RECIPE)
    | st.sampled_from(["model", "data", "optimizer", "losses", "discriminators"]).flatmap(
        lambda section: altered(RECIPE[section]).map(lambda other: RECIPE | {section: other})
    )
)
def test_fields_of_recipes(table: dict[str, Any]) -> None:
    try:
        train = train_config.from_dict(table)
    except train_config.ConfigError:
        return
    assert json.loads(json.dumps(train_config.to_dict(train), allow_nan=False)) == train_config.to_dict(train)
