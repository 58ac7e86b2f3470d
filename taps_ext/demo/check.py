"""The demo's second process: rebuild the base from its file, run each task file, and say what came out.

`python -m taps_ext.demo.check DIR quick|whole FILE...` prints JSON: the base's fingerprint, and for each
file the digest of its logits on the test split. It knows nothing of what the first process computed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(folder: str, extent: str, *files: str) -> None:
    import torch

    from .. import TaskModel
    from ..cli.config import load_config
    from .run import digest, fingerprint, outputs, tensors

    torch.set_num_threads(1)  # as in the first process: the last bit of a sum depends on how it is split
    out = Path(folder)
    config = load_config(str(out / "demo.toml"))
    model = TaskModel(config.base(), head_module=config.head_module)
    digests = {}
    for file in files:
        name = model.load_task(out / file)
        x, _ = tensors(config.source(name), "test", extent == "quick")
        digests[file] = digest(outputs(model, x, task=name))
        model.delete_task(name)
    print(json.dumps({"fingerprint": fingerprint(model.base), "files": digests}))


if __name__ == "__main__":
    main(*sys.argv[1:])
