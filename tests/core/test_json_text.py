"""Anything that is no JSON is one kind of error."""

import pytest

from engine.core.json_text import parsed


def test_json_is_read_from_text_and_bytes():
    assert parsed('{"a": [1, null]}') == parsed(b'{"a": [1, null]}') == {"a": [1, None]}


@pytest.mark.parametrize("text", ["", "{", b"\xff\xfe\xff", "[" * 100_000, '{"a":' * 100_000])
def test_what_is_none_is_a_value_error(text: str | bytes):
    with pytest.raises(ValueError):
        parsed(text)
