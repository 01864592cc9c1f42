"""How an op's implementations are proved and timed on the device at hand; `kernels.calibrate` is the command."""
