"""SNAC in JAX -> a folder that the reference loads: `snac.SNAC.from_pretrained(OUT)`.

Needs torch.
"""

import argparse
import sys

import snax
from snax.weights import torch_files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE", help="what snax.load takes: an Orbax directory, a name, a folder")
    parser.add_argument("out", metavar="OUT", help="a new folder")
    args = parser.parse_args()
    try:
        torch_files.write_folder(snax.load(args.source), args.out)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    print(f"{args.source} -> {args.out}")


if __name__ == "__main__":
    main()
