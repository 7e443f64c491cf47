"""`snax info`: facts about models, audio files, files of codes and extractions."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from .. import json_text
from ..codec.config import PUBLISHED_CONFIGS, SNACConfig
from ..data import audio
from ..data.codes_file import CodesFile
from ..weights import pretrained
from ..weights.checkpoint import fingerprint

_log = logging.getLogger(__name__)


def print_facts(inputs: Sequence[str]) -> int:
    """Print what is known about each input. Returns 1 if one of them could not be read, else 0."""
    failures = 0
    for name in inputs:
        try:
            facts = _facts(name)
        except (ValueError, OSError) as error:
            failures += 1
            _log.error("%s: %s", name, error)
            continue
        print(name)
        for label, value in facts:
            print(f"  {label:<18}{value}")
    return int(failures > 0)


def _facts(name: str) -> list[tuple[str, Any]]:
    if name in pretrained.PUBLISHED:
        published = pretrained.PUBLISHED[name]
        return [
            ("model", f"{published.repo_id} on the hub, revision {published.revision}"),
            *_config_facts(PUBLISHED_CONFIGS[name]),
        ]
    if os.path.exists(os.path.join(name, "_snax")):
        return _extraction_facts(Path(name))
    if os.path.isdir(name) or name in pretrained.BUNDLED:
        model = pretrained.load(name)
        count = sum(parameter.size for parameter in jax.tree.leaves(model))
        return [("model", f"{count:,} parameters, fingerprint {fingerprint(model)}"), *_config_facts(model.config)]
    if name.lower().endswith(".safetensors"):
        file = CodesFile.read(name)
        return [
            ("model", f"{file.model}, fingerprint {file.fingerprint}"),
            ("audio", f"{file.samples / file.sampling_rate:.3f} s, {file.samples} samples at {file.sampling_rate} Hz"),
            ("codes", " + ".join(str(level.shape[1]) for level in file.codes) + f" in {len(file.codes[0])} channels"),
        ]
    return list(audio.describe(name).items())


def _extraction_facts(folder: Path) -> list[tuple[str, Any]]:
    try:
        made_with = dict(json_text.parse((folder / "_snax" / "job.json").read_bytes()))
        try:
            totals = dict(json_text.parse((folder / "_SUCCESS").read_bytes()))
            totals["shards"] = len(totals["shards"])
        except FileNotFoundError:
            totals = _unfinished_totals(folder, int(made_with["sampling_rate"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the metadata of the extraction in {folder} is corrupt: {error}") from None
    if "tokens" in totals:
        totals["codes"] = totals.pop("tokens")  # in `made_with`, `tokens` is the layout of the column of tokens
    return [*totals.items(), *made_with.items()]


def _unfinished_totals(folder: Path, rate: int) -> dict[str, Any]:
    """Return the totals of the shards that are committed so far."""
    sidecars = [dict(json_text.parse(path.read_bytes())) for path in folder.glob("_snax/[0-9]*.json")]
    names = sorted(path.stem for path in folder.glob("tokens-*-of-*.parquet"))
    planned = f" of {int(names[0].rpartition('-')[2])}" if names else ""
    finished = f"no: {len(sidecars)}{planned} shards so far; if it does not run, `snax extract` resumes it"
    totals = {name: sum(sidecar[name] for sidecar in sidecars) for name in ("clips", "committed", "rows", "tokens")}
    return {
        "finished": finished,
        **totals,
        "hours": sum(sidecar["samples"] for sidecar in sidecars) / rate / 3600,
        "quarantined": sum(len(sidecar["quarantined"]) for sidecar in sidecars),
    }


def _config_facts(config: SNACConfig) -> list[tuple[str, Any]]:
    return [
        ("sampling rate", f"{config.sampling_rate} Hz"),
        ("codes", f"{len(config.vq_strides)} levels of {config.codebook_size}, strides {config.vq_strides}"),
        ("codes per second", ", ".join(f"{rate:.1f}" for rate in config.code_rates)),
        ("bit rate", f"{config.bitrate / 1000:.2f} kbps"),
        ("latent frame", f"{config.hop_length} samples, {1000 / config.frame_rate:.1f} ms"),
        ("attention window", f"{config.attn_window_size} frames" if config.attn_window_size else "none"),
    ]
