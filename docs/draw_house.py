"""Draw how the library is built: its rooms, floors and arrows, from the imports themselves.

    python docs/draw_house.py --out docs/house.svg
    python docs/draw_house.py --inside accel --out docs/accel.svg
    python docs/draw_house.py --text
    python docs/draw_house.py --tree ../older-clone --text

A room is a folder or a single file, an arrow leads from a room to one that it imports, and
a room stands one floor above the highest room that it imports. ``--text`` prints the
counts of the whole house and of every folder, and the circles among the files.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from house.imports import PACKAGE, read_checkout
from house.picture import draw
from house.rooms import read_level
from house.table import table


def main() -> None:
    args = arguments()
    checkout = read_checkout(args.tree)
    if args.text:
        sys.stdout.write(table(checkout))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        draw(read_level(checkout, args.inside), args.out, PACKAGE)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = Path(__file__).resolve().parents[1]
    parser.add_argument("--tree", type=Path, default=here, help="the checkout to read")
    parser.add_argument("--inside", default="", help="draw the rooms of this folder")
    parser.add_argument("--out", type=Path, help="the picture to write: .svg, .png or .pdf")
    parser.add_argument("--text", action="store_true", help="print the counts")
    args = parser.parse_args()
    if not (args.out or args.text):
        parser.error("give --out, --text or both")
    args.inside = args.inside.strip("/")
    return args


if __name__ == "__main__":
    main()
