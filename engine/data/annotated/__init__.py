"""Sets whose images are annotated with more than a class: objects, masks, classes of pixels, videos; and what reads them."""
