"""Times the operators: `python -m tcal_compiler.kernels.bench --help`."""
