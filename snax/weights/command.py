"""The command `snax convert`."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from .. import extras


def convert(
    source: str = "snac_24khz",
    out: str | None = None,
    *,
    to_torch: Annotated[bool, Parameter(name="--to-torch")] = False,
    verify: bool = False,
    config: Path | None = None,
    revision: str | None = None,
) -> int:
    """Convert weights from PyTorch to Orbax, or back.

    Args:
        source: A published name, a hub id, a folder with config.json and pytorch_model.bin or model.safetensors, or
            such a file of weights. With --to-torch, a model that snax.load reads.
        out: The new folder. Default for a SOURCE on the hub: the cache that snax.load reads.
        to_torch: Write a folder that snac.SNAC.from_pretrained reads. Needs torch.
        verify: Compare the converted model with the PyTorch reference. Needs torch and snac.
        config: The config.json of the weights. Default: the one in the same folder.
        revision: Commit, tag or branch of a SOURCE on the hub.
    """
    from . import pretrained, torch_files

    if to_torch:
        if out is None:
            raise ValueError("OUT is missing: name a new folder for the PyTorch checkpoint.")
        if verify or config is not None or revision is not None:
            raise ValueError("--verify, --config and --revision cannot be combined with --to-torch.")
        torch_files.write_folder(pretrained.load(source), out)
        print(f"{source} -> {out}")
        return 0
    if verify:
        try:
            import snac  # noqa: F401  # otherwise it is first missed after the conversion
        except ImportError as error:
            raise extras.missing(error, "convert") from error
    return _from_torch(source, out, verify, config, revision)


def _from_torch(source: str, out: str | None, verify: bool, config: Path | None, revision: str | None) -> int:
    from . import checkpoint, pretrained, torch_files

    if out is not None:
        checkpoint.save(torch_files.read_model(*_find(source, config, revision)), out)
    elif Path(source).exists():
        raise ValueError(f"OUT is missing: {source} is a path, so it has no place in the cache.")
    else:
        out = str(pretrained.converted(source, revision))
    print(f"{source} -> {out}")
    if not verify:
        return 0
    from . import verification

    comparison = verification.compare_files(pretrained.load(out), *_find(source, config, revision))
    print(verification.table(comparison))
    return 0 if all(clip.passed for clip in comparison.values()) else 1


def _find(source: str, config: Path | None, revision: str | None) -> tuple[Path, Path]:
    """Find the files of the weights and of the configuration."""
    from . import pretrained, torch_files

    path = Path(source)
    if not path.exists():
        return pretrained.download(source, revision)
    weights_path = torch_files.find_weights(path) if path.is_dir() else path
    if weights_path is None:
        raise ValueError(f"{path} has neither {torch_files.SAFETENSORS_NAME} nor {torch_files.PICKLE_NAME}.")
    return weights_path, config or weights_path.with_name(torch_files.CONFIG_NAME)
