"""What all rooms use: optimisers and schedules, random choices, masks, ranks, durable files, errors, flags, pictures."""
