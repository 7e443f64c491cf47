"""`snax.load` with the real hub client and a local hub server with checkpoints of the reference."""

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import snac
import torch
from helpers import hub, small
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.torch import save_file

import snax
from snax.weights import pretrained

REPO, COMMIT, OTHER_COMMIT = "someone/snac", "a" * 40, "b" * 40
UNREACHABLE = "http://127.0.0.1:9"  # the discard port, where no server listens


@pytest.fixture(scope="module")
def torch_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torch")
    torch.manual_seed(0)
    reference = snac.SNAC(**small.CONFIG.to_dict())
    torch.save(reference.state_dict(), folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(small.CONFIG.to_dict()))
    return folder


@pytest.fixture
def published(torch_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[hub.Hub]:
    """Run a hub with REPO and a small model as snac_24khz, with an empty cache."""
    weights = (torch_folder / "pytorch_model.bin").read_bytes()
    config = (torch_folder / "config.json").read_bytes()
    entry = dataclasses.replace(
        pretrained.PUBLISHED["snac_24khz"], sha256=hashlib.sha256(weights).hexdigest(), config=small.CONFIG
    )
    monkeypatch.setitem(pretrained.PUBLISHED, "snac_24khz", entry)
    with hub.running() as running:
        for repo, commit in [(REPO, COMMIT), (entry.repo_id, entry.revision)]:
            running.files[repo, commit, "pytorch_model.bin"] = weights
            running.files[repo, commit, "config.json"] = config
        running.aliases["main"] = COMMIT
        use_hub(monkeypatch, running.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "assets"))
        yield running


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub(monkeypatch, UNREACHABLE)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client retries five times with exponential backoff


def use_hub(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Set the hub's URL. The client reads HF_ENDPOINT only at import."""
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def assert_same_codes_as_reference(model: snax.SNAC, torch_folder: Path) -> None:
    reference = snac.SNAC.from_pretrained(str(torch_folder))
    audio = small.audio()
    with torch.inference_mode():
        expected = reference.encode(torch.from_numpy(audio))
    for codes, expected_codes in zip(model.encode(audio), expected, strict=True):
        np.testing.assert_array_equal(codes, expected_codes)


def test_published_name_is_downloaded_once(
    published: hub.Hub, torch_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_same_codes_as_reference(snax.load("snac_24khz"), torch_folder)
    requests = list(published.requests)
    assert any("pytorch_model.bin" in request for request in requests)
    go_offline(monkeypatch)
    snax.load("snac_24khz")
    snax.load("hubertsiuzdak/snac_24khz")  # the same model by its repository id
    assert published.requests == requests


def test_repository_id_follows_its_branch(
    published: hub.Hub, torch_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_same_codes_as_reference(snax.load(REPO), torch_folder)
    new_config = json.loads((torch_folder / "config.json").read_text()) | {"sampling_rate": 8000}
    published.files[REPO, OTHER_COMMIT, "config.json"] = json.dumps(new_config).encode()
    published.files[REPO, OTHER_COMMIT, "pytorch_model.bin"] = published.files[REPO, COMMIT, "pytorch_model.bin"]
    published.aliases["main"] = OTHER_COMMIT
    assert snax.load(REPO).config.sampling_rate == 8000
    assert snax.load(REPO, revision=COMMIT).config.sampling_rate == 16000
    go_offline(monkeypatch)
    assert snax.load(REPO).config.sampling_rate == 8000


def test_safetensors(published: hub.Hub, torch_folder: Path, tmp_path: Path) -> None:
    state_dict = torch.load(torch_folder / "pytorch_model.bin", weights_only=True)
    save_file(state_dict, tmp_path / "model.safetensors")
    published.files[REPO, COMMIT, "model.safetensors"] = (tmp_path / "model.safetensors").read_bytes()
    del published.files[REPO, COMMIT, "pytorch_model.bin"]
    assert_same_codes_as_reference(snax.load(REPO), torch_folder)


def test_rejects_changed_weights_of_published_model(published: hub.Hub, tmp_path: Path) -> None:
    entry = pretrained.PUBLISHED["snac_24khz"]
    published.files[entry.repo_id, entry.revision, "pytorch_model.bin"] += b"x"
    with pytest.raises(ValueError, match="its sha256 is"):
        snax.load("snac_24khz")
    assert not list(tmp_path.glob("assets/**/format-*"))


def test_rejects_changed_configuration_of_published_model(published: hub.Hub, tmp_path: Path) -> None:
    """The hash of the weights does not cover the configuration, such as the sampling rate."""
    entry = pretrained.PUBLISHED["snac_24khz"]
    changed = json.dumps(small.CONFIG.to_dict() | {"sampling_rate": 48_000})
    published.files[entry.repo_id, entry.revision, "config.json"] = changed.encode()
    with pytest.raises(ValueError, match="config.json is not the configuration of the published snac_24khz"):
        snax.load("snac_24khz")
    assert not list(tmp_path.glob("assets/**/format-*"))


def test_rejects_changed_weights_after_redirect(published: hub.Hub) -> None:
    """The real hub redirects downloads of weights to another host."""
    entry = pretrained.PUBLISHED["snac_24khz"]
    key = entry.repo_id, entry.revision, "pytorch_model.bin"
    with hub.running() as other_hub:
        other_hub.files[key] = published.files[key][:-1] + b"x"
        published.redirects[key] = other_hub.url
        with pytest.raises(ValueError, match="its sha256 is"):
            snax.load("snac_24khz")
        assert [request for request in other_hub.requests if request.startswith("GET")]


@pytest.mark.parametrize(("length_error", "message"), [(-10, "its sha256 is"), (10, "Try again")])
def test_rejects_wrong_content_length(
    published: hub.Hub, length_error: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    published.length_error = length_error
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises((ValueError, ConnectionError), match=message):
        snax.load("snac_24khz")


def test_rejects_commit_that_is_a_path_outside_the_cache(published: hub.Hub, tmp_path: Path) -> None:
    published.aliases["main"] = "../../../../outside"
    published.files[REPO, "../../../../outside", "config.json"] = b"{}"
    with pytest.raises(ValueError, match="Invalid pointer path"):
        snax.load(REPO)
    assert not list(tmp_path.glob("**/outside*"))


@pytest.mark.parametrize(
    ("name", "revision", "error", "message"),
    [
        ("snac_48khz", None, ValueError, r"snac_24khz, snac_32khz, snac_44khz"),
        ("no/such/model", None, ValueError, "neither a published model"),
        ("someone/else", None, ValueError, "The hub has no repository someone/else at revision main"),
        (REPO, "v9", ValueError, "The hub has no repository someone/snac at revision v9"),
        ("hubertsiuzdak/snac_32khz", None, ValueError, "The hub has no repository hubertsiuzdak/snac_32khz"),
    ],
)
def test_unknown_names(
    published: hub.Hub, name: str, revision: str | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        snax.load(name, revision=revision)


def test_repository_without_weights(published: hub.Hub) -> None:
    del published.files[REPO, COMMIT, "pytorch_model.bin"]
    with pytest.raises(FileNotFoundError, match=r"has no pytorch_model.bin"):
        snax.load(REPO)


def test_offline_with_empty_cache(published: hub.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    go_offline(monkeypatch)
    with pytest.raises(ConnectionError, match="not in the cache, and the hub cannot be reached"):
        snax.load("snac_24khz")


def test_recovers_from_interrupted_download(
    published: hub.Hub, torch_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    published.break_off_after = 1000
    with pytest.raises(ConnectionError, match="Download of pytorch_model.bin .* failed"):
        snax.load("snac_24khz")
    assert not list(tmp_path.glob("assets/**/format-*"))
    published.break_off_after = None
    assert_same_codes_as_reference(snax.load("snac_24khz"), torch_folder)


def test_multi_process_jobs_do_not_convert(published: hub.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as context:
        context.setattr(jax, "process_count", lambda: 2)
        with pytest.raises(RuntimeError, match=r"Run `snax convert snac_24khz` on each host first"):
            snax.load("snac_24khz")


# A user's process. It gets the hub, the cache, the hash and the configuration from environment variables.
LOAD = """
import dataclasses, json, os, sys
import snax
from snax.weights import checkpoint, pretrained
config = snax.SNACConfig.from_dict(json.loads(os.environ["CONFIG"]))
entry = dataclasses.replace(pretrained.PUBLISHED["snac_24khz"], sha256=os.environ["SHA256"], config=config)
pretrained.PUBLISHED["snac_24khz"] = entry
if "stop" in sys.argv:
    save = checkpoint.save
    def save_and_wait(model, path):
        save(model, path)
        print("saved", flush=True)
        sys.stdin.read()
    checkpoint.save = save_and_wait
print(snax.load("snac_24khz").encode(__import__("numpy").ones((1, 1, 640), "float32"))[0].tolist())
"""


def start(published: hub.Hub, home: Path, *arguments: str) -> subprocess.Popen[str]:
    sha256 = pretrained.PUBLISHED["snac_24khz"].sha256
    environment = os.environ | {"HF_ENDPOINT": published.url, "HF_HOME": str(home), "SHA256": sha256}
    environment["CONFIG"] = json.dumps(small.CONFIG.to_dict())
    command = [sys.executable, "-c", LOAD, *arguments]
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_concurrent_conversion_by_two_processes(published: hub.Hub, tmp_path: Path) -> None:
    processes = [start(published, tmp_path) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0] != ""


@pytest.mark.slow
def test_recovers_from_killed_conversion(published: hub.Hub, tmp_path: Path) -> None:
    process = start(published, tmp_path, "stop")
    assert process.stdout is not None
    assert process.stdout.readline() == "saved\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    cache = tmp_path / "assets" / "snax"
    assert list(cache.glob("**/*.unfinished"))
    assert not list(cache.glob("**/format-?"))
    process = start(published, tmp_path)
    output = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert list(cache.glob("**/format-?"))
    assert not list(cache.glob("**/*.unfinished"))


# A process that changes to another user. It imports everything as root, because that user may not read root's Python.
LOAD_AS = """
import os, sys
import huggingface_hub.constants, huggingface_hub.utils._cache_assets
import snax
name, shared, user = sys.argv[1:]
snax.load(name)
huggingface_hub.constants.HF_HUB_CACHE = shared + "/hub"
huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE = shared + "/assets"
os.chdir("/")
os.setgid(int(user))
os.setuid(int(user))
print(snax.load(name).encode(__import__("numpy").ones((1, 1, 640), "float32"))[0].tolist())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="only root can be several users")
def test_cache_shared_by_users(published: hub.Hub) -> None:
    """A user can read the models that another user converted, but cannot change or add models in that user's folders.
    The error names the folder."""
    published.files["someone/other", COMMIT, "config.json"] = published.files[REPO, COMMIT, "config.json"]
    published.files["someone/other", COMMIT, "pytorch_model.bin"] = published.files[REPO, COMMIT, "pytorch_model.bin"]
    # Not in pytest's folders, which only root can read.
    with tempfile.TemporaryDirectory() as shared, tempfile.TemporaryDirectory() as home:
        for folder in (shared, home):
            os.chmod(folder, 0o1777)

        def load(name: str, user: int) -> subprocess.CompletedProcess[str]:
            environment = os.environ | {"HF_ENDPOINT": published.url, "HF_HOME": home}
            command = [sys.executable, "-c", LOAD_AS, name, shared, str(user)]
            return subprocess.run(command, env=environment, capture_output=True, text=True)

        first = load(REPO, 12_345)
        assert first.returncode == 0, first.stderr
        (folder,) = Path(shared).glob("assets/**/format-1")
        before = {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}
        assert {path.stat().st_uid for path in before} == {12_345}
        assert not [path for path in before if path.stat().st_mode & 0o022], "other users could change it"
        second = load(REPO, 12_346)
        assert (second.returncode, second.stdout) == (0, first.stdout), second.stderr
        assert {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]} == before
        third = load("someone/other", 12_346)
        assert third.returncode == 1
        assert f"PermissionError: [Errno 13] Permission denied: '{shared}/hub/models--someone--other'" in third.stderr


def test_torch_folder(torch_folder: Path) -> None:
    assert_same_codes_as_reference(snax.load(torch_folder), torch_folder)


def test_dtype_sharding_and_precision(torch_folder: Path, tmp_path: Path) -> None:
    snax.save(snax.load(torch_folder), tmp_path / "orbax")
    mesh = jax.make_mesh((4,), ("data",))
    replicated = NamedSharding(mesh, PartitionSpec())
    for source in (torch_folder, tmp_path / "orbax", str(tmp_path / "orbax")):
        model = snax.load(source, dtype=jnp.bfloat16, sharding=replicated, precision="default")
        assert model.precision == "default"
        for leaf in jax.tree.leaves(model):
            assert leaf.dtype == jnp.bfloat16
            assert leaf.sharding.is_equivalent_to(replicated, leaf.ndim)


def test_relative_folder(torch_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snax.save(snax.load(torch_folder), tmp_path / "snac_24khz")
    monkeypatch.chdir(tmp_path)
    assert snax.load("./snac_24khz").config == small.CONFIG  # "snac_24khz" is the published model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": jnp.int32}, r"`dtype` \(=int32\) must be a floating-point type"),
        ({"precision": "exact"}, "highest"),
        ({"revision": "main"}, "is a path"),
    ],
)
def test_rejects_invalid_options(torch_folder: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        snax.load(torch_folder, **options)
