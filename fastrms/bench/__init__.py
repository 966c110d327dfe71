"""The throughput benchmark: one optimizer step beside the roofline, and whole training steps (`fastrms bench`)."""
