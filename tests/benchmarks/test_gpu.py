"""The GPU run: rehearsed without a GPU, its stages' limits, and the table that it leaves."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("benchmarks", reason="benchmarks/ is part of a checkout, not of the installed package")
pytest.importorskip("triton", reason="Triton isn't installed: it comes with the extra [test] on Linux x86-64")
from benchmarks.gpu import profiling, results, stages
from benchmarks.gpu.stages import MARK, REPOSITORY, Stage

MOST_FILES, MOST_BYTES = 8, 10 * 2**20  # of what a run leaves: some machines give no more back


def test_rehearsal(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--out", str(tmp_path)]
    names = [stage.name for stage in stages.rehearsal_stages(tmp_path)]
    if request.config.getoption("strength"):  # one of those that run pytest, or time operators, is enough
        names = [name for name in names if name not in ("smoke", "parity", "peers")]
        command.append(f"--stages={','.join(names)}")
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr
    summary = (tmp_path / "summary.md").read_text()
    outcomes = [[cell.strip() for cell in line.split("|")[1:3]] for line in summary.splitlines()[2:]]
    assert outcomes == [[name, "passed"] for name in names]
    files = list(tmp_path.iterdir())
    assert {"log.txt", "compile.json", "timing.json", "timing.md", "timing.png"} <= {file.name for file in files}
    assert len(files) <= MOST_FILES
    assert all(file.stat().st_size < MOST_BYTES for file in files)


def test_rehearsal_has_every_stage_but_the_build() -> None:
    names = [{stage.name for stage in made} for made in (stages.gpu_stages(Path(), 1), stages.rehearsal_stages(Path()))]
    assert names[1] <= names[0]
    assert {name.split(",")[0] for name in names[0] - names[1]} == {"build", "parity", "behaviour"}
    files = (stages.SMOKE, *stages.PARITY, *stages.CONVOLUTIONS, *stages.BEHAVIOUR)
    assert all((REPOSITORY / file).is_file() for file in files)


def stage(name: str, code: str, seconds: float = 60, **options: bool) -> Stage:
    return Stage(name, seconds, [sys.executable, "-c", code], **options)


def test_some_stages_alone() -> None:
    row = [stage("build", "", beside_next=True), stage("compile", ""), stage("parity", ""), stage("parity, more", "")]
    assert stages.only(row, ["build", "compile"]) == row[:2]
    assert [(stage.name, stage.beside_next) for stage in stages.only(row, ["build", "parity"])] == [
        ("build", False),  # or what needs it would begin before it has ended
        ("parity", False),
        ("parity, more", False),
    ]


def test_a_decisive_failure_ends_the_run(tmp_path: Path) -> None:
    row = [stage("first", "raise SystemExit(3)"), stage("second", "raise SystemExit(4)", decisive=True),
           stage("third", "")]  # fmt: skip
    assert [outcome[:2] for outcome in stages.run(row, tmp_path, 60)] == [
        ("first", "failed (3)"),
        ("second", "failed (4)"),
    ]


def test_a_stage_that_is_out_of_time_leaves_what_it_printed(tmp_path: Path) -> None:
    code = f"import time; print('{MARK}begun'); time.sleep(600)"
    first, second = stages.run([stage("slow", code, 1.5), stage("next", f"print('{MARK}done')")], tmp_path, 60)
    assert (first.status, first.headline) == ("out of time", "begun")
    assert (second.status, second.headline) == ("passed", "done")
    assert "begun" in (tmp_path / "log.txt").read_text()


def test_stages_side_by_side_are_waited_for(tmp_path: Path) -> None:
    row = [stage("build", "raise SystemExit(1)", beside_next=True, decisive=True), stage("compile", ""), stage("x", "")]
    assert [outcome[:2] for outcome in stages.run(row, tmp_path, 60)] == [
        ("build", "failed (1)"),
        ("compile", "passed"),
    ]


def test_no_stage_begins_after_the_budget(tmp_path: Path) -> None:
    assert [outcome.status for outcome in stages.run([stage("late", "")], tmp_path, 1.0)] == ["no time left"]


def test_counters_are_asked_for_on_a_process_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ncu = tmp_path / "ncu"
    ncu.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    ncu.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    profiling.count(("cross_entropy", "8x150x512x512", "nchw"))
    asked = (tmp_path / "asked").read_text()
    assert asked.startswith("--clock-control none --metrics gpu__time_duration.sum,")  # a lent GPU's clocks stay
    assert asked.endswith("-m benchmarks.gpu.profiling --once cross_entropy 8x150x512x512 nchw\n")


def timed(kind: str, layout: str, ms: float) -> dict[str, Any]:
    return {
        "operator": "op", "case": "1x2", "layout": layout, "kind": kind, "timing": "forward", "ms": ms, "low_ms": ms,
        "high_ms": ms, "floor_ms": 0.5, "host_us": 20.0, "peak_mib": 1.0,
    }  # fmt: skip


def test_the_table_takes_each_peer_in_its_faster_format_and_marks_what_is_slower(tmp_path: Path) -> None:
    rows = [timed("fastseg", "nchw", 1.0), timed("fastseg", "channels_last", 4.0), timed("eager", "nchw", 5.0),
            timed("eager", "channels_last", 3.0), timed("compile", "nchw", 2.0)]  # fmt: skip
    run = {
        "device": {"title": "a GPU, large", "dtype": "bfloat16"}, "torch": "2", "rows": rows,
        "ceilings": {"bytes_per_second": 1e12, "operations_per_second": 1e12},
    }  # fmt: skip
    first, second = results.table(run).splitlines()[2:]
    assert [cell.strip() for cell in first.split("|")][4:9] == ["1", "1 - 1", "3", "2", "2.00x"]
    assert "**0.50x**" in second
    results.write(json.loads(json.dumps(run)), tmp_path / "some-gpu.md")
    assert {path.name for path in tmp_path.iterdir()} == {"some-gpu.md", "some-gpu.png"}
