"""snax: the SNAC neural audio codec in JAX."""

from . import tokens as tokens
from .checkpoint import save as save
from .config import SNACConfig as SNACConfig
from .model import SNAC as SNAC
from .packing import EncodedClip as EncodedClip
from .packing import decode_many as decode_many
from .packing import encode_many as encode_many
from .pretrained import load as load
from .streaming import StreamDecoder as StreamDecoder
from .streaming import StreamEncoder as StreamEncoder
from .token_source import open_tokens as open_tokens
