"""snax: the SNAC neural audio codec in JAX."""

from . import tokens as tokens
from .codec.config import SNACConfig as SNACConfig
from .codec.model import SNAC as SNAC
from .data.token_shards import open_tokens as open_tokens
from .inference.packing import EncodedClip as EncodedClip
from .inference.packing import decode_many as decode_many
from .inference.packing import encode_many as encode_many
from .inference.streaming import StreamDecoder as StreamDecoder
from .inference.streaming import StreamEncoder as StreamEncoder
from .weights.checkpoint import save as save
from .weights.pretrained import load as load
