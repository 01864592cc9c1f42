"""The reader of tars gives what Python's own gives of good archives, and refuses what that one takes or passes over."""

import io
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.errors import BadInput
from engine.data.shards.tar import Archive, Member
from tests.data.corpus import HOSTILE_TARS, forged, tar_bytes

PARTS = st.text("abé .%\udc80", min_size=1, max_size=60).filter(lambda part: part not in (".", ".."))
NAMES = st.lists(PARTS, min_size=1, max_size=6).map("/".join)
FORMS = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


def listed(content: bytes, path: Path, start: int = 0, end: int | None = None) -> list[Member]:
    path.write_bytes(content)
    file = os.open(path, os.O_RDONLY)
    try:
        return list(Archive(file, str(path), start, end).members())
    finally:
        os.close(file)


def by_tarfile(content: bytes) -> list[Member]:
    with tarfile.open(fileobj=io.BytesIO(content), errors="surrogateescape") as tar:
        return [
            Member(member.name.removeprefix("./"), member.offset_data, member.size) for member in tar if member.isreg()
        ]


@settings(max_examples=60)
@given(files=st.dictionaries(NAMES, st.integers(0, 1500).map(bytes), max_size=6), form=FORMS, folder=st.booleans())
def test_it_lists_what_python_lists(tmp_path_factory, files, form, folder):
    files = {name: content for name, content in files.items() if name.removeprefix("./")}
    if len({name.removeprefix("./") for name in files}) < len(files):
        return
    try:
        content = tar_bytes(files, form)
    except ValueError:  # a name too long for ustar, in bytes it cannot cut
        form = tarfile.GNU_FORMAT
        content = tar_bytes(files, form)
    if folder:
        content = tar_bytes({"z": b""}, form, type=tarfile.DIRTYPE)[:512] + content
    assert listed(content, tmp_path_factory.getbasetemp() / "any.tar") == by_tarfile(content)


def test_a_tar_within_a_file_is_listed_alone(tmp_path):
    inner = tar_bytes({"a.jpg": b"one", "b.jpg": b"three"})
    found = listed(b"before" + inner + b"behind", tmp_path / "x", 6, 6 + len(inner))
    assert [(member.name, member.size) for member in found] == [("a.jpg", 3), ("b.jpg", 5)]
    whole = (tmp_path / "x").read_bytes()
    assert [whole[member.start :][: member.size] for member in found] == [b"one", b"three"]
    with pytest.raises(BadInput, match="is torn"):
        listed(whole, tmp_path / "x", 6, 6 + 1024)


def test_sizes_beyond_octal_digits_and_of_pax_are_understood(tmp_path):
    content = tar_bytes({"a.jpg": b"12345"})
    binary = forged(content, 124, b"\x80" + bytes(10) + b"\x05")
    assert listed(binary, tmp_path / "x") == listed(content, tmp_path / "x") == by_tarfile(binary)
    by_pax = tar_bytes({"a.jpg": b"12345"}, tarfile.PAX_FORMAT, pax_headers={"size": "5", "comment": "x"})
    header = by_pax.index(b"a.jpg\0")  # of the member, whose own size now says nothing
    assert listed(forged(by_pax, 124, b"0" * 11 + b"\0", header), tmp_path / "x")[0].size == 5


@pytest.mark.parametrize("name", HOSTILE_TARS)
def test_hostile_archives_are_refused_by_name(tmp_path, name):
    content, sentence = HOSTILE_TARS[name]
    with pytest.raises(BadInput) as caught:
        listed(content, tmp_path / "shard.tar")
    told = str(caught.value)
    assert told.startswith(str(tmp_path / "shard.tar")) and sentence in told and "\n" not in told and len(told) < 500


@settings(max_examples=150)
@given(data=st.data())
def test_no_damage_gives_anything_but_a_listing_or_a_sentence(tmp_path_factory, data):
    """Nor a member that lies outside the file, nor one that was not there."""
    form = data.draw(FORMS)
    whole = tar_bytes({"a/one.jpg": bytes(700), "x" * 120 + "/é.jpg": b"12", "c.cls": b"3"}, form)
    place, value = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 255))
    damaged = whole[:place] + bytes([value]) + whole[place + 1 :]
    damaged = damaged[: data.draw(st.sampled_from([len(whole), place]))]
    try:
        found = listed(damaged, tmp_path_factory.getbasetemp() / "damaged.tar")
    except BadInput:
        return
    assert len(found) == 3 and all(0 <= member.start <= member.start + member.size <= len(damaged) for member in found)
