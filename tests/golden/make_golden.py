"""Write the golden numbers anew: `python -m tests.golden.make_golden [--folder PATH]`.

The files change only when the method does. It takes seconds with `OPENBLAS_NUM_THREADS=1`; threads
slow down products of this size.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from tests.golden.cases import CASES, FOLDER, compute, stored


def main() -> None:
    """Write one file per case, beside this one or into `--folder`."""
    folder = parse_folder()
    for name, case in CASES.items():
        arrays: dict[str, Any] = stored(list(compute(case)))
        np.savez_compressed(folder / f"{name}.npz", **arrays)


def parse_folder() -> Path:
    """Read the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=FOLDER)
    return parser.parse_args().folder


if __name__ == "__main__":
    main()
