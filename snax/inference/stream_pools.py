"""Decode or encode many independent streams at once."""

from fractions import Fraction
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int16, Int32, PRNGKeyArray

from ..codec.inputs import checked_audio, checked_codes
from ..codec.model import SNAC
from .pool import Pool, PoolStream
from .steps import decode_step, decoder_widths, encode_step, encoder_widths
from .streaming import decoder_latency


class StreamPool(Pool[Float[np.ndarray, " samples"] | Int16[np.ndarray, " samples"]]):
    """Decode many streams that open, advance and end independently. The samples of each equal those of `SNAC.decode`.

        pool = snax.StreamPool(model, slots=16)
        stream = pool.open()
        stream.feed(codes)                 # for each level (frames / stride,)
        stream.end()
        for stream, audio, last in pool.step().chunks:
            ...

    A step decodes one block of codes (`config.pad_multiple` samples, 85 ms at 24 kHz) of each stream that has one. It
    always computes all slots, and only the first step compiles.

    Args:
        model: the codec.
        slots: number of streams that can be open at the same time. A multiple of the number of devices.
        dtype: of the audio. int16 audio is clipped and rounded on the device.
        noise: whether each stream has the noise of a key. Without it, decoding is slightly faster.
        mesh: the devices to divide the slots among, over all axes of the mesh. Default: JAX's default device.

    Raises:
        ValueError: if `slots` is invalid, or if the model cannot stream.
    """

    def __init__(
        self,
        model: SNAC,
        slots: int,
        *,
        dtype: Literal["float32", "int16"] = "float32",
        noise: bool = False,
        mesh: Mesh | None = None,
    ):
        super().__init__(model, slots, decode_step, decoder_widths(model.config), np.int32, dtype, mesh)
        if noise:
            self._keys = np.zeros((slots, *jax.random.key_data(jax.random.key(0)).shape), np.uint32)

    def open(self, *, key: PRNGKeyArray | None = None, lookahead: int | None = None) -> PoolStream[Any]:
        """Open a stream in a free slot.

        Args:
            key: the key of the noise, as in `SNAC.decode`.
            lookahead: as in `StreamDecoder`. Default: the decoder's receptive field. While a stream has less, a step
                takes several times as long for all streams.

        Raises:
            PoolFullError: if no slot is free.
            ValueError: if `lookahead` is invalid, or `key` is not given exactly if the pool has noise.
        """
        if (key is None) != (self._keys is None):
            raise ValueError(
                f"`key` must {'not be given, because the pool has no noise' if key is not None else 'be given'}. "
                "`StreamPool(..., noise=True)` gives each stream the noise of its key."
            )
        key_data = None if key is None else np.asarray(jax.random.key_data(key))
        if key_data is not None and self._keys is not None and key_data.shape != self._keys.shape[1:]:
            raise ValueError("`key` must be one key of JAX's default implementation.")
        latency = decoder_latency(self._config, self._delay, lookahead)
        return self._open(Fraction(latency, self._config.pad_multiple), key_data)

    def _check(self, values: Any) -> list[np.ndarray]:
        codes = [np.asarray(level)[None] for level in values]
        if len(codes) == len(self._widths) and not any(level.size for level in codes):
            return [np.zeros(0, np.int32) for _ in codes]
        with checked_codes(codes, self._config):
            return [level[0].astype(np.int32) for level in codes]

    def _padding(self, pending: int) -> list[np.ndarray]:
        if frames := pending % self._widths[0] * self._config.vq_strides[0]:
            raise ValueError(
                f"The stream ends {frames} latent frames into an attention window of {self._config.attn_window_size}. "
                "Feed codes for the whole window before `end`."
            )
        return [np.zeros(0, np.int32) for _ in self._widths]

    def _output(self, values: list[np.ndarray]) -> np.ndarray:
        return values[0]


class StreamEncoderPool(Pool[tuple[Int32[np.ndarray, " _"], ...]]):
    """Encode many streams that open, advance and end independently. The codes of each equal those of `SNAC.encode`.

    Used like `StreamPool`. `feed` takes audio, (samples,), and the output is one (frames / stride,) array per level.

    Args:
        model: the codec.
        slots: as in `StreamPool`.
        mesh: as in `StreamPool`.

    Raises:
        ValueError: if `slots` is invalid, or if the model cannot stream.
    """

    def __init__(self, model: SNAC, slots: int, *, mesh: Mesh | None = None):
        super().__init__(model, slots, encode_step, encoder_widths(model.config), np.float32, "int32", mesh)

    def open(self) -> PoolStream[Any]:
        """Open a stream in a free slot.

        Raises:
            PoolFullError: if no slot is free.
        """
        return self._open(self._delay)

    def _check(self, values: Any) -> list[np.ndarray]:
        with checked_audio(values[None, None]):
            return [np.asarray(values, np.float32)]

    def _padding(self, pending: int) -> list[np.ndarray]:
        return [np.zeros(-pending % self._config.pad_multiple, np.float32)]

    def _output(self, values: list[np.ndarray]) -> tuple[np.ndarray, ...]:
        return tuple(values)
