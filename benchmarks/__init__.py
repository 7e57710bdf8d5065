"""What this package costs and what it is good for, beside its peers: ``python -m benchmarks list``."""
