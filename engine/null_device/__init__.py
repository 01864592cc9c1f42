"""A CUDA device that computes nothing: torch's own CUDA code runs over it, and what it is asked for is written down."""
