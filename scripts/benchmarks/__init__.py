"""The benchmarks of scripts/benchmark.py: one module per subcommand, and shared modules."""
