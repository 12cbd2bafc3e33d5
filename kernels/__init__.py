"""Device kernels for our own ops: one kernel, one file of the stem of its op."""
