"""The operators with the device's kernels on the CPU: a build of the extension in which the twin runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from host_build import HOST, ROOT


@pytest.mark.thorough
def test_layers_on_the_twin(tmp_path) -> None:
    cmake = pytest.importorskip("cmake").CMAKE_BIN_DIR
    build = [f"{cmake}/cmake", "-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
    build += ["-DTAPS_CUDA=OFF", "-DTAPS_TWIN=ON", f"-DPython_EXECUTABLE={sys.executable}"]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}  # for ninja
    for command in (build, [f"{cmake}/cmake", "--build", str(tmp_path), "--parallel", "2"]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    (library,) = tmp_path.glob("_C.*.so")
    script = [sys.executable, str(HOST / "layers.py"), str(library)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.strip() == "3349 cases", (done.stdout + done.stderr)[-4000:]
