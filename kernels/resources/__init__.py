"""What kernels ask of a chip that need not be there, from their machine code; `python -m kernels.resources` prints it."""
