"""Packing: clips of any length in rows of one fixed shape. Each clip gets the result it would get alone.

Clips are concatenated to one sequence, with gaps at least as long as the receptive field of the widest layer. A padding
mask is True at clips and False at gaps. Rows of one fixed length are cut from the sequence. They overlap by the context
that the network needs:

    sequence  | clip 0   | gap | clip 1                       | gap | clip 2     |
    row 0     [context |                     | context]
    row 1                          [context |                     | context]

Lengths are in blocks of `config.pad_multiple` samples, and each clip is padded to whole blocks. One compilation serves
all clips, and memory does not depend on their lengths.
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

# The default row length, as a multiple of the context on one side. 2 % of the audio is computed twice. Rows are 25.6 s
# long at 24 kHz. Longer rows save little. Shorter rows save less memory than the model's weights take.
ROW_CONTEXTS = 100


class EncodedClip(NamedTuple):
    """The codes of one clip, one (frames / stride,) array per level, and its length in samples if known."""

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
    """Encode clips of any length.

    If `row_seconds`, `rows` and `mesh` are all None and the clips fit in one row, the row is only as long as the clips.
    Its length is rounded up to four significant bits, so that few lengths are compiled.

    Args:
        model: the codec.
        clips: mono audio, (samples,) each. Read lazily, so a generator can load files.
        row_seconds: length of a row. Default: 100 times the context on one side, 25.6 s at 24 kHz. Longer rows take
            more memory. Shorter rows compute more audio twice.
        rows: rows per batch. Default: one per device of the mesh.
        mesh: the devices to divide the rows among, over all axes of the mesh. Default: JAX's default device.

    Yields:
        The codes of each clip, in order. They equal those of `model.encode(clip[None, None])`.

    Raises:
        ValueError: if a clip is not finite mono audio (raised when the clip is reached), if rows are too short, or if
            `rows` is not a multiple of the number of devices.
    """
    layout = _Layout.create(model, row_seconds, rows, mesh)
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
    """Decode clips of any length.

    Args:
        model: the codec.
        clips: the results of `encode_many`, or codes, one (frames / stride,) array per level.
        key: the key of the noise. Each clip gets the noise of `model.decode(codes, key=key)`. Default: no noise.
        row_seconds: as in `encode_many`.
        rows: as in `encode_many`.
        mesh: as in `encode_many`.

    Yields:
        The audio of each clip, (samples,), in order. It equals that of `model.decode`. For an `EncodedClip` with a
        length, it is trimmed to this length.

    Raises:
        ValueError: if codes are invalid (raised when they are reached), or rows are invalid as in `encode_many`.
    """
    layout = _Layout.create(model, row_seconds, rows, mesh)
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
    """Return the number of blocks that `encode_many` computes for clips of these lengths, with context and gaps."""
    layout = _Layout.create(model, None, None, mesh)
    length = sum(blocks) + layout.gap * max(0, len(blocks) - 1)
    return math.ceil(length / layout.batch_stride) * layout.rows * layout.row_length


def _as_encoded(clip: EncodedClip | Sequence[np.ndarray | Array]) -> EncodedClip:
    return clip if isinstance(clip, EncodedClip) else EncodedClip(clip)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Geometry of the rows. Lengths are in blocks."""

    block_frames: int  # latent frames per block
    rows: int  # per batch
    row_length: int  # with the context on both sides
    context: int  # on each side of a row
    gap: int  # between two clips
    mesh: Mesh | None
    fixed: bool  # False: `fit` may shorten the row

    @property
    def row_stride(self) -> int:
        """Blocks from the start of one row to the start of the next."""
        return self.row_length - 2 * self.context

    @property
    def batch_stride(self) -> int:
        """Blocks from the start of one batch of rows to the start of the next."""
        return self.rows * self.row_stride

    @classmethod
    def create(cls, model: SNAC, row_seconds: float | None, rows: int | None, mesh: Mesh | None) -> "_Layout":
        config = model.config
        check_cuttable(config)
        block_frames = config.pad_multiple // config.hop_length
        context, gap = (math.ceil(frames / block_frames) for frames in _receptive_fields(model))
        block_seconds = config.pad_multiple / config.sampling_rate
        row_length = ROW_CONTEXTS * context if row_seconds is None else round(row_seconds / block_seconds)
        if row_length <= 2 * context + gap:
            raise ValueError(
                f"`row_seconds` (={row_seconds}) must be at least {(2 * context + gap + 1) * block_seconds:.3f}, "
                f"because a row has {context * block_seconds:.3f} s of context on each side."
            )
        fixed = (row_seconds, rows, mesh) != (None, None, None)
        devices = 1 if mesh is None else mesh.size
        rows = devices if rows is None else rows
        if rows < 1 or rows % devices:
            raise ValueError(f"`rows` (={rows}) must be a positive multiple of the number of devices, {devices}.")
        return cls(block_frames, rows, row_length, context, gap, mesh, fixed)

    def fit(self, clips: Iterable["_Clip"], width: int) -> tuple["_Layout", Iterable["_Clip"]]:
        """Return a layout of a single shorter row if all clips fit in it, or this layout; and the clips."""
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
        """Copy the model to every device of the mesh, if there is one."""
        return model if self.mesh is None else jax.device_put(model, NamedSharding(self.mesh, PartitionSpec()))

    def shard(self, *arrays: Any) -> Any:
        """Divide the rows of arrays, their first axis, among the devices."""
        if self.mesh is None:
            return arrays
        return jax.device_put(arrays, NamedSharding(self.mesh, PartitionSpec(self.mesh.axis_names)))


def _receptive_fields(model: SNAC) -> tuple[Fraction, Fraction]:
    """Return the receptive field of the encoder or decoder and of the widest layer, in latent frames."""
    whole = single = Fraction(0)
    for coder, rate in ((model.encoder, Fraction(model.config.hop_length)), (model.decoder, Fraction(1))):
        whole = max(whole, receptive_field([coder]) / rate)
        for layer in flatten([coder]):
            single = max(single, layer.receptive_field / rate)
            rate *= layer.output_ratio
    return whole, single


# The arrays of a clip (audio, or codes per level) and its length in samples. The last block may be incomplete.
_Clip = tuple[Sequence[np.ndarray], int | None]


def _num_blocks(clip: _Clip, width: int) -> int:
    return math.ceil(len(clip[0][0]) / width)


class _Result:
    """The outputs of one clip, which lies at blocks `start` to `end` of the sequence. Filled batch by batch."""

    def __init__(self, start: int, blocks: int, samples: int | None):
        self.start, self.end, self.samples = start, start + blocks, samples
        self.arrays: list[np.ndarray] = []

    def fill(self, outputs: Sequence[np.ndarray], start: int, end: int) -> None:
        """Copy this clip's part of the outputs of blocks `start` to `end` of the sequence, each (blocks, width)."""
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
    """Apply `run` to clips in packed rows. Yields the outputs of each clip and its length in samples.

    Args:
        run: takes the position of each block in its clip, (rows, row_length), -1 in gaps, and one
            (rows, row_length * width) array for each of a clip's arrays.
        clips: the arrays and the length of each clip.
        widths: values per block of each of a clip's arrays.
        dtype: of these arrays.
        layout: the geometry of the rows.
    """
    layout, clips = layout.fit(clips, widths[0])
    pending: deque[_Result] = deque()
    computing = (run(*batch) for batch in _batches(clips, widths, dtype, layout, pending))
    # One batch ahead: the device computes it while the host copies the last results and packs the next batch.
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
    """Remove the context of rows, (rows, row_length * width), and return (blocks, width)."""
    by_block = output.reshape(layout.rows, layout.row_length, -1)
    return by_block[:, layout.context : layout.row_length - layout.context].reshape(layout.batch_stride, -1)


def _batches(
    clips: Iterable[_Clip],
    widths: Sequence[int],
    dtype: type[np.generic],
    layout: _Layout,
    pending: deque[_Result],
) -> Iterator[list[np.ndarray]]:
    """Yield the arguments of `run` for each batch of rows. Append each clip's place in the sequence to `pending`."""
    size = layout.batch_stride + 2 * layout.context
    rows = np.arange(layout.rows)[:, None] * layout.row_stride + np.arange(layout.row_length)
    positions = np.full((size, 1), -1, np.int32)
    buffers = [np.zeros((size, width), dtype) for width in widths]

    def cut() -> list[np.ndarray]:
        """Cut the rows of a batch. Keep the overlap with the next batch at the start of the buffers, clear the rest."""
        batch = [buffer[rows].reshape(layout.rows, -1) for buffer in (positions, *buffers)]
        for buffer, empty in ((positions, -1), *((buffer, 0) for buffer in buffers)):
            buffer[: 2 * layout.context] = buffer[layout.batch_stride :].copy()
            buffer[2 * layout.context :] = empty
        return batch

    offset = layout.context  # of the next block in the buffers
    buffer_start = -layout.context  # of the buffers in the sequence
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
    while offset - layout.gap > layout.context:  # until a row has the last block outside its context
        yield cut()
        offset -= layout.batch_stride
