"""The benchmark of third-party models: what is measured of one, and its tables in a file and in the README."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("benchmarks", reason="benchmarks/ is part of a checkout, not of the installed package")
pytest.importorskip("matplotlib", reason="matplotlib isn't installed: it comes with the extra [train]")
from benchmarks.harness import memory
from benchmarks.harness.suite import COMPILE, DEPLOYMENTS, EAGER, FASTSEG, OPENVINO, Effort, Job
from benchmarks.reports import third_party as report
from benchmarks.reports.third_party import BEGIN, END
from benchmarks.third_party import __main__, measuring
from benchmarks.third_party.cases import ThirdPartyCase
from benchmarks.third_party.models import LOGITS
from benchmarks.third_party.plain_conv_unet import PlainConvUNet

ONE_ROUND = Effort(0, 1, 1)
README = f"before\n{BEGIN}\nold\n{END}\nafter\n"


def network(classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, classes, 1), up())


def up() -> nn.Module:
    return nn.Upsample(scale_factor=2, mode="bilinear")


SEQUENTIAL = "torch.Sequential", (2, 3, 16, 24), "torch", network, LOGITS, 5
CASE = ThirdPartyCase(*SEQUENTIAL)
ABSENT = ThirdPartyCase("absent.Net", (2, 3, 16, 24), "no_such_package", network, LOGITS, 5)
BROKEN = ThirdPartyCase("torch.Broken", (2, 3, 16, 24), "torch", lambda classes: nn.Identity(), LOGITS, 5)


def measured(name: str, fastseg: float) -> dict[str, Any]:
    """What `measuring.measure` gives: ``fastseg`` and 3, 2 seconds and MiB; of OpenVINO 1.5 seconds of a prediction."""
    entries = [entry("step", kind, seconds) for kind, seconds in times(fastseg).items()]
    entries += [entry("prediction", kind, seconds) for kind, seconds in times(fastseg).items()]
    entries += [entry("prediction", OPENVINO, 1.5, "channels_last") | {"peak": None}]
    return {
        "name": name,
        "images": [1, 3, 8, 8],
        "classes": 4,
        "missing": [],
        "replaced": {"step": {"cross_entropy": 1, "conv_relu_pool2d": 2}, "prediction": {}},
        "measured": entries,
        "difference": {"loss": 0.0, "gradients": 1.3e-6},
        "seconds": 10.0,
        "compiling": {COMPILE: 4.0, FASTSEG: 3.0},
    }


def entry(timing: str, kind: str, seconds: float, layout: str = "nchw") -> dict[str, Any]:
    return {
        "timing": timing, "kind": kind, "layout": layout, "rounds": [seconds] * 3, "peak": int(seconds * 2**20),
        "returned": 2**19,
    }  # fmt: skip


def times(fastseg: float) -> dict[str, float]:
    return {EAGER: 3.0, COMPILE: 2.0, FASTSEG: fastseg}


def failed(name: str) -> dict[str, Any]:
    result = measured(name, 1.0)
    of_step = {"timing": "step", "kind": FASTSEG, "layout": "nchw"}
    result["measured"] = [entry for entry in result["measured"] if not of_step.items() <= entry.items()]
    missing = of_step | {"reason": "AssertionError: result 0: too far\nfrom the truth"}
    return result | {"missing": [missing], "difference": {}}


RUN = {
    "models": [measured("a.Fast", 1.0), measured("a.Slow", 2.5), failed("a.Failed")],
    "absent": {"b.Absent": "needs b: pip install '.[models]'"},
    "machine_info": {
        "machine": "x86_64", "system": "Linux", "python_version": "3.12.0", "cpu": {"count": 2, "brand_raw": "A chip"},
        "fastseg": {"fastseg": "0.1.0", "torch": "2.13.0"},
    },
    "commit_info": {"id": "0123456789abcdef", "dirty": True},
    "device": {"title": "avx2 kernels, 2 threads", "dtype": "float32"},
    "datetime": "2026-11-22T12:00:00",
    "peers": {"b": "1.0"},
}  # fmt: skip


def cells(text: str, name: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {name} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_line_for_each_model() -> None:
    text = report.summary(RUN)
    assert cells(text, "a.Fast") == [
        "a.Fast", "1x3x8x8", "4", "3, 0", "1000 ms, 2.00x torch.compile", "1000 ms, 1.50x OpenVINO",
        "1.00 MiB, 2.00x torch.compile",
    ]  # fmt: skip
    assert cells(text, "a.Slow")[-3:] == [
        "2500 ms, **0.80x** torch.compile", "2500 ms, **0.60x** OpenVINO", "2.50 MiB, **0.80x** torch.compile",
    ]  # fmt: skip
    assert cells(text, "a.Failed")[-3:] == ["-", "1000 ms, 1.50x OpenVINO", "-"]
    heads = next(line for line in text.splitlines() if line.startswith("| model"))
    assert heads.count("|") == text.splitlines()[-1].count("|")


def test_a_line_for_each_model_in_short() -> None:
    text = report.in_short(RUN)
    whole = cells(report.summary(RUN), "a.Fast")
    assert cells(text, "a.Fast") == [whole[0], *whole[3:]]
    assert "the fastest other (of eager, torch.compile, OpenVINO)" in " ".join(text.split())


def test_the_file(tmp_path: Path) -> None:
    report.write(RUN, path := tmp_path / "results" / "models.md")
    text = path.read_text()
    assert report.summary(RUN) in text
    assert "* avx2 kernels, 2 threads\n* A chip, 2 cores, Linux\n* fastseg 0.1.0 (commit 0123456789 with local" in text
    assert "30 s in all, 12 s to compile and verify torch.compile, 9 s to compile and verify fastseg\n" in text
    details, memory = text[text.index("## Models") :], text[text.index("Peak memory") :]
    assert "| fastseg NCHW | eager NCHW | compile NCHW | openvino channels_last | fastseg NCHW x best" in details
    assert cells(details, "a.Slow | step")[2:] == [
        "2500 (2500 - 2500)", "3000 (3000 - 3000)", "2000 (2000 - 2000)", "-", "**0.80x** (0.80 - 0.80)",
    ]  # fmt: skip
    assert cells(details, "a.Failed | step")[2] == "failed"
    assert cells(memory, "a.Slow | prediction")[2:6] == ["2.5 (2.0)", "3.0 (2.5)", "2.0 (1.5)", "- (-)"]
    places = text[text.index("## Places") :]
    assert cells(places, "a.Slow") == [
        "a.Slow", "1 cross_entropy, 2 conv_relu_pool2d", "nothing", "0.0e+00", "1.3e-06",
    ]  # fmt: skip
    assert cells(places, "a.Failed")[-2:] == ["-", "-"]
    assert text.endswith(
        "## Not measured\n\n* b.Absent: needs b: pip install '.[models]'\n"
        "* a.Failed, step, fastseg NCHW: `AssertionError: result 0: too far from the truth`\n"
    )


def test_the_readme_keeps_what_is_around_the_table() -> None:
    text = report.insert(README, "new")
    assert text == f"before\n{BEGIN}\n\nnew\n{END}\nafter\n"
    assert report.insert(text, "new") == text


@pytest.mark.parametrize("text", ["", BEGIN, END, f"{END}\n{BEGIN}", f"{BEGIN}\n{BEGIN}\n{END}"])
def test_without_the_marks_nothing_is_written(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected the lines .*from here on.*up to here.*each once"):
        report.insert(text, "new")


def test_the_projects_readme_has_the_marks() -> None:
    report.insert((Path(__file__).parents[2] / "README.md").read_text(), "new")


# ---- models ----


def test_nnunets_plain_network_is_the_one_described() -> None:
    features = (4, 8, 12)
    network = PlainConvUNet(1, 5, features)
    assert network(torch.ones(2, 1, 16, 24)).shape == (2, 5, 16, 24)
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.kernel_size[0], c.stride[0]) for c in convolutions] == [
        (1, 4, 3, 1), (4, 4, 3, 1), (4, 8, 3, 2), (8, 8, 3, 1), (8, 12, 3, 2), (12, 12, 3, 1),
        (16, 8, 3, 1), (8, 8, 3, 1), (8, 4, 3, 1), (4, 4, 3, 1), (4, 5, 1, 1),
    ]  # fmt: skip
    doubling = [module for module in network.modules() if isinstance(module, nn.ConvTranspose2d)]
    assert [(c.in_channels, c.out_channels, c.kernel_size[0], c.stride[0]) for c in doubling] == [
        (12, 8, 2, 2), (8, 4, 2, 2),
    ]  # fmt: skip
    for kind in (nn.InstanceNorm2d, nn.LeakyReLU):
        assert sum(isinstance(module, kind) for module in network.modules()) == 10


# ---- measuring ----


class Wrong(ThirdPartyCase):
    """A model whose training step fastseg gets wrong."""

    def job(self, fused: bool, layout: str, training: bool, dtype: torch.dtype | None = None) -> Job:
        job = super().job(fused, layout, training, dtype)
        wrong = fused and training
        return job._replace(arguments=(1.01 * job.arguments[0], *job.arguments[1:])) if wrong else job


def contestants(result: dict[str, Any], timing: str) -> set[tuple[str, str]]:
    return {(entry["kind"], entry["layout"]) for entry in result["measured"] if entry["timing"] == timing}


def test_a_model_is_verified_and_measured() -> None:
    result = json.loads(json.dumps(measuring.measure(CASE, ONE_ROUND)))
    assert result["missing"] == []
    assert result["replaced"] == {
        "step": {"conv_relu_pool2d": 1, "upsample_cross_entropy": 1},
        "prediction": {"conv_relu_pool2d": 1, "upsample_argmax": 1},
    }
    assert contestants(result, "step") == {(kind, "nchw") for kind in (FASTSEG, EAGER, COMPILE)}
    deployed = [kind for kind, peer in DEPLOYMENTS.items() if peer.version() is not None]
    assert contestants(result, "prediction") == {
        (kind, layout) for kind in (FASTSEG, EAGER, COMPILE, *deployed) for layout in ("nchw", "channels_last")
    }
    assert all(len(entry["rounds"]) == 1 and min(entry["rounds"]) > 0 for entry in result["measured"])
    assert {entry["peak"] for entry in result["measured"]} == {None}
    measuring.measure_memory(CASE, result)
    unknown = {entry["kind"] for entry in result["measured"] if entry["peak"] is None}
    assert unknown == {*deployed} or memory.unknown()
    assert set(result["difference"]) == {"loss", "gradients"}
    assert all(0 <= value < 1e-12 for value in result["difference"].values())


def test_a_wrong_gradient_is_not_measured() -> None:
    result = measuring.measure(Wrong(*SEQUENTIAL), ONE_ROUND)
    (entry,) = result["missing"]
    assert (entry["timing"], entry["kind"]) == ("step", FASTSEG)
    assert "exceeds" in entry["reason"]
    assert contestants(result, "step") == {(EAGER, "nchw"), (COMPILE, "nchw")}
    assert result["difference"] == {}


# ---- the command ----


def of_timings(outcome: dict[str, Any] | str, timings: Sequence[str]) -> dict[str, Any] | str:
    """What `measuring.measure` would have given of these timings alone."""
    if isinstance(outcome, str):
        return outcome
    return outcome | {
        "measured": [entry for entry in outcome["measured"] if entry["timing"] in timings],
        "replaced": {timing: outcome["replaced"][timing] for timing in timings},
        "difference": outcome["difference"] if "step" in timings else {},
    }


def command(monkeypatch: pytest.MonkeyPatch, cases: list[ThirdPartyCase], *arguments: str) -> int:
    """Runs the command on ``cases``, each in this process."""
    monkeypatch.setattr(__main__, "CASES", cases)
    outcomes = {"torch.Sequential": measured("torch.Sequential", 1.0), "torch.Broken": "its process ended"}
    monkeypatch.setattr(measuring, "in_new_process", lambda name, quick, timings: of_timings(outcomes[name], timings))
    monkeypatch.setattr(sys, "argv", ["benchmarks.third_party", *arguments])
    return __main__.main()


def test_the_command_writes_file_and_readme(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out, readme, results = (tmp_path / name for name in ("models.md", "README.md", "models.json"))
    readme.write_text(README)
    status = command(
        monkeypatch, [CASE, ABSENT, BROKEN], f"--out={out}", f"--readme={readme}", f"--json={results}"
    )  # fmt: skip
    assert status == 1  # one could not be measured
    run = json.loads(results.read_text())
    assert run["absent"] == {
        "absent.Net": "needs no_such_package: pip install '.[models]'",
        "torch.Broken": "its process ended",
    }
    assert cells(readme.read_text(), "torch.Sequential")[1:3] == ["3, 0", "1000 ms, 2.00x torch.compile"]
    assert cells(out.read_text(), "torch.Sequential")[1:4] == ["1x3x8x8", "4", "3, 0"]
    assert command(monkeypatch, [CASE], f"--out={out}", f"--readme={readme}", f"--from={results}") == 1
    # What is measured again replaces what was there, the rest stays.
    assert command(monkeypatch, [CASE, ABSENT], f"--out={out}", f"--json={results}", "--only=torch.Sequential") == 1
    assert [result["name"] for result in json.loads(results.read_text())["models"]] == ["torch.Sequential"]


def test_of_one_timing_the_other_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out, results = tmp_path / "models.md", tmp_path / "models.json"
    assert command(monkeypatch, [CASE], f"--out={out}", f"--json={results}", "--timing=prediction") == 0
    (line,) = [line for line in out.read_text().splitlines() if line.startswith("| torch.Sequential | 1x3x8x8")]
    assert "| -, 0 | - | " in line
    (prediction,) = json.loads(results.read_text())["models"]
    assert command(monkeypatch, [CASE], f"--out={out}", f"--json={results}", "--timing=step") == 0
    (both,) = json.loads(results.read_text())["models"]
    assert both["replaced"] == measured("torch.Sequential", 1.0)["replaced"]
    assert {entry["timing"] for entry in both["measured"]} == {"step", "prediction"}
    assert [entry for entry in both["measured"] if entry["timing"] == "prediction"] == prediction["measured"]


def test_nothing_to_measure_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command(monkeypatch, [ABSENT], f"--out={tmp_path / 'models.md'}")
    assert "nothing was measured; absent.Net: needs no_such_package" in capsys.readouterr().err
    assert not (tmp_path / "models.md").exists()


def test_a_readme_without_marks_is_an_error_before_the_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (readme := tmp_path / "README.md").write_text("no marks")
    with pytest.raises(SystemExit):
        command(monkeypatch, [CASE], f"--out={tmp_path / 'models.md'}", f"--readme={readme}")
    assert "README.md: expected the lines" in capsys.readouterr().err
