"""`taps serve` as a process: it says where it listens, answers, and ends when it is told to."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from serving import folder_of
from test_http import png

ROOT = Path(__file__).resolve().parents[2]
ENV = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests/helpers'}", "OMP_NUM_THREADS": "1"}


class Process:
    """`taps serve` on a free port."""

    def __init__(self, folder: Path, *words: str) -> None:
        command = [sys.executable, "-m", "taps_ext", "serve", "python:serving.base", str(folder), "--port", "0"]
        command, pipe = [*command, "--json"], subprocess.PIPE
        self.process = subprocess.Popen([*command, *words], env=ENV, stdout=pipe, stderr=pipe, text=True)
        assert self.process.stdout is not None
        lines = []
        for line in self.process.stdout:
            lines.append(line)
            if line == "}\n":
                break
        self.told = json.loads("".join(lines)) if lines else {}
        self.address = self.told["url"].removeprefix("http://") if lines else ""

    def ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection(self.address, timeout=60)
        connection.request(method, path, body, {"Content-Type": "image/png"} if body else {})
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        return answer.status, json.loads(text) if answer.headers.get_content_type() == "application/json" else text

    def end(self, which: signal.Signals) -> tuple[int, str]:
        """(exit code, what it said)."""
        self.process.send_signal(which)
        _, err = self.process.communicate(timeout=60)
        return self.process.returncode, err


def test_it_serves_and_answers_what_was_asked_before_it_ends(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, 2).path
    served = Process(folder, "--pin", "t0", "--max-delay", "1", "--max-batch", "8", "--max-resident", "1MB")
    try:
        assert served.told["tasks"] == 2 and served.told["pinned"] == ["t0"]
        assert served.ask("GET", "/tasks")[1] == {"tasks": ["t0", "t1"], "resident": ["t0"]}
        answers: list[tuple[int, Any]] = []
        threads = [
            threading.Thread(target=lambda i=i: answers.append(served.ask("POST", f"/tasks/t{i}/predict", png(i))))
            for i in (0, 1, 0)
        ]
        for thread in threads:
            thread.start()
        for _ in range(500):  # all of them wait for the batch's second to be over
            if b"\ntaps_queued_samples 3\n" in served.ask("GET", "/metrics")[1]:
                break
            time.sleep(0.01)
        code, err = served.end(signal.SIGTERM)
        for thread in threads:
            thread.join(30)
        assert [answer[0] for answer in answers] == [200] * 3 and code == 0, err
        assert "serving 2 tasks on http://127.0.0.1:" in err and err.endswith("stopped after 3 answers\n")
    finally:
        served.process.kill()


@pytest.mark.thorough
def test_killed_and_started_again(tmp_path: Path) -> None:
    folder, want = folder_of(tmp_path, 1).path, None
    for which, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 0)):
        served = Process(folder)
        try:
            status, found = served.ask("POST", "/tasks/t0/predict", png())
            assert status == 200 and found == (found if want is None else want)
            want = found
            assert served.end(which)[0] == code
        finally:
            served.process.kill()


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["timm:resnet5", "{folder}", "--weights", "random"], "no model 'resnet5'"),
        (["python:serving.base", "{folder}/none"], "path: expected a folder"),
        (["python:serving.base", "{folder}", "--pin", "t9"], "no task 't9'"),
        (["python:serving.base", "{folder}", "--pack", "int9"], "codec"),
        (["python:serving.base", "{folder}", "--size", "8"], "expected size and channels, or neither"),
        (
            ["python:serving.base", "{folder}", "--max-resident", "2 bytes"],
            "expected bytes such as 512, 200MB or 1.5GB",
        ),
        (["python:serving.base", "{folder}", "--max-delay", "-1"], "expected seconds from 0 to 60"),
        (["python:serving.base", "{folder}", "--port", "65536"], "expected a port from 0 to 65535"),
        (["python:serving.base", "{folder}", "--port", "{port}"], "cannot listen on 127.0.0.1:{port}"),
        (["nowhere.toml", "{folder}"], "nowhere.toml"),
    ],
)
def test_mistakes_are_one_line(call: Any, tmp_path: Path, words: list[str], problem: str) -> None:
    folder = folder_of(tmp_path, 1).path
    with socket.create_server(("127.0.0.1", 0)) as taken:
        fill = {"folder": folder, "port": taken.getsockname()[1]}
        code, out, err = call("serve", *[word.format(**fill) for word in words])
    lines = [line for line in err.splitlines() if not line.startswith("taps: warning:")]
    assert (code, out, len(lines)) == (2, "", 1), err
    assert lines[0].startswith("taps: error: ") and problem.format(**fill) in lines[0]


def test_without_the_extra(call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, _, err = call("serve", "python:serving.base", folder_of(tmp_path, 1).path)
    assert code == 2 and "serve: uvicorn is not installed: pip install taps_ext[serve]" in err
