"""What a run survives; see `benchmarks.faults.__main__`."""
