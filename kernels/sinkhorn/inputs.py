"""What calibration gives sinkhorn: random numbers, as they are."""
