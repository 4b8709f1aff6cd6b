"""The training experiments: networks, data, one run, and comparisons between runs."""
