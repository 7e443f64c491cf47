"""Soak tests, which run for hours: `python -m benchmarks.soak streaming|extraction|cluster|pool|serving [HOURS]`.

Each mode is a module with a function of the same name. Results and the memory over time go to benchmarks/soak.json.
"""

import argparse
import datetime
import importlib
import json
import sys
from pathlib import Path

from benchmarks.speed import machine

BENCHMARKS = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["streaming", "extraction", "cluster", "pool", "serving"])
    parser.add_argument("hours", type=float, nargs="?", default=1.0)
    options = parser.parse_args()
    sys.path.insert(0, str(BENCHMARKS.parent / "tests"))
    result = getattr(importlib.import_module(f"benchmarks.soak.{options.mode}"), options.mode)(3600 * options.hours)
    path = BENCHMARKS / "soak.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results[options.mode] = {"date": datetime.date.today().isoformat(), "device": machine()["device"], **result}
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results[options.mode], indent=1))


if __name__ == "__main__":
    main()
