"""snax: the SNAC neural audio codec in JAX.

The public names are listed in `__init__.pyi`. Their modules are imported on first use, so that `snax --help` does not
wait for JAX.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
