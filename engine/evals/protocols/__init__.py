"""One file per protocol, found by its name; `engine.evals` says what is in it."""
