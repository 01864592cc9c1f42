"""Names in one block are the strings that went in, one by one and all together."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.data import names
from engine.data.names import Names

WORDS = st.lists(st.text("aé/\udc80\n𝄞", max_size=8), max_size=12)


@given(words=WORDS, other=WORDS, part=st.integers(1, 5))
def test_they_are_the_list_that_went_in(words, other, part):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(names, "PART", part)
        found = Names.of(iter(words))
        assert list(found) == words and found == words and found == Names.of(words) and len(found) == len(words)
        assert (
            [found[place] for place in range(len(words))]
            == words
            == [found[place - len(words)] for place in range(len(words))]
        )
        assert found[1:7:2] == words[1:7:2]
        assert (found == other) == (words == other) == (found == Names.of(other))
        assert [word in found for word in other] == [word in words for word in other]
        with pytest.raises(IndexError):
            found[len(words)]
