"""Any bytes given to a reader are read or refused in a sentence, soon, and with little memory."""

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky

from engine.core.errors import BadInput
from tests.faults.readers import Reader
from tests.faults.results import Part
from tests.faults.runs import Verdict

SECONDS, MIB = 10.0, 96.0  # of a processor, and resident, for a few KiB: a MATLAB file of structs may unpack to 64 MiB
NUMBERS = [0, 1, -1, 255, 2**31, 2**32 - 1, 2**63, -(2**63), 10**30, 1e308, float("nan"), float("inf"), 0.5]
DEEP = 20_000  # brackets in brackets
TEXTS = st.text(max_size=8) | st.sampled_from(["../x", "/etc/passwd", "a\0b", "\ud800"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.sampled_from(NUMBERS) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


class Bounds(AssertionError):
    """It took too long, or too much memory, or raised what it may not."""


@st.composite
def damaged(draw: Callable, reader: Reader) -> bytes:
    """A sample with a few bytes changed, put in, taken out, moved or cut off; or a JSON one with other values; or anything."""
    kind = draw(st.sampled_from(["bytes", "bytes", "bytes", *["json"] * 3 * reader.is_json, "any", "deep"]))
    if kind == "any":
        return draw(st.binary(max_size=600))
    sample = draw(st.sampled_from(reader.samples))
    if kind == "deep":
        head = sample[: draw(st.integers(0, len(sample)))] if draw(st.booleans()) else b""
        return head + draw(st.sampled_from([b"[", b'{"a":', b"<a>", b"("])) * DEEP
    if kind == "json":
        return json.dumps(_changed(draw, json.loads(sample))).encode("utf-8", "surrogatepass")
    content = bytearray(sample)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        length = draw(st.sampled_from([1, 1, 2, 4, 8, 64, 512]))
        how = draw(st.sampled_from(["set", "set", "largest", "insert", "delete", "repeat", "cut"]))
        if how == "set":
            content[at : at + 1] = draw(st.binary(min_size=1, max_size=4))
        elif how == "largest":
            content[at : at + length] = draw(st.sampled_from([b"\xff", b"\x00", b"\x7f", b"9"])) * length
        elif how == "insert":
            content[at:at] = draw(st.binary(max_size=16))
        elif how == "delete":
            del content[at : at + length]
        elif how == "repeat":
            content[at:at] = content[at : at + length] * draw(st.integers(1, 4))
        else:
            del content[at:]
    return bytes(content)


def _changed(draw: Callable, value: object) -> object:
    """One place in it has another value, or is gone."""
    if isinstance(value, dict | list) and value and draw(st.integers(0, 3)):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = draw(st.sampled_from(keys))
        changed = value.copy()
        if draw(st.integers(0, 5)) == 0:
            del changed[key]
        else:
            changed[key] = _changed(draw, value[key])
        return changed
    return draw(VALUES)


def check(reader: Reader, content: bytes) -> None:
    """Raises `Bounds` unless the content is read or refused as it should be."""
    place = Path(tempfile.mkdtemp(prefix="fuzzed-"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TESSERA_CACHE", str(place / "cache"))
        before = _peak()
        began = time.process_time()
        try:
            reader.read(place / "in", content)
        except reader.raises as error:
            if isinstance(error, BadInput) and "\n" in str(error):
                raise Bounds(f"a sentence of several lines: {str(error)[:300]!r}") from error
        except Exception as error:
            raise Bounds(f"{type(error).__name__}: {str(error)[:300]}") from error
        finally:
            seconds, mib = time.process_time() - began, _peak(anew=False) - before
            shutil.rmtree(place)
    if seconds > SECONDS or mib > MIB:
        raise Bounds(f"{len(content)} bytes took {seconds:.1f} s and {mib:.0f} MiB")


def _peak(anew: bool = True) -> float:
    """The greatest resident memory of this process so far, in MiB; of what follows, where it is to begin `anew`."""
    if anew:
        Path("/proc/self/clear_refs").write_text("5")
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith("VmHWM")) / 1024


def fuzz(reader: Reader, examples: int, number: int) -> tuple[int, str]:
    """So many damaged files of a reader, drawn from the seed `number`. Returns how many were tried, and what the smallest found
    one does, or nothing."""
    tried = [0]
    found: dict[str, bytes] = {}

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    @seed(number)
    @given(damaged(reader))
    def attempt(content: bytes) -> None:
        tried[0] += 1
        try:
            check(reader, content)
        except Bounds:
            found["smallest"] = content
            raise

    try:
        attempt()
    except (Bounds, Flaky) as error:
        return tried[0], f"{error}, given {found['smallest'][:300]!r} ({len(found['smallest'])} bytes)"
    return tried[0], ""


def fuzz_into(part: Part, reader: Reader, examples: int, number: int) -> None:
    """The same, into a table: of a reader that fails, all but one count as survived, as what follows was spent on it."""
    tried, fault = fuzz(reader, examples, number)
    part.add(reader.name, Verdict(not fault, 0, why=fault, outcome="read or refused"), tried)
