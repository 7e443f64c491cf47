"""Packing: clips of any length in rows of one fixed shape. Each clip gets the codes and the audio that it gets alone.

Clips are concatenated to one long sequence. Each clip is padded to whole blocks, and between two clips lies a gap that
is wider than the receptive field of any single layer. A padding mask marks the clips. Rows of a fixed length are cut
from the sequence, and overlap by the context that the network needs:

    sequence  | clip 0   | gap | clip 1                       | gap | clip 2     |
    row 0     [context |                     | context]
    row 1                          [context |                     | context]

A block is a pad multiple (`config.pad_multiple` samples). One compilation serves all lengths, and memory does not
depend on them.
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
    model = layout.replicate(model)

    def run(positions: np.ndarray, audio: np.ndarray) -> Sequence[Array]:
        return model._encode(*layout.shard(audio[:, None].astype(model.dtype), positions >= 0))

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
    model = layout.replicate(model)
    frames = np.arange(layout.block_frames)

    def run(positions: np.ndarray, *codes: np.ndarray) -> Sequence[Array]:
        frame_positions = positions[..., None] * layout.block_frames + frames
        frame_positions = frame_positions.reshape(len(positions), -1).astype(np.int32)
        codes, padding_mask, frame_positions = layout.shard(codes, positions >= 0, frame_positions)
        return [model._decode(codes, key, padding_mask, frame_positions)[:, 0]]

    checked = (check_clip_codes(*_as_encoded(clip), i, model.config) for i, clip in enumerate(clips))
    widths = [layout.block_frames // stride for stride in model.config.vq_strides]
    return (audio[:samples] for (audio,), samples in _through_rows(run, checked, widths, np.int32, layout))


def computed_blocks(model: SNAC, blocks: Sequence[int], mesh: Mesh | None = None) -> int:
    """Pad multiples that `encode_many` computes for clips of `blocks` pad multiples each, context and gaps included."""
    layout = _Layout.of(model, None, None, mesh)
    length = sum(blocks) + layout.gap * max(0, len(blocks) - 1)
    return math.ceil(length / layout.batch_stride) * layout.rows * layout.row_length


def _as_encoded(clip: EncodedClip | Sequence[np.ndarray | Array]) -> EncodedClip:
    return clip if isinstance(clip, EncodedClip) else EncodedClip(clip)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How rows are cut. Lengths are in blocks, the frames of a pad multiple."""

    block_frames: int
    rows: int
    row_length: int  # context included
    context: int  # to each side of a row
    gap: int  # between two clips
    mesh: Mesh | None
    fixed: bool  # whether clips that need less than one row get a whole one all the same

    @property
    def row_stride(self) -> int:
        """Blocks from the start of one row to the start of the next."""
        return self.row_length - 2 * self.context

    @property
    def batch_stride(self) -> int:
        """Blocks from the start of one batch of rows to the start of the next."""
        return self.rows * self.row_stride

    @classmethod
    def of(cls, model: SNAC, row_seconds: float | None, rows: int | None, mesh: Mesh | None) -> "_Layout":
        config = model.config
        check_cuttable(config)
        block_frames = config.pad_multiple // config.hop_length
        context, gap = (math.ceil(frames / block_frames) for frames in _receptive_fields(model))
        block_seconds = config.pad_multiple / config.sampling_rate
        row_length = ROW_CONTEXTS * context if row_seconds is None else round(row_seconds / block_seconds)
        if row_length <= 2 * context + gap:
            raise ValueError(
                f"row_seconds (={row_seconds}) must be at least {(2 * context + gap + 1) * block_seconds:.3f}: "
                f"a row has {context * block_seconds:.3f} s of context on both sides."
            )
        fixed = (row_seconds, rows, mesh) != (None, None, None)
        devices = 1 if mesh is None else mesh.size
        rows = devices if rows is None else rows
        if rows < 1 or rows % devices:
            raise ValueError(f"rows (={rows}) must be a multiple of the {devices} devices that share them.")
        return cls(block_frames, rows, row_length, context, gap, mesh, fixed)

    def fit(self, clips: Iterable["_Clip"], width: int) -> tuple["_Layout", Iterable["_Clip"]]:
        """The layout for these clips, a single shorter row if they all fit in one, and the clips."""
        if self.fixed:
            return self, clips
        end, read, clips = -self.gap, list[_Clip](), iter(clips)
        for clip in clips:
            read.append(clip)
            end += self.gap + _num_blocks(clip, width)
            if end > self.batch_stride:
                return self, itertools.chain(read, clips)
        row_length = round_up(end, 1 << max(0, end.bit_length() - 4))
        if 0 < row_length < self.row_length:
            return dataclasses.replace(self, row_length=row_length, context=0), read
        return self, read

    def replicate(self, model: SNAC) -> SNAC:
        """The model on every device of the mesh; where it is, without one."""
        return model if self.mesh is None else jax.device_put(model, NamedSharding(self.mesh, PartitionSpec()))

    def shard(self, *arrays: Any) -> Any:
        """Arrays with the rows in front divided among the devices."""
        if self.mesh is None:
            return arrays
        return jax.device_put(arrays, NamedSharding(self.mesh, PartitionSpec(self.mesh.axis_names)))


def _receptive_fields(model: SNAC) -> tuple[Fraction, Fraction]:
    """Receptive fields in latent frames: of the encoder or decoder, and the largest of a single layer."""
    whole = single = Fraction(0)
    for coder, rate in ((model.encoder, Fraction(model.config.hop_length)), (model.decoder, Fraction(1))):
        whole = max(whole, receptive_field([coder]) / rate)
        for layer in flatten([coder]):
            single = max(single, layer.receptive_field / rate)
            rate *= layer.output_ratio
    return whole, single


# A clip's arrays, each with a whole number of values for each block (the last may be cut short), and its samples.
_Clip = tuple[Sequence[np.ndarray], int | None]


def _num_blocks(clip: _Clip, width: int) -> int:
    return math.ceil(len(clip[0][0]) / width)


class _Result:
    """What comes out for one clip, filled in as its rows come. `start` and `end` are blocks of the sequence."""

    def __init__(self, start: int, blocks: int, samples: int | None):
        self.start, self.end, self.samples = start, start + blocks, samples
        self.arrays: list[np.ndarray] = []

    def fill(self, outputs: Sequence[np.ndarray], start: int, end: int) -> None:
        """Takes its part of what came out for the sequence from `start` to `end`, each (blocks, width)."""
        if not self.arrays:
            self.arrays = [np.empty((self.end - self.start, *x.shape[1:]), x.dtype) for x in outputs]
        low, high = max(self.start, start), min(self.end, end)
        for array, output in zip(self.arrays, outputs, strict=True):
            array[low - self.start : high - self.start] = output[low - start : high - start]


def _through_rows(
    run: Callable[..., Sequence[Array]],
    clips: Iterable[_Clip],
    widths: Sequence[int],
    dtype: type[np.generic],
    layout: _Layout,
) -> Iterator[tuple[list[np.ndarray], int | None]]:
    """What `run` makes of each clip's arrays, and its samples; `widths` are the arrays' values for each block.

    `run` takes the position in its clip of each block, (rows, row_length), -1 outside of clips, and the arrays' values
    there, (rows, row_length * width).
    """
    layout, clips = layout.fit(clips, widths[0])
    pending: deque[_Result] = deque()
    computing = (run(*batch) for batch in _batches(clips, widths, dtype, layout, pending))
    # One batch ahead, so that the device computes while the host takes a result and lays out the next.
    for i, (outputs, _) in enumerate(itertools.pairwise(itertools.chain(computing, [None]))):
        start, end = i * layout.batch_stride, (i + 1) * layout.batch_stride
        inner = [_without_context(np.asarray(output), layout) for output in outputs or ()]
        while pending and pending[0].start < end:
            pending[0].fill(inner, start, end)
            if pending[0].end > end:
                break
            done = pending.popleft()
            yield [array.reshape(-1) for array in done.arrays], done.samples


def _without_context(output: np.ndarray, layout: _Layout) -> np.ndarray:
    """(blocks, width) of the sequence, from rows (rows, row_length * width)."""
    by_block = output.reshape(layout.rows, layout.row_length, -1)
    return by_block[:, layout.context : layout.row_length - layout.context].reshape(layout.batch_stride, -1)


def _batches(
    clips: Iterable[_Clip],
    widths: Sequence[int],
    dtype: type[np.generic],
    layout: _Layout,
    pending: deque[_Result],
) -> Iterator[list[np.ndarray]]:
    """Rows cut from the sequence, as `run` takes them. Says in `pending` where in the sequence each clip lies."""
    size = layout.batch_stride + 2 * layout.context
    rows = np.arange(layout.rows)[:, None] * layout.row_stride + np.arange(layout.row_length)
    positions = np.full((size, 1), -1, np.int32)
    buffers = [np.zeros((size, width), dtype) for width in widths]

    def cut() -> list[np.ndarray]:
        """The rows that are laid; moves what is context of the next ones to the front and clears the rest."""
        batch = [buffer[rows].reshape(layout.rows, -1) for buffer in (positions, *buffers)]
        for buffer, empty in ((positions, -1), *((buffer, 0) for buffer in buffers)):
            buffer[: 2 * layout.context] = buffer[layout.batch_stride :].copy()
            buffer[2 * layout.context :] = empty
        return batch

    offset = layout.context  # in the buffers, where the next block goes
    buffer_start = -layout.context  # in the sequence
    for clip in clips:
        arrays, samples = clip
        num_blocks, written = _num_blocks(clip, widths[0]), 0
        pending.append(_Result(buffer_start + offset, num_blocks, samples))
        while written < num_blocks:
            if offset >= size:
                yield cut()
                offset, buffer_start = offset - layout.batch_stride, buffer_start + layout.batch_stride
            new = min(num_blocks - written, size - offset)
            positions[offset : offset + new, 0] = np.arange(written, written + new)
            for buffer, array, width in zip(buffers, arrays, widths, strict=True):
                values = array[written * width : (written + new) * width]
                buffer[offset : offset + new].reshape(-1)[: len(values)] = values
            offset, written = offset + new, written + new
        offset += layout.gap
    while offset - layout.gap > layout.context:  # until the last block has been in a row, context not counted
        yield cut()
        offset -= layout.batch_stride
