"""The conduct of a study, whichever it is: its grid of runs, their training side by side, judging, the report."""
