"""The record of `benchmarks.gpu`: a line for every result as soon as it is there, and the tables made of the lines.

`record.jsonl` is written line by line, each flushed to the disk, so whatever ends the command leaves what was found. Its first
line holds the plan, so that what is missing is known too. `fold` makes `record.json`, `record.md` and `roofline.png` of it.
"""

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.core.durable import write_file
from engine.core.errors import BadInput
from kernels.cost import Cost

LINES = "record.jsonl"
TABLES = ("record.json", "record.md", "roofline.png")


class Record:
    """A new record in a folder, made where there is none; an earlier record there is removed."""

    def __init__(self, folder: Path, **start: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (LINES, *TABLES):
            (folder / name).unlink(missing_ok=True)
        self.folder = folder
        self.append(part="start", **start)

    def append(self, **line: Any) -> None:
        with open(self.folder / LINES, "a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def fold(folder: Path) -> dict[str, Any]:
    """Make the tables and the picture of a record's lines; returns what `record.json` holds.

    Raises:
        BadInput: there are no lines of a record.
    """
    record = folded(_lines(folder / LINES))
    write_file(folder / "record.json", lambda path: path.write_text(json.dumps(record, indent=1)))
    write_file(folder / "record.md", lambda path: path.write_text(tables(record)))
    if record["kernels"] and record["ceilings"]:
        if importlib.util.find_spec("matplotlib"):
            from benchmarks import roofline

            write_file(folder / "roofline.png", lambda path: roofline.draw(record, path))
        else:
            print("roofline.png is left out: matplotlib is not installed; --fold draws it elsewhere")
    return record


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise BadInput(f"there is no record in {str(path.parent)!r}: it has no file {path.name}.")
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:  # the one that was being written when the machine stopped
            break
    if not found or found[0].get("part") != "start":
        raise BadInput(f"{str(path)!r} is no record: its first line is not the start of one.")
    return found


def folded(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The results by part; times by case, with the share of the floor and the ratio to the best peer."""
    start, *results = lines
    by_part: dict[str, list[dict]] = {}
    for line in results:
        by_part.setdefault(line["part"], []).append(line)

    def value(part: str) -> Any:
        return next((line["value"] for line in by_part.get(part, [])), None)

    facts, ceilings = value("facts") or {}, value("ceilings")
    done = {line["job"] for line in results if "job" in line}
    return {
        "device": facts.get("device", "unknown device"), "date": start["date"], "options": start["options"],
        "facts": facts, "available": start["available"], "ended": "end" in by_part,
        "checks": [_result(line, "op", "case", "form", "ours") for line in by_part.get("check", [])],
        "ceilings": ceilings, "kernels": _kernels(by_part.get("time", []), ceilings),
        "steps": [_step(line) for line in by_part.get("step", [])], "profile": value("profile") or [],
        "tests": next((_tests(line) for line in by_part.get("tests", [])), None),
        "failed": {line["job"]: line["failure"] for line in results if line.get("failure")},
        "not_run": [job for job in start["plan"] if job not in done],
    }  # fmt: skip


def _result(line: dict, *names: str) -> dict[str, Any]:
    kept = {name: line[name] for name in names}
    return kept | ({"failed": line["failure"]} if line["failure"] else line["value"])


def _step(line: dict) -> dict[str, Any]:
    return {"name": line["job"]} | ({"failed": line["failure"]} if line["failure"] else line["value"])


def _tests(line: dict) -> dict[str, Any]:
    printed = line["output"].strip().splitlines()
    return {
        "command": "python -m pytest -m gpu", "status": (line["value"] or {}).get("status"), "output": line["output"],
        "summary": line["failure"] or (printed[-1] if printed else "it said nothing"), "seconds": line["seconds"],
    }  # fmt: skip


def _kernels(lines: list[dict], ceilings: dict | None) -> list[dict[str, Any]]:
    rows: dict[tuple, dict[str, Any]] = {}
    for line in lines:
        cost = Cost(line["bytes"], line["flops"])
        floor = None
        if ceilings:
            floor = 1e3 * cost.floor_seconds(ceilings["bytes_per_second"], ceilings["flops_per_second"])
        row = rows.setdefault(
            (line["op"], line["case"], line["direction"]),
            {
                "op": line["op"], "case": f"{line['case']}, {line['direction']}", "bytes": cost.bytes, "flops": cost.flops,
                "floor_ms": floor, "best_peer": None, "ours": [], "forms": {},
            },
        )  # fmt: skip
        row["ours"] += [line["form"]] * line["ours"]
        row["forms"][line["form"]] = found = {"failed": line["failure"]} if line["failure"] else dict(line["value"])
        if "ms" in found:
            found["gigabytes_per_second"] = 1e-6 * cost.bytes / found["ms"]
            found["share_of_floor"] = floor / found["ms"] if floor else None
    for row in rows.values():
        forms = row["forms"]
        peers = {name: found["ms"] for name, found in forms.items() if name not in row["ours"] and "ms" in found}
        if peers:
            row["best_peer"] = best = min(peers, key=peers.__getitem__)
            for found in forms.values():
                if "ms" in found:
                    found["speed_against_best_peer"] = peers[best] / found["ms"]
    return list(rows.values())


def speed(record: dict[str, Any]) -> str:
    """A measurement of whole steps in a line."""
    if "failed" in record:
        return f"failed: {record['failed']}"
    parts = []
    for name, found in record["median"].items():
        part = f"{name} {found['images_per_second']:,.1f} images/s, {found['share_of_peak']:.1%} of the matrix product"
        if "ratio" in found and name != record["base"]:
            part += f", {found['ratio']:.2f}x {record['base']}"
        if name in record.get("peak_memory", {}):
            part += f", {record['peak_memory'][name] / 2**30:.1f} GiB"
        parts.append(part)
    return "; ".join(parts + [f"{name} left out: {why}" for name, why in record.get("left_out", {}).items()])


def tables(record: dict[str, Any]) -> str:
    """The record in Markdown."""
    facts = record["facts"]
    shown = {
        name: facts[name] for name in ("torch", "triton", "cuda", "driver", "clocks", "git", "dtype") if facts.get(name)
    }
    shown["fp32 products"] = facts.get("float32_matmul_precision", "unknown")
    lines = [f"# {record['device']}, {record['date']}", "", f"{_words(shown)}.", ""]
    if not record["ended"]:
        lines += ["**The command was stopped before its end.**", ""]
    if record["ceilings"]:
        copy, product = (record["ceilings"][name] for name in ("bytes_per_second", "flops_per_second"))
        lines += [f"Ceilings measured: copy {copy / 1e12:.2f} TB/s, matrix product {product / 1e12:.1f} TFLOP/s.", ""]
        if record["ceilings"].get("clocks"):
            lines += [f"Under that product: {_words(record['ceilings']['clocks'])}.", ""]
    if record["tests"]:
        lines += [f"Tests (`{record['tests']['command']}`): {record['tests']['summary']}", ""]
    for part in (_checks, _times, _steps):
        lines += part(record)
    if record["failed"]:
        lines += ["## Failed", ""] + [f"- {job}: {why}" for job, why in record["failed"].items()] + [""]
    if record["not_run"]:
        lines += ["## Not run", ""] + [f"- {job}" for job in record["not_run"]]
    return "\n".join(lines).rstrip() + "\n"


def _words(values: dict[str, Any]) -> str:
    flat: Callable[[Any], str] = lambda x: f"({_words(x)})" if isinstance(x, dict) else str(x)  # noqa: E731
    return ", ".join(f"{name} {flat(value)}" for name, value in values.items())


def _checks(record: dict[str, Any]) -> list[str]:
    if not record["checks"]:
        return []
    lines = ["## Values and gradients at the timed sizes, against float64", ""]
    lines += ["| op | case | form | largest share of the error allowed |", "|---|---|---|---:|"]
    for row in record["checks"]:
        shares = [one["error"] / one["allowed"] if one["allowed"] else 0.0 for one in row.get("errors", [])]
        found = _cell(row["failed"]) if "failed" in row else f"{max(shares):.0%}"
        lines.append(f"| {row['op']} | {row['case']} | {row['form']} | {found} |")
    return [*lines, ""]


def _times(record: dict[str, Any]) -> list[str]:
    if not record["kernels"]:
        return []
    lines = ["## Times; ours in bold", ""]
    lines += ["| op | case | form | ms | GB/s | floor / time | best peer / this |", "|---|---|---|---:|---:|---:|---:|"]
    for row in record["kernels"]:
        for name, found in row["forms"].items():
            label = f"**{name}**" if name in row["ours"] else name
            if "failed" in found:
                cells = (f"does not run: {_cell(found['failed'])}", "", "", "")
            else:
                ratio, share = found.get("speed_against_best_peer"), found["share_of_floor"]
                cells = (
                    f"{found['ms']:.3f}", f"{found['gigabytes_per_second']:,.0f}", "" if share is None else f"{share:.0%}",
                    "" if ratio is None else f"{ratio:.2f}x",
                )  # fmt: skip
            lines.append(f"| {row['op']} | {row['case']} | {label} | {' | '.join(cells)} |")
    return [*lines, ""]


def _steps(record: dict[str, Any]) -> list[str]:
    lines = []
    if record["steps"]:
        lines += ["## Whole steps", ""] + [f"- {step['name']}: {speed(step)}" for step in record["steps"]] + [""]
    if record["profile"]:
        lines += ["## Where an MAE step spends its time", "", "| share | calls | operation |", "|---:|---:|---|"]
        lines += [f"| {row['share']:.1%} | {row['calls']} | `{row['operation']}` |" for row in record["profile"]] + [""]
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "/")
