"""snax: the SNAC neural audio codec in JAX."""

from .checkpoint import save as save
from .config import SNACConfig as SNACConfig
from .model import SNAC as SNAC
from .pretrained import load as load
