"""`accelerate launch recipes/evaluate.py --config …`: the same as `lowrank-ft evaluate`."""

import sys

from lowrank_ft.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
