"""Clips of any length in packed rows of one fixed shape. Each clip gets the codes and the audio that it gets alone.

Clips are laid end to end on a tape, each padded to whole pad multiples, with a gap between them that is wider than the
receptive field of any single layer. A padding mask separates them. Rows are cut from the tape at fixed places, and
share some context with their neighbours:

    tape    | clip 0   | gap | clip 1                       | gap | clip 2     |
    row 0   [context |                     | context]
    row 1                        [context |                     | context]

One compilation serves all lengths, and memory does not depend on them.
"""

import dataclasses
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Integer, PRNGKeyArray

from ..codec.inputs import check_clip, check_clip_codes, check_cuttable
from ..codec.layers import flatten, receptive_field, round_up
from ..codec.model import SNAC

# The length of a row over its context on one side: 2 % of the audio is computed twice. At 24 kHz a row has 25.6 s.
# Longer rows save little; shorter rows save less memory than the model's weights take.
ROW_CONTEXTS = 100


class EncodedClip(NamedTuple):
    """The codes of one clip, (frames / stride,) for each level, and its length in samples if known."""

    codes: Sequence[Integer[np.ndarray | Array, " _"]]
    samples: int | None = None


def encode_many(
    model: SNAC,
    clips: Iterable[Float[np.ndarray | Array, " _"]],
    *,
    row_seconds: float | None = None,
    rows: int | None = None,
    mesh: Mesh | None = None,
) -> Iterator[EncodedClip]:
    """Encode clips of any lengths. Yields each clip's codes, in order: those of `model.encode(clip[None, None])`.

    Args:
        clips: mono audio. Read lazily, so a generator may load files.
        row_seconds: length of a packed row. Default: 100 times the context on one side, 25.6 s at 24 kHz. Longer rows
            take more memory, shorter rows compute more audio twice.
        rows: rows per batch. Default: one for each device of the mesh.
        mesh: the devices among which rows are divided; all its axes are used. Default: JAX's default device.

    If `row_seconds`, `rows` and `mesh` are all None and the clips fit in one row, the row is only as long as they are,
    rounded up to four significant bits so that few lengths are compiled.

    Raises:
        ValueError: for a clip that is not finite mono audio, when it is reached; for rows that are too short, or not
            divisible among the devices.
    """
    layout = _Layout.of(model, row_seconds, rows, mesh)
    model = layout.replicated(model)

    def run(units: np.ndarray, audio: np.ndarray) -> Sequence[Array]:
        return model._encode(*layout.sharded(audio[:, None].astype(model.dtype), units >= 0))

    checked = (([check_clip(clip, i)], len(clip)) for i, clip in enumerate(clips))
    results = _through_rows(run, checked, [model.config.pad_multiple], np.float32, layout)
    return (EncodedClip(tuple(codes), samples) for codes, samples in results)


def decode_many(
    model: SNAC,
    clips: Iterable[EncodedClip | Sequence[Integer[np.ndarray | Array, " _"]]],
    *,
    key: PRNGKeyArray | None = None,
    row_seconds: float | None = None,
    rows: int | None = None,
    mesh: Mesh | None = None,
) -> Iterator[Float[np.ndarray, " samples"]]:
    """Decode clips of any lengths. Yields each clip's audio, in order: that of `model.decode` on its codes alone.

    Args:
        clips: the results of `encode_many`, whose audio is trimmed to their length; or codes, whose audio is not.
        key: for the noise, which is that of `model.decode(codes, key=key)` for each clip. Without a key there is none.
        row_seconds: as in `encode_many`.
        rows: as in `encode_many`.
        mesh: as in `encode_many`.

    Raises:
        ValueError: for codes that can't be decoded, when they are reached; for rows as in `encode_many`.
    """
    layout = _Layout.of(model, row_seconds, rows, mesh)
    model = layout.replicated(model)
    frames = np.arange(layout.frames)

    def run(units: np.ndarray, *codes: np.ndarray) -> Sequence[Array]:
        positions = (units[..., None] * layout.frames + frames).reshape(len(units), -1).astype(np.int32)
        codes, padding_mask, positions = layout.sharded(codes, units >= 0, positions)
        return [model._decode(codes, key, padding_mask, positions)[:, 0]]

    checked = (check_clip_codes(*_as_encoded(clip), i, model.config) for i, clip in enumerate(clips))
    widths = [layout.frames // stride for stride in model.config.vq_strides]
    return (audio[:samples] for (audio,), samples in _through_rows(run, checked, widths, np.int32, layout))


def computed_units(model: SNAC, units: Sequence[int], mesh: Mesh | None = None) -> int:
    """Pad multiples that `encode_many` computes for clips of `units` pad multiples each, context and gaps included."""
    layout = _Layout.of(model, None, None, mesh)
    tape = sum(units) + layout.gap * max(0, len(units) - 1)
    return math.ceil(tape / layout.units) * layout.rows * layout.length


def _as_encoded(clip: EncodedClip | Sequence[np.ndarray | Array]) -> EncodedClip:
    return clip if isinstance(clip, EncodedClip) else EncodedClip(clip)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How rows are cut. Lengths are in units, the frames of a pad multiple."""

    frames: int  # in a unit
    rows: int
    length: int  # of a row, context included
    context: int  # to each side of a row
    gap: int  # between two clips
    mesh: Mesh | None
    fixed: bool  # whether clips that need less than one row get a whole one all the same

    @property
    def units(self) -> int:
        """Units of the tape that a batch of rows gets through, each in one row, contexts not counted."""
        return self.rows * (self.length - 2 * self.context)

    @classmethod
    def of(cls, model: SNAC, row_seconds: float | None, rows: int | None, mesh: Mesh | None) -> "_Layout":
        config = model.config
        check_cuttable(config)
        frames = config.pad_multiple // config.hop_length
        context, gap = (math.ceil(each / frames) for each in _latent_frames_seen(model))
        unit_seconds = config.pad_multiple / config.sampling_rate
        length = ROW_CONTEXTS * context if row_seconds is None else round(row_seconds / unit_seconds)
        if length <= 2 * context + gap:
            raise ValueError(
                f"row_seconds (={row_seconds}) must be at least {(2 * context + gap + 1) * unit_seconds:.3f}: "
                f"a row has {context * unit_seconds:.3f} s of context on both sides."
            )
        fixed = (row_seconds, rows, mesh) != (None, None, None)
        devices = 1 if mesh is None else mesh.size
        rows = devices if rows is None else rows
        if rows < 1 or rows % devices:
            raise ValueError(f"rows (={rows}) must be a multiple of the {devices} devices that share them.")
        return cls(frames, rows, length, context, gap, mesh, fixed)

    def fitted(self, clips: Iterable["_Clip"], width: int) -> tuple["_Layout", Iterable["_Clip"]]:
        """The layout for these clips, a single shorter row if they all fit in one, and the clips."""
        if self.fixed:
            return self, clips
        end, read, clips = -self.gap, list[_Clip](), iter(clips)
        for clip in clips:
            read.append(clip)
            end += self.gap + _units(clip, width)
            if end > self.units:
                return self, itertools.chain(read, clips)
        length = round_up(end, 1 << max(0, end.bit_length() - 4))
        return (dataclasses.replace(self, length=length, context=0) if 0 < length < self.length else self), read

    def replicated(self, model: SNAC) -> SNAC:
        """The model on every device of the mesh; where it is, without one."""
        return model if self.mesh is None else jax.device_put(model, NamedSharding(self.mesh, PartitionSpec()))

    def sharded(self, *arrays: Any) -> Any:
        """Arrays with the rows in front divided among the devices."""
        if self.mesh is None:
            return arrays
        return jax.device_put(arrays, NamedSharding(self.mesh, PartitionSpec(self.mesh.axis_names)))


def _latent_frames_seen(model: SNAC) -> tuple[Fraction, Fraction]:
    """Receptive fields in latent frames: of the encoder or decoder, and the largest of a single layer."""
    whole = single = Fraction(0)
    for coder, rate in ((model.encoder, Fraction(model.config.hop_length)), (model.decoder, Fraction(1))):
        whole = max(whole, receptive_field([coder]) / rate)
        for layer in flatten([coder]):
            single = max(single, layer.receptive_field / rate)
            rate *= layer.output_ratio
    return whole, single


# A clip's arrays, each with a whole number of values for each unit (the last may be cut short), and its samples.
_Clip = tuple[Sequence[np.ndarray], int | None]


def _units(clip: _Clip, width: int) -> int:
    return math.ceil(len(clip[0][0]) / width)


class _Result:
    """What comes out for one clip, filled in as its rows come. `start` and `end` are units of the tape."""

    def __init__(self, start: int, units: int, samples: int | None):
        self.start, self.end, self.samples = start, start + units, samples
        self.arrays: list[np.ndarray] = []

    def fill(self, outputs: Sequence[np.ndarray], begin: int, end: int) -> None:
        """Takes its part of what came out for the tape from `begin` to `end`, each (units, width)."""
        if not self.arrays:
            self.arrays = [np.empty((self.end - self.start, *x.shape[1:]), x.dtype) for x in outputs]
        low, high = max(self.start, begin), min(self.end, end)
        for array, output in zip(self.arrays, outputs, strict=True):
            array[low - self.start : high - self.start] = output[low - begin : high - begin]


def _through_rows(
    run: Callable[..., Sequence[Array]],
    clips: Iterable[_Clip],
    widths: Sequence[int],
    dtype: type[np.generic],
    layout: _Layout,
) -> Iterator[tuple[list[np.ndarray], int | None]]:
    """What `run` makes of each clip's arrays, and its samples; `widths` are the arrays' values for each unit.

    `run` takes the number in its clip of each unit, (rows, length), -1 outside of clips, and the arrays' values there,
    (rows, length * width).
    """
    layout, clips = layout.fitted(clips, widths[0])
    waiting: deque[_Result] = deque()
    computing = (run(*batch) for batch in _batches(clips, widths, dtype, layout, waiting))
    # One batch ahead, so that the device computes while the host takes a result and lays out the next.
    for i, (outputs, _) in enumerate(itertools.pairwise(itertools.chain(computing, [None]))):
        begin, end = i * layout.units, (i + 1) * layout.units
        inner = [_without_context(np.asarray(output), layout) for output in outputs or ()]
        while waiting and waiting[0].start < end:
            waiting[0].fill(inner, begin, end)
            if waiting[0].end > end:
                break
            done = waiting.popleft()
            yield [array.reshape(-1) for array in done.arrays], done.samples


def _without_context(output: np.ndarray, layout: _Layout) -> np.ndarray:
    """(units, width) of the tape, from rows (rows, length * width)."""
    by_unit = output.reshape(layout.rows, layout.length, -1)
    return by_unit[:, layout.context : layout.length - layout.context].reshape(layout.units, -1)


def _batches(
    clips: Iterable[_Clip],
    widths: Sequence[int],
    dtype: type[np.generic],
    layout: _Layout,
    waiting: deque[_Result],
) -> Iterator[list[np.ndarray]]:
    """Rows cut from the tape, as `run` takes them. Says in `waiting` where on the tape each clip lies."""
    size = layout.units + 2 * layout.context
    rows = np.arange(layout.rows)[:, None] * (layout.length - 2 * layout.context) + np.arange(layout.length)
    positions = np.full((size, 1), -1, np.int32)
    tape = [np.zeros((size, width), dtype) for width in widths]

    def cut() -> list[np.ndarray]:
        """The rows that are laid; moves what is context of the next ones to the front and clears the rest."""
        batch = [part[rows].reshape(layout.rows, -1) for part in (positions, *tape)]
        for part, empty in ((positions, -1), *((part, 0) for part in tape)):
            part[: 2 * layout.context] = part[layout.units :].copy()
            part[2 * layout.context :] = empty
        return batch

    at, begin = layout.context, -layout.context  # where the next unit goes, and where on the tape these ones begin
    for clip in clips:
        arrays, samples = clip
        count, done = _units(clip, widths[0]), 0
        waiting.append(_Result(begin + at, count, samples))
        while done < count:
            if at >= size:
                yield cut()
                at, begin = at - layout.units, begin + layout.units
            new = min(count - done, size - at)
            positions[at : at + new, 0] = np.arange(done, done + new)
            for part, array, width in zip(tape, arrays, widths, strict=True):
                values = array[done * width : (done + new) * width]
                part[at : at + new].reshape(-1)[: len(values)] = values
            at, done = at + new, done + new
        at += layout.gap
    while at - layout.gap > layout.context:  # until the last unit has been in a row, context not counted
        yield cut()
        at -= layout.units
