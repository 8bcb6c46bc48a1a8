"""What scripts/benchmark.py measures: one module per subcommand, and what they share."""
