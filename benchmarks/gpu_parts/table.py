"""The results of all parts as one Markdown table, as docs/performance.md wants it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gpu_parts.report import number

# device name -> dense bfloat16 FLOP/s of its datasheet
PEAKS = {
    "NVIDIA H200": 989.4e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA L40S": 362e12,
}
HEAD = ["| part | case | figure | beside it | times as fast | check |", "|---|---|---:|---|---:|---|"]


def markdown(document: Mapping[str, Any]) -> str:
    """Heading line, table and the parts that did not end well."""
    parts = document["parts"]
    device = _row(parts, "device", "device").get("value", document["device"])
    software = _row(parts, "device", "software").get("value", "")
    driver = _row(parts, "device", "driver").get("value")
    facts = [str(device), f"driver {driver}" if driver else "", str(software), document["made"][:10]]
    lines = [f"`{document['command']}`: {', '.join(filter(None, facts))}."]
    if document["tiny"]:
        lines += ["", "**A dry run with tiny sizes: no figure means anything.**"]
    lines += ["", *HEAD]
    for name, part in parts.items():
        for row in part["rows"]:
            if not row.get("detail") or row["status"] != "ok":
                lines.append(_line(name, row, parts, str(device)))
        if part["status"] not in ("ok", "skipped") or not part["rows"]:
            lines.append(f"| {name} | (all) | {part['status']}: {_safe(part['reason'])} | | | |")
    lines += ["", *_footnotes(parts, str(device))]
    return "\n".join(lines) + "\n"


def _line(part: str, row: Mapping[str, Any], parts: Mapping[str, Any], device: str) -> str:
    notes = [_safe(row["note"])] if row.get("note") else []
    notes += _shares(row, parts, device)
    cells = [part, row["name"], _figure(row, notes), row.get("beside", "")]
    cells += [f"{row['ratio']:.2f}" if "ratio" in row else "", _check(row)]
    return "| " + " | ".join(_safe(str(cell)) for cell in cells) + " |"


def _figure(row: Mapping[str, Any], notes: list[str]) -> str:
    value = row.get("value")
    text = "" if value is None else f"{number(value)} {row.get('unit', '')}".strip()
    if "low" in row and row["low"] != row["high"]:
        text += f" ({number(row['low'])}–{number(row['high'])})"
    return "; ".join(filter(None, [text, *notes]))


def _check(row: Mapping[str, Any]) -> str:
    if row["status"] == "skipped":
        return "skipped"
    if "bound" in row:
        sign = "≤" if row["status"] == "ok" else ">"
        return f"{row['difference']:.2g} {sign} {row['bound']:.2g}{'' if row['status'] == 'ok' else ' **failed**'}"
    return "" if row["status"] == "ok" else "**failed**"


def _shares(row: Mapping[str, Any], parts: Mapping[str, Any], device: str) -> Iterator[str]:
    """What part of the device's ceilings a figure is."""
    if "flops" in row:
        yield f"{number(row['flops'] / 1e12)} TFLOP/s"
        if device in PEAKS:
            yield f"MFU {row['flops'] / PEAKS[device]:.3f}"
        product = _row(parts, "device", "product, bfloat16").get("value")
        if product:
            yield f"{row['flops'] / 1e12 / product:.3f} of the measured product"
    if "bytes" in row:
        yield f"{number(row['bytes'] / 1e9)} GB/s of weights"
        copied = _row(parts, "device", "copy").get("value")
        if copied:
            yield f"{row['bytes'] / 1e9 / copied:.3f} of the measured copy"


def _footnotes(parts: Mapping[str, Any], device: str) -> Iterator[str]:
    if any("flops" in row for part in parts.values() for row in part["rows"]):
        peak = (
            f" MFU is against {PEAKS[device] / 1e12:.0f} TFLOP/s, dense bfloat16." if device in PEAKS else ""
        )
        yield (
            "FLOPs of a trained token: 6 N + 6 L H D (T + 1), with N the weights of the matrix products (the head's "
            f"among them, the embedding table's not), L layers, H heads of width D, T tokens in a row.{peak}"
        )
    yield (
        "A check is the relative difference ‖a − b‖/‖b‖ unless its case says otherwise, and its bound. A figure is the "
        "median with its range; sides ran in turn."
    )


def _row(parts: Mapping[str, Any], part: str, name: str) -> Mapping[str, Any]:
    """A row by its name; empty if it is not there."""
    rows = parts.get(part, {}).get("rows", [])
    return next((row for row in rows if row["name"] == name), {})


def _safe(text: str) -> str:
    """Text that stays in its cell."""
    return " ".join(text.split()).replace("|", "\\|")
