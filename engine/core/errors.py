"""What goes wrong through input, and is the user's to mend."""


class BadInput(ValueError):
    """Input that cannot be used. The message is one sentence that names the valid choices; commands exit with status 2."""
