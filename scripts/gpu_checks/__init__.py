"""The checks of scripts/check_gpu.py: a module per subject, each with the rows that it adds to the table."""
