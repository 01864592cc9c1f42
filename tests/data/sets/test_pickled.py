"""Nothing that a pickle names is run, and what CIFAR's pickles hold comes back exactly."""

import os
import pickle
import re
import struct
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from engine.core.errors import BadInput
from engine.data.sets import pickled
from tests.data.published import python2

IMAGES = np.random.default_rng(0).integers(0, 256, (4, 3072), np.uint8)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("dtype", ["u1", "<i2", ">i8", "f4", "?"])
def test_python_3_pickles_come_back(protocol, dtype):
    array = np.asfortranarray(IMAGES.astype(dtype))
    found = pickled.load(pickle.dumps({b"data": array, b"labels": [3, 1], b"n": 4}, protocol), "file")
    assert found[b"data"].dtype == array.dtype
    assert np.array_equal(found[b"data"], array)
    assert (found[b"labels"], found[b"n"]) == ([3, 1], 4)


def test_python_2_strings_are_bytes():
    value = {b"data": IMAGES, b"labels": [0, 9], b"filenames": [b"caf\xe9.png", b"x" * 300]}
    data = python2(value)
    found, known = pickled.load(data, "file"), pickle.loads(data, encoding="bytes")
    assert np.array_equal(found.pop(b"data"), IMAGES)
    assert np.array_equal(known.pop(b"data"), IMAGES)
    assert found == known == {b"labels": [0, 9], b"filenames": [b"caf\xe9.png", b"x" * 300]}


class Calls:
    """Pickles as a call, which unpickling carries out."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile(proof: str) -> dict[str, tuple[object, str]]:
    """{what: (a value whose plain unpickling runs something, or gives what CIFAR has not; what is refused)}."""
    touch = Calls(os.system, f"touch {proof}")
    return {
        "system": (touch, "posix.system"),
        "eval": (Calls(eval, f"open({proof!r}, 'w')"), "eval"),
        "inside a list": ({b"labels": [1, 2, [touch]]}, "posix.system"),
        "as an argument": (Calls(np.dtype, touch), "posix.system"),
        "as a name": (Calls(getattr, Calls(__import__, "os"), "system"), "getattr"),
        "another class": ({b"data": OrderedDict(a=1)}, "collections.OrderedDict"),
        "objects": ({b"data": np.array([1, None, touch], object)}, "posix.system|array of type 'O8'"),
        "harmless objects": ({b"data": np.array([1, None, "x"], object)}, "array of type 'O8'"),
        "fields": ({b"data": np.zeros(2, [("x", "u1")])}, "array of type 'V1'"),
        "text": ({b"data": np.array(["x"])}, "array of type 'U1'"),
        "a subclass": ({b"data": np.ma.zeros(2)}, "numpy.ma"),
        "a scalar": ({b"data": np.uint8(3)}, "multiarray.scalar"),
    }


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("what", hostile(""))
def test_what_is_no_array_is_refused_and_nothing_runs(what, protocol, tmp_path):
    proof = tmp_path / "ran"
    value, refused = hostile(str(proof))[what]
    data = pickle.dumps(value, protocol)
    with pytest.raises(BadInput, match=r"dir/batch is refused: it asks for .*, and only numpy arrays") as caught:
        pickled.load(data, "dir/batch")
    assert re.search(refused, str(caught.value))
    assert not proof.exists()


def test_the_hostile_pickles_do_run_where_nothing_holds_them(tmp_path):
    proof = tmp_path / "ran"
    pickle.loads(pickle.dumps(hostile(str(proof))["inside a list"][0], 2))
    assert proof.exists()


def array_of(shape: bytes, raw: bytes = b"U\x01x", code: bytes = b"u1") -> bytes:
    """A dict with one array, as opcodes: what it declares need not fit what it holds."""
    kind = b"cnumpy\ndtype\nU\x02" + code + b"K\x00K\x01\x87R(K\x03U\x01|NNNK\x00K\x00K\x00tb"
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    return b"\x80\x02}U\x04data" + made + b"(K\x01" + shape + kind + b"\x89" + raw + b"tbs."


GIANT = b"J" + struct.pack("<i", 2**30)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (array_of(b"K\x02\x85"), "an array of other size than its 1 bytes"),
        (array_of(b"(" + GIANT * 4 + b"t"), "an array of other size than its 1 bytes"),
        (array_of(b"(J\xff\xff\xff\xffJ\xff\xff\xff\xfft"), "an array without a shape"),
        (array_of(b"K\x01\x85", raw=b"](K\x01e"), "an array of objects"),
        (array_of(b"K\x01\x85", code=b"O8"), "an array of type 'O8'"),
        (b"\x80\x02}cnumpy\nndarray\n" + GIANT + b"\x85R.", "not callable"),
        (b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + GIANT + b"\x85U\x01b\x87R.", "none of numpy's own"),
        (b"\x80\x02}r\xff\xff\xff\x7f.", "place 2147483647 of a memo that holds"),
        (b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.", "no pickle that can be read"),
        (b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"}.", "no pickle that can be read"),
        (b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.", "no pickle that can be read"),
        (b"\x80\x05\x97.", "the operation NEXT_BUFFER"),
        (b"\x80\x02]q\x00(" + b"c_codecs\nencode\nX\xe8\x03\x00\x00" + b"a" * 1000 + b"q\x01X\x06\x00\x00\x00latin1q\x02\x86R"
         + b"c_codecs\nencode\nh\x01h\x02\x86R" * 50 + b"e.", "more bytes than it has"),
        (b"\x80\x02c_codecs\nencode\nU\x01xU\x03zip\x86R.", "the codec b'zip'"),
        (b"\x80\x02cnumpy\ndtype\nN}U\x11__setstate_cython__K\x01s\x86b.", "no pickle that can be read"),
        (b"\x80\x02c_codecs\nencode\nN}U\x03actK\x01s\x86b.", "a state for something that has none"),
        (b"ios\nsystem\n(S'x'\no.", "os.system"),
        (b"Pabc\n.", "the operation PERSID"),
        (b"\x82\x01.", "the operation EXT1"),
        (b"\x80\x02](K\x01e.", "holds no dict"),
        (python2({b"data": IMAGES})[:-200], "no pickle that can be read"),
        (b"", "no pickle that can be read"),
        (b"<html>not found</html>", "no pickle that can be read"),
    ],
)  # fmt: skip
def test_what_lies_about_its_size_or_is_damaged_is_refused(data, sentence):
    with pytest.raises(BadInput, match=r"^dir/batch is ") as caught:
        pickled.load(data, "dir/batch")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_refusal_leaves_nothing_behind(tmp_path: Path):
    with pytest.raises(BadInput):
        pickled.load(b"\x80\x02cnumpy.core.multiarray\n_reconstruct\nN}U\x03actK\x01s\x86b.", "x")
    assert np.array_equal(pickled.load(python2({b"data": IMAGES}), "x")[b"data"], IMAGES)
