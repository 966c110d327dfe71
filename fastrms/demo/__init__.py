"""The demo: one network, trained with two optimizers on the same batches, and compared."""
