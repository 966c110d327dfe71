"""Measure the throughput of kernels, and of whole training steps: `fastrms bench`."""
