"""Convert weights from Orbax to PyTorch: `snax convert --to-torch`."""

import sys

from snax.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "--to-torch", *sys.argv[1:]]))
