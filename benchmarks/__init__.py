"""Measurements that can be repeated: each module is one command and writes its table under benchmarks/results/."""
