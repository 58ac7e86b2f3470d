"""The GPU job's own machinery, with a device and stages that are made up: limits, results, and the file it leaves."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from taps_ext import ops
from taps_ext.extension import has_kernels

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
    monkeypatch.setattr(job, "facts", lambda: {"commit": "another", "torch": "2.11.0", "device": True})
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
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for more in ([], ["--rehearse"]):  # without torch there is nothing to rehearse either
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path), *more])
        assert job.main() == 2
        told = capsys.readouterr().err
        assert "cannot import torch" in told and "PYTHON=" in told and "REHEARSE" not in told
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
    checks = {stage.name.partition("-")[0] for stage in stages if stage.name.endswith("check-conformance")}
    assert checks == {"memcheck", "racecheck", "initcheck", "synccheck"}
    assert job.stages(tmp_path, "90", prebuilt=True)[0].command[1:] == ["tools/prebuilt.py", "90"]
    compiled = [s.name for s in stages if any(w.startswith(str(tmp_path)) and Path(w).suffix == "" for w in s.command)]
    assert compiled == [s.name for s in stages if s.nvcc]  # whoever runs or makes a program of the job's own
    for stage in stages:
        for word in stage.command:
            if word.endswith((".py", ".cu")):
                assert (ROOT / word).exists(), word


def test_without_nvcc_the_jobs_own_programs_are_skipped(job, monkeypatch, tmp_path) -> None:
    stages = [
        ("build", python(""), 60, False),
        ("conformance", ["/no/such/program"], 60, True, False, "A", True),
        ("tests", python(""), 60),
    ]
    _, report = run(job, monkeypatch, tmp_path, stages)
    assert [(r["status"], r.get("why")) for r in report["stages"]][:2] == [("passed", None), ("skipped", "no nvcc")]
    facts = job.facts()
    monkeypatch.setattr(job, "facts", lambda: {**facts, "nvcc": "13.0.88"})
    _, report = run(job, monkeypatch, tmp_path, stages)
    assert report["stages"][1]["status"] == "failed"


def test_a_copy_without_history_is_known_by_its_sources(job, tmp_path) -> None:
    (tmp_path / "csrc").mkdir()
    (tmp_path / "taps_ext").mkdir()
    (tmp_path / "csrc" / "a.cu").write_text("one")
    before = job.sources(tmp_path)
    (tmp_path / "taps_ext" / "_C.so").write_text("what half A has built")
    assert job.sources(tmp_path) == before and before.startswith("sources ")
    (tmp_path / "csrc" / "a.cu").write_text("two")
    changed = job.sources(tmp_path)
    (tmp_path / "csrc" / "a.cu").rename(tmp_path / "csrc" / "b.cu")
    assert len({before, changed, job.sources(tmp_path)}) == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_stage_that_runs(number, tmp_path) -> None:
    """A scheduler's SIGTERM must not leave a process that holds the device; what ended before is kept."""
    pid = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    (tmp_path / "job.py").write_text(
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('gpu_job', {str(ROOT / 'tools/gpu.py')!r})\n"
        "job = sys.modules['gpu_job'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(job)\n"
        "job.facts = lambda: {'commit': 'c0ffee', 'torch': '2.11.0', 'device': True}\n"
        "job.stages = lambda *a, **k: [job.Stage('build', [sys.executable, '-c', ''], 60, False),\n"
        f"                              job.Stage('sleeps', [sys.executable, '-c', {pid!r}], 60)]\n"
        f"sys.argv = ['gpu.py', '--out', {str(tmp_path)!r}]\n"
        "raise SystemExit(job.main())\n"
    )
    process = subprocess.Popen([sys.executable, str(tmp_path / "job.py")], stdout=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    pid = int((tmp_path / "pid").read_text())
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert [r["stage"] for r in json.loads((tmp_path / "gpu.json").read_text())["stages"]] == ["build"]


@pytest.fixture
def prebuilt():
    spec = importlib.util.spec_from_file_location("prebuilt", ROOT / "tools/prebuilt.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_wheels_extension_is_copied_into_the_tree(prebuilt, tmp_path) -> None:
    tree, site = tmp_path / "taps_ext", tmp_path / "site" / "taps_ext"
    tree.mkdir()
    site.mkdir(parents=True)
    with pytest.raises(SystemExit, match="no extension for Python .*install the wheel, or copy"):
        prebuilt.place(tree, [tmp_path / "nowhere", site])
    (site / prebuilt.NAMES[0]).write_text("the wheel's")
    assert "was copied from" in prebuilt.place(tree, [tmp_path / "nowhere", site])
    assert (tree / prebuilt.NAMES[0]).read_text() == "the wheel's"
    (site / prebuilt.NAMES[0]).write_text("another")
    assert "is in taps_ext" in prebuilt.place(tree, [site])
    assert (tree / prebuilt.NAMES[0]).read_text() == "the wheel's"


def test_kernels_for_another_device_are_refused() -> None:
    """Of the architectures alone: 86 is also in the version of nvcc 12.9.86."""
    if ops._C is None or not (built := ops._C.build_info()["cuda"]):
        pytest.skip("the extension is not built with CUDA")
    for capability in ("75", built["version"].split(".")[-1].zfill(2)):
        expected = has_kernels(built["architectures"], (int(capability[:-1]), int(capability[-1])))
        done = subprocess.run(
            [sys.executable, "tools/prebuilt.py", capability], cwd=ROOT, capture_output=True, text=True
        )
        assert (done.returncode == 0) is expected
        assert expected or f"expected kernels for compute capability {capability}, got those for" in done.stderr


@pytest.mark.parametrize(
    ("architectures", "runs", "does_not"),
    [
        ("90", ["9.0", "10.0", "12.0"], ["8.0", "8.9"]),
        ("80-real", ["8.0", "8.6", "8.9"], ["7.5", "9.0"]),
        ("86-real", ["8.6", "8.9"], ["8.0", "9.0"]),
        ("80-virtual", ["8.0", "9.0", "12.0"], ["7.5"]),
        ("90a-real", ["9.0"], ["8.0", "10.0"]),
        ("90a", ["9.0"], ["10.0"]),
        ("100f-real", ["10.0", "10.3"], ["9.0", "12.0"]),
        ("80-real 86-real 89-real 90a-real 100-real 120", ["8.0", "8.7", "9.0", "10.3", "12.1"], ["7.5", "11.0"]),
        ("80-real;120", ["8.9", "12.0"], ["9.0"]),
        ("", [], ["9.0"]),
    ],
)
def test_which_devices_an_architecture_serves(architectures, runs, does_not) -> None:
    for capability in runs + does_not:
        major, minor = map(int, capability.split("."))
        assert has_kernels(architectures, (major, minor)) is (capability in runs), capability


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
@pytest.mark.parametrize(
    "name", ["step", *(pytest.param(name, marks=pytest.mark.thorough) for name in ("linear", "reconstruct", "conv2d"))]
)
def test_a_measurement_says_at_once_why_it_cannot_be(name, tmp_path) -> None:
    command = [sys.executable, f"benchmarks/gpu_{name}.py", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for path, message in (
        (tmp_path / "out.json", "error: no CUDA device here"),
        (tmp_path / "missing" / "out.json", "error: --json: expected a file in a folder that is there, got"),
    ):
        done = subprocess.run([*command, str(path)], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
