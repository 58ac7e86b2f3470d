"""Print the requirements of the named extras in pyproject.toml, without building the package."""

import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with setuptools' own dependencies on 3.10

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
wanted = {name for extra in sys.argv[1:] for name in project["optional-dependencies"][extra]}
print(" ".join(sorted(wanted | set(project["dependencies"]))))
