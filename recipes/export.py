"""`accelerate launch recipes/export.py --config …`: the same as `lowrank-ft export`."""

import sys

from lowrank_ft.cli import main

if __name__ == "__main__":
    main(["export", *sys.argv[1:]])
