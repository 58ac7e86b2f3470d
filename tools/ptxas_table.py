"""Turn the output of `ptxas -v` into one line per kernel and architecture; spills fail."""

import re
import subprocess
import sys
from pathlib import Path

text = Path(sys.argv[1]).read_text()
pattern = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<arch>\S+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)
kernels = [match.groupdict() for match in pattern.finditer(text)]
names = subprocess.run(
    ["c++filt"], input="\n".join(k["name"] for k in kernels), check=True, text=True, stdout=subprocess.PIPE
).stdout.splitlines()
spilled = 0
for kernel, name in sorted(zip(kernels, names, strict=True), key=lambda pair: (pair[1], pair[0]["arch"])):
    short = re.sub(r"\(anonymous namespace\)::|taps::cuda::|void |\(taps.*|\(double const.*", "", name)
    spills = int(kernel["stores"]) + int(kernel["loads"])
    spilled += spills > 0
    print(f"{short:32} {kernel['arch']:8} {kernel['registers']:>4} registers  {spills:>3} bytes spilled")
print(f"{len(kernels)} kernels compiled, {spilled} with spills")
sys.exit(1 if spilled or not kernels else 0)
