"""`accelerate launch recipes/finetune.py --config …`: the same as `lowrank-ft finetune`."""

import sys

from lowrank_ft.cli import main

if __name__ == "__main__":
    main(["finetune", *sys.argv[1:]])
