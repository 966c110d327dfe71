"""Take the steps of an optimizer on a GPU."""
