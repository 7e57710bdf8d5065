"""One file for each suite; a file here is a suite as soon as it defines ``SUITE``."""
