"""Run the steps of an optimizer: on the host, in mapped files, on a GPU."""
