"""Save and restore optimizers: in memory, and in files."""
