"""A timing's results as a table and a picture: ``python -m benchmarks.gpu.results TIMING.json --out FILE.md``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.harness.suite import BACKWARD, BOTH, FASTSEG, FORWARD

HEADER = (
    "case", "format", "pass", "fastseg ms", "quartiles", "eager ms", "torch.compile ms", "x best peer", "floor ms",
    "of the floor", "host us", "peak MiB", "lowest peer's MiB",
)  # fmt: skip
MISSING = "-"


def rows_of(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of fastseg, each with the fastest of both peers in either memory format."""
    found = []
    for row in results["rows"]:
        if row["kind"] != FASTSEG:
            continue
        peers = [
            other
            for other in results["rows"]
            if other["kind"] != FASTSEG and all(other[key] == row[key] for key in ("operator", "case", "timing"))
        ]
        fastest: dict[str, float] = {}
        for peer in peers:
            fastest[peer["kind"]] = min(peer["ms"], fastest.get(peer["kind"], peer["ms"]))
        peaks = [peer["peak_mib"] for peer in peers if peer["peak_mib"] is not None]
        found.append(row | {"peers": fastest, "peer_peak_mib": min(peaks, default=None)})
    return found


def table(results: dict[str, Any]) -> str:
    """The table in Markdown, slower cases in bold."""
    lines = ["| " + " | ".join(HEADER) + " |", "|" + " --- |" * 3 + " ---: |" * (len(HEADER) - 3)]
    for row in rows_of(results):
        ratio = min(row["peers"].values(), default=float("nan")) / row["ms"]
        eager, compiled = (_number(row["peers"].get(kind)) for kind in ("eager", "compile"))
        cells = (
            f"{row['operator']} {row['case']}", row["layout"], row["timing"], _number(row["ms"]),
            f"{_number(row['low_ms'])} - {_number(row['high_ms'])}", eager, compiled,
            f"**{ratio:.2f}x**" if ratio < 1 else f"{ratio:.2f}x", _number(row["floor_ms"]),
            f"{row['floor_ms'] / row['ms']:.0%}", f"{row['host_us']:.0f}", _whole(row["peak_mib"]),
            _whole(row["peer_peak_mib"]),
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3g}"


def _whole(value: float | None) -> str:
    return MISSING if value is None else f"{value:.0f}"


def fastest_layouts(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each case forward and backward (of a prediction forward), in the memory format that fastseg is faster in."""
    chosen: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        key = row["operator"], row["case"]
        whole = row["timing"] == BOTH or (row["timing"] == FORWARD and not _has_backward(rows, key))
        if whole and (key not in chosen or row["ms"] < chosen[key]["ms"]):
            chosen[key] = row
    return list(chosen.values())


def _has_backward(rows: Iterable[dict[str, Any]], key: tuple[str, str]) -> bool:
    return any((row["operator"], row["case"]) == key and row["timing"] == BACKWARD for row in rows)


def draw(results: dict[str, Any], path: Path) -> None:
    """How many times as fast as the fastest peer, a bar a case."""
    from matplotlib.figure import Figure

    rows = fastest_layouts(rows_of(results))
    ratios = [min(row["peers"].values(), default=float("nan")) / row["ms"] for row in rows]
    figure = Figure(figsize=(8, 1.2 + 0.5 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    bars = axes.barh([f"{row['operator']}\n{row['case']}" for row in rows], ratios, color="#3b6fb6")
    axes.bar_label(
        bars, [f"{ratio:.1f}x, {row['ms']:.2g} ms" for ratio, row in zip(ratios, rows, strict=True)], padding=3
    )
    axes.axvline(1, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_xlabel("times as fast as the faster of eager PyTorch and torch.compile")
    axes.set_title(results["device"]["title"].split(",")[0] + f", {results['device']['dtype']}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def write(results: dict[str, Any], path: Path) -> None:
    """Writes the table, and the picture beside it."""
    ceilings = results["ceilings"]
    draw(results, path.with_suffix(".png"))
    bandwidth, rate = (ceilings[name] / 1e12 for name in ("bytes_per_second", "operations_per_second"))
    path.write_text(
        f"# One size an operator, {results['device']['title']}\n\n"
        f"`python -m benchmarks.gpu --out DIR`, {results['device']['dtype']}, torch {results['torch']}. Every result "
        "was verified against a float64 truth before it was timed. Times are a GPU's own, between events, caches "
        "flushed before each call: medians of interleaved rounds. Peers are in whichever memory format they are faster "
        f"in. The floor is the bytes that a pass can't do without at the {bandwidth:.2f} TB/s of a copy, or its "
        f"products at {rate:.0f} TFLOP/s. Host: microseconds until a call returns. In bold: slower than the fastest "
        f"peer.\n\n![Times as fast as the fastest peer]({path.with_suffix('.png').name})\n\n{table(results)}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.results", description=__doc__)
    parser.add_argument("timing", type=Path, help="what benchmarks.gpu.timing wrote")
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to write; the picture lies beside it")
    arguments = parser.parse_args()
    write(json.loads(arguments.timing.read_text()), arguments.out)


if __name__ == "__main__":
    main()
