"""What is measured beside the package: each folder is a program, `python -m benchmarks.NAME`."""
