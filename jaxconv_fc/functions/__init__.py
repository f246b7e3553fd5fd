"""Any JAX function: its convolutions, and its matrix."""
