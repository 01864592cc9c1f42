"""Parts that may be left out, where a test expects none to be."""

from engine.core.extras import Extras


def _fail(line: str) -> None:
    raise AssertionError(line)


STRICT = Extras(_fail)
