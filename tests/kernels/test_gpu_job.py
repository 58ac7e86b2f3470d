"""The GPU job's own machinery, with a device and stages that are made up: limits, results, and the file it leaves."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def job(monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_job", ROOT / "tools/gpu.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_job", module)
    spec.loader.exec_module(module)
    facts = {"commit": "c0ffee", "gpu": "NVIDIA H200", "driver": "1.2", "torch": "2.11.0", "device": True}
    monkeypatch.setattr(module, "facts", lambda: dict(facts))
    return module


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def run(job, monkeypatch, tmp_path, stages, *options: str) -> tuple[int, dict]:
    monkeypatch.setattr(job, "stages", lambda out, capability, prebuilt: [job.Stage(*stage) for stage in stages])
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path), *options])
    code = job.main()
    return code, json.loads((tmp_path / "gpu.json").read_text())


def test_a_late_failure_loses_nothing(job, monkeypatch, tmp_path, capsys) -> None:
    junit = '<testsuites><testsuite tests="5" failures="1" errors="0" skipped="2"/></testsuites>'
    write = f"open(r'{tmp_path / 'tests.xml'}', 'w').write('''{junit}'''); raise SystemExit(1)"
    seen = f"import json; print(len(json.load(open(r'{tmp_path / 'gpu.json'}'))['stages']))"
    # What a stage has started must end with it: a grandchild that would hold the device.
    child = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    stages = [
        ("build", python("print('built')"), 60),
        ("tests", python(write), 60),
        ("sleeps", python(child), 2),
        ("absent", ["/no/such/program"], 60),
        ("last", python(seen), 60),
    ]
    code, report = run(job, monkeypatch, tmp_path, stages)
    assert code == 1 and report["facts"]["gpu"] == "NVIDIA H200"
    found = {r["stage"]: r for r in report["stages"]}
    assert [r["status"] for r in report["stages"]] == ["passed", "failed", "timed out", "failed", "passed"]
    assert found["tests"]["counts"] == {"tests": 5, "failures": 1, "errors": 0, "skipped": 2}
    assert found["sleeps"]["seconds"] < 30 and found["sleeps"]["limit"] == 2
    state = Path(f"/proc/{found['sleeps']['tail'][0]}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"
    assert "/no/such/program" in found["absent"]["tail"][0]
    assert found["last"]["tail"] == ["4"]  # the file was there, with all stages before it
    assert "2 stages passed, 0 skipped, 3 not fine: tests, sleeps, absent" in capsys.readouterr().out


def test_nothing_runs_after_a_failed_build(job, monkeypatch, tmp_path) -> None:
    code, report = run(
        job, monkeypatch, tmp_path, [("build", python("raise SystemExit(3)"), 60), ("next", python(""), 60)]
    )
    assert code == 1 and [r["stage"] for r in report["stages"]] == ["build"] and report["stages"][0]["code"] == 3


def test_tests_that_all_skip_have_not_passed(job, monkeypatch, tmp_path) -> None:
    junit = '<testsuites><testsuite tests="2" failures="0" errors="0" skipped="2"/></testsuites>'
    write = f"open(r'{tmp_path / 'tests.xml'}', 'w').write('''{junit}''')"
    _, report = run(job, monkeypatch, tmp_path, [("tests", python(write), 60)])
    assert report["stages"][0]["status"] == "skipped"


def test_the_sanitizer_must_find_the_planted_bug(job, monkeypatch, tmp_path) -> None:
    """Only its error code is a pass: a sanitizer that did not run, or found nothing, is a failure."""
    monkeypatch.setattr(job, "build_planted_bug", lambda out, capability: None)
    for code, status in ((9, "passed"), (0, "failed"), (1, "failed")):
        _, report = run(job, monkeypatch, tmp_path, [("planted-bug", python(f"raise SystemExit({code})"), 60)])
        assert report["stages"][0]["status"] == status


def test_some_stages_alone(job, monkeypatch, tmp_path, capsys) -> None:
    stages = [(name, python(f"print('{name}')"), 60) for name in ("build", "one", "two")]
    _, report = run(job, monkeypatch, tmp_path, stages, "--stage", "two")
    assert [r["stage"] for r in report["stages"]] == ["two"]
    stages[2] = ("two", python("print('again')"), 60)
    run(job, monkeypatch, tmp_path, stages, "--stage", "one")
    _, report = run(job, monkeypatch, tmp_path, stages, "--stage", "two")  # takes the place of its earlier result
    assert {r["stage"]: r["tail"] for r in report["stages"]} == {"one": ["one"], "two": ["again"]}
    assert (
        "==== two\ntwo" in (tmp_path / "log.txt").read_text()
        and "==== two\nagain" in (tmp_path / "log.txt").read_text()
    )
    monkeypatch.setattr(job, "facts", lambda: {"commit": "another", "device": True})
    _, report = run(job, monkeypatch, tmp_path, stages, "--stage", "one")
    assert [r["stage"] for r in report["stages"]] == ["one"]
    with pytest.raises(SystemExit):
        run(job, monkeypatch, tmp_path, stages, "--stage", "three")
    assert "expected rest or some of ['build', 'one', 'two'], got 'three'" in capsys.readouterr().err


def test_nothing_is_lost(job, monkeypatch, tmp_path, capsys) -> None:
    """Results of another commit, or a file that cannot be read, move aside; an edit in the tree does not."""
    stages = [(name, python(f"print('{name}')"), 60) for name in ("build", "one", "two")]
    run(job, monkeypatch, tmp_path, stages)
    before = job.facts()
    monkeypatch.setattr(job, "facts", lambda: {**before, "dirty": True})
    _, report = run(job, monkeypatch, tmp_path, stages, "--stage", "one")
    assert sorted(r["stage"] for r in report["stages"]) == ["build", "one", "two"] and report["facts"]["dirty"]
    monkeypatch.setattr(job, "facts", lambda: {**before, "commit": "another"})
    run(job, monkeypatch, tmp_path, stages, "--stage", "one")
    (aside,) = tmp_path.glob("earlier-*-gpu.json")
    assert len(json.loads(aside.read_text())["stages"]) == 3 and len(list(tmp_path.glob("earlier-*-log.txt"))) == 1
    aside.unlink()
    (tmp_path / "gpu.json").write_text("{")
    run(job, monkeypatch, tmp_path, stages)
    (aside,) = tmp_path.glob("earlier-*-gpu.json")
    assert aside.read_text() == "{" and "is kept as earlier-" in capsys.readouterr().out
    monkeypatch.setattr(job, "facts", lambda: {"device": False, "torch": None})
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path)])
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert job.main() == 2 and "cannot import torch" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_the_rest_after_the_time_was_over(job, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(job, "LEAST", 1)
    stages = [("build", python(""), 60), ("slow", python("import time; time.sleep(30)"), 60), ("last", python(""), 60)]
    code, report = run(job, monkeypatch, tmp_path, stages, "--seconds", "3")
    assert code == 1 and [r["status"] for r in report["stages"]] == ["passed", "timed out", "not reached"]
    assert report["stages"][1]["limit"] < 4 and report["stages"][2]["limit"] == 60
    stages[1] = ("slow", python(""), 60)
    code, report = run(job, monkeypatch, tmp_path, stages, "--stage", "rest")
    assert code == 0 and [r["stage"] for r in report["stages"]] == ["build", "slow", "last"]
    assert (tmp_path / "log.txt").read_text().count("==== build") == 1


def test_without_a_device(job, monkeypatch, tmp_path, capsys) -> None:
    """Refused; rehearsed, what needs one is skipped and says why."""
    monkeypatch.setattr(job, "facts", lambda: {"device": False, "torch": "2.11.0"})
    stages = [("build", python(""), 60, False), ("conformance", python("raise SystemExit(1)"), 60)]
    monkeypatch.setattr(job, "stages", lambda out, capability, prebuilt: [job.Stage(*stage) for stage in stages])
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path)])
    assert job.main() == 2 and "no CUDA device here" in capsys.readouterr().err
    code, report = run(job, monkeypatch, tmp_path, stages, "--rehearse")
    assert code == 0 and [r["status"] for r in report["stages"]] == ["passed", "skipped"]
    assert report["stages"][1]["why"] == "no CUDA device"


def test_halves(job, monkeypatch, tmp_path) -> None:
    """B goes on with A's results, in a later run; each has its own time."""
    stages = [
        ("build", python("print('a')"), 60, False, False, "A"),
        ("tests-models", python("print('b')"), 60),
        ("bench", python("print('short')"), 60, True, False, "A"),
    ]
    _, report = run(job, monkeypatch, tmp_path, stages, "--half", "A")
    assert [r["stage"] for r in report["stages"]] == ["build", "bench"]
    _, report = run(job, monkeypatch, tmp_path, stages, "--half", "B")
    assert [r["stage"] for r in report["stages"]] == ["build", "bench", "tests-models"]
    monkeypatch.setattr(job, "HALF_SECONDS", 0.0)
    _, report = run(job, monkeypatch, tmp_path, stages, "--half", "B")
    assert report["stages"][-1]["status"] == "not reached"


def test_the_package_is_found(job, monkeypatch, tmp_path) -> None:
    """Also by a script in another folder: nothing is installed where the job runs."""
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "script.py"
    script.write_text("import importlib.util as u; print(u.find_spec('taps_ext').origin)")
    _, report = run(job, monkeypatch, tmp_path, [("bench", [sys.executable, str(script)], 60)])
    assert report["stages"][0]["tail"] == [str(ROOT / "taps_ext/__init__.py")]


def test_the_real_stages(job, tmp_path) -> None:
    """Names are unique, every file they run is there, and they are compiled for the device."""
    stages = job.stages(tmp_path, "90")
    assert "90a-real" in stages[0].command and "80-real" in job.stages(tmp_path, "80")[0].command
    assert "-arch=sm_80" in job.stages(tmp_path, "80")[1].command
    names = [stage.name for stage in stages]
    assert len(set(names)) == len(names) and names[0] == "build" and names.index("conformance") < names.index("tests")
    halves = [stage.half for stage in stages]
    assert halves == sorted(halves) and {"tests", "bench-linear-short"} <= {s.name for s in stages if s.half == "A"}
    assert all("initcheck" not in stage.command or "conformance" in stage.name for stage in stages)
    assert "-c" in job.stages(tmp_path, "90", prebuilt=True)[0].command
    for stage in stages:
        for word in stage.command:
            if word.endswith((".py", ".cu")):
                assert (ROOT / word).exists(), word
