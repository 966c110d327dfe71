"""Train a network with the reference and with fastrms, side by side: `fastrms demo`."""
