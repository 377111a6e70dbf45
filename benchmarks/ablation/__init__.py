"""Training runs that differ in a few fields of one recipe, over seeds: see `python -m benchmarks.ablation --help`."""
