"""PyTorch checkpoint of a SNAC -> Orbax directory.

  python convert/torch_to_flax.py                   snac_24khz, into the cache that snax.load reads
  python convert/torch_to_flax.py SOURCE OUT        any other, into a new folder

--verify needs torch and the reference, `pip install torch snac`; nothing else does.
"""

import argparse
import sys
from pathlib import Path

import snax
from snax.weights import pretrained, torch_files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "source",
        nargs="?",
        default="snac_24khz",
        metavar="SOURCE",
        help="a published name, a hub id, a folder with config.json and pytorch_model.bin or model.safetensors, "
        "or such a weights file",
    )
    parser.add_argument(
        "out", nargs="?", metavar="OUT", help="a new folder; default, for a SOURCE on the hub: the cache"
    )
    parser.add_argument("--config", type=Path, help="default: the config.json beside the weights")
    parser.add_argument("--revision", help="commit, tag or branch of a SOURCE on the hub")
    parser.add_argument("--verify", action="store_true", help="compare with the reference on the same weights")
    args = parser.parse_args()
    try:
        weights_path, config_path = find(args.source, args.config, args.revision)
        if args.out is not None:
            snax.save(torch_files.read_model(weights_path, config_path), args.out)
        elif not Path(args.source).exists():
            args.out = pretrained.converted(args.source, args.revision)
        else:
            raise ValueError(f"OUT is missing: {args.source} is a path, so it has no place in the cache.")
        print(f"{args.source} -> {args.out}")
        if args.verify:
            import verify  # and with it the reference

            differences = verify.compare_files(snax.load(args.out), weights_path, config_path)
            print(verify.table(differences))
            sys.exit(not verify.faithful(differences))
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


def find(source: str, config_path: Path | None, revision: str | None) -> tuple[Path, Path]:
    """The weights and the configuration of SOURCE."""
    path = Path(source)
    if not path.exists():
        return pretrained.download(source, revision)
    weights_path = torch_files.find_weights(path) if path.is_dir() else path
    if weights_path is None:
        raise ValueError(f"{path} has neither {torch_files.SAFETENSORS_NAME} nor {torch_files.PICKLE_NAME}.")
    return weights_path, config_path or weights_path.with_name(torch_files.CONFIG_NAME)


if __name__ == "__main__":
    main()
