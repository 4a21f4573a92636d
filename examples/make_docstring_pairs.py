"""Write question-and-answer pairs from the docstrings of Python's own library: a data set that every machine has.

python examples/make_docstring_pairs.py data/docstrings
nybble preview --model MODEL --data data/docstrings
"""

from __future__ import annotations

import argparse
from pathlib import Path

from nybble.demo.docstrings import write_pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="gets train.jsonl and valid.jsonl")
    parser.add_argument("--validation-pairs", type=int, help="keep this many held-out pairs (default: all)")
    arguments = parser.parse_args()
    pairs = write_pairs(arguments.folder, arguments.validation_pairs)
    print(f"{len(pairs.train)} pairs to train on, {len(pairs.validation)} held out (no module is in both)")


if __name__ == "__main__":
    main()
