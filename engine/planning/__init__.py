"""What a run will cost on GPUs that are not here: a step is counted, its time modelled, the bill made of both."""
