"""Metadata lives in pyproject.toml, the build in CMakeLists.txt; this file joins the two.

Environment: TAPS_CUDA (AUTO | ON | OFF) and TAPS_CUDA_ARCHITECTURES are passed on to CMake.
"""

import os
import sys

from setuptools import setup

CMAKE_OPTIONS = ("TAPS_CUDA", "TAPS_CUDA_ARCHITECTURES")

setup(
    cmake_source_dir=".",
    cmake_args=[f"-DPython_EXECUTABLE={sys.executable}"]
    + [f"-D{name}={os.environ[name]}" for name in CMAKE_OPTIONS if name in os.environ],
)
