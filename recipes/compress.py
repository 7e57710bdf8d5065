"""`accelerate launch recipes/compress.py --config …`: the same as `lowrank-ft compress`."""

import sys

from lowrank_ft.cli import main

if __name__ == "__main__":
    main(["compress", *sys.argv[1:]])
