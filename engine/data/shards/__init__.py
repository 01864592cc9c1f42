"""Images in tar archives: read where they lie, and packed."""
