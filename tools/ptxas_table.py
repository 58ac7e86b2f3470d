"""Turn the output of `ptxas -v` into one line per kernel and architecture; spills and stacks fail.

Products are named Activation<Shape, type, W's, Delta's, backward> and WeightGradient<Shape, type, Delta's>; a Shape's
numbers are rows, columns and depth of a tile, warps down and across, most stages, and slices (csrc/cuda/stream.cuh).
Rows<most rows, type, W's, Delta's> is a forward without tiles (csrc/cuda/rows.cuh).
A block of csrc/cuda/linear.cu leaves room for a second one on its multiprocessor, where there is shared memory for two:
65,536 registers and 100 KiB (8.6, 8.9, 12.0), 164 (8.0) or 228 (9.0, 10.0) are there to be shared. A kernel whose
shared memory is dynamic has its size as the last argument of its template.
"""

import re
import subprocess
import sys
from pathlib import Path

PATTERN = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<arch>\S+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)
NOISE = re.compile(r"\(anonymous namespace\)::|taps::(cuda|dev)::|^void |\((taps|double const).*")

kernels = [match.groupdict() for match in PATTERN.finditer(Path(sys.argv[1]).read_text())]
names = subprocess.run(
    ["c++filt"], input="\n".join(k["name"] for k in kernels), check=True, text=True, stdout=subprocess.PIPE
).stdout.splitlines()
bad = 0
for kernel, name in sorted(zip(kernels, names, strict=True), key=lambda pair: (pair[1], pair[0]["arch"])):
    short = NOISE.sub("", name)
    shared = re.search(r"(?:, |<)(\d+)u>$", short)
    if shared:
        short = short[: shared.start()] + ("" if short[shared.start()] == "<" else ">")
    spills, stack = int(kernel["stores"]) + int(kernel["loads"]), int(kernel["stack"])
    bad += spills > 0 or stack > 0
    print(
        f"{short:78} {kernel['arch']:8} {kernel['registers']:>3} registers {shared.group(1) if shared else 0:>6} bytes "
        f"shared  {spills} spilled  {stack} stack"
    )
architectures = len({kernel["arch"] for kernel in kernels})
print(f"{len(set(names))} kernels x {architectures} architectures: {len(kernels)}, {bad} with spills or a stack")
sys.exit(1 if bad or not kernels else 0)
