"""One run: its settings, what it is made of, its loop and step, its state and what it leaves to read."""
