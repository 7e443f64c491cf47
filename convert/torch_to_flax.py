"""Convert weights from PyTorch to Orbax: `snax convert`."""

import sys

from snax.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
