"""JSON from files that anybody may have written."""

import json
from typing import Any


def parsed(text: str | bytes) -> Any:
    """What the text says. Raises ValueError where it is no JSON, brackets in brackets without end included."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
