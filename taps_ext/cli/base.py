"""Base models by name (timm, torchvision or a function of your own), with weights from a local file."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, suggestion

if TYPE_CHECKING:
    from torch import nn

EXPECTED = "expected timm:NAME, torchvision:NAME or python:MODULE.FUNCTION"


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(f"base.model: {name} is not installed: pip install {name}") from None


def _factory(spec: str) -> tuple[Any, dict[str, Any]]:
    """The callable that makes the model and what to call it with."""
    scheme, _, name = spec.partition(":")
    if scheme == "timm" and name:
        timm = _library("timm")
        if not timm.is_model(name.split(".")[0]):
            hint = suggestion(name, timm.list_models())
            raise ConfigError(f"base.model: timm has no model {name!r}{hint}")
        return timm.create_model, {"model_name": name}
    if scheme == "torchvision" and name:
        models = _library("torchvision").models
        if name not in models.list_models():
            raise ConfigError(f"base.model: torchvision has no model {name!r}{suggestion(name, models.list_models())}")
        return models.get_model, {"name": name}
    if scheme == "python" and name:
        from ..data.python import find_function

        return find_function(name), {}
    raise ConfigError(f"base.model: {EXPECTED}, got {spec!r}")


def build_base(section: Mapping[str, Any]) -> nn.Module:
    """The base that a `[base]` section describes, in evaluation mode.

    Keys: `model`; `weights`: a safetensors file, or "random" for an untrained base drawn from `seed` (default
    0); `num_classes` and `args`: passed to the factory; `head_module` and `unsupported` are used by the caller.

    Raises:
        ConfigError: an unknown model, arguments that it refuses, weights that do not fit it exactly.
        TaskFileError: the weights are no safetensors file.
    """
    import torch
    from torch import nn

    spec, args = section.get("model"), section.get("args", {})
    if not isinstance(spec, str):
        raise ConfigError(f"base.model: {EXPECTED}, got {spec!r}")
    if not isinstance(args, dict):
        raise ConfigError(f"base.args: expected a table of arguments, got {args!r}")
    seed, weights = section.get("seed", 0), section.get("weights")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ConfigError(f"base.seed: expected an int >= 0, got {seed!r}")
    if weights is not None and not isinstance(weights, str):
        raise ConfigError(f"base.weights: expected a file name or 'random', got {weights!r}")
    brings_its_own = spec.startswith("python:") or args.get("pretrained") or args.get("weights")
    if weights is None and not brings_its_own:
        raise ConfigError(
            "base.weights: expected a safetensors file, 'random' (an untrained base) or args = {pretrained = true}, "
            "got none"
        )
    factory, settings = _factory(spec)
    if "num_classes" in section:
        settings["num_classes"] = section["num_classes"]
    settings.update(args)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = factory(**settings)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ConfigError(f"base.model: {spec} with {settings} failed: {reason}") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"base.model: expected {spec} to make an nn.Module, got {type(model).__name__}")
    if weights is not None and weights != "random":
        load_weights(model, weights)
    return model.eval()


def load_weights(model: nn.Module, path: str) -> None:
    """Fill a model from a safetensors file, or an index or folder of some, that holds exactly its state, in name, shape
    and dtype; one tensor at a time.

    A file without the batch counters (`num_batches_tracked`) is accepted: evaluation does not read them.

    Raises:
        ConfigError: the first tensor that is missing, too many or of another shape or dtype.
        TaskFileError: the file cannot be read as safetensors.
    """
    import torch

    from .. import store
    from ..base.ownership import check_state
    from ..store import shards

    shards.check_machine()
    try:
        with shards.opened(path) as files:
            infos = {name: info for name, (_, info) in files.tensors.items()}
            likes = {n: torch.empty(info.shape, dtype=info.torch_dtype, device="meta") for n, info in infos.items()}
            wanted = model.state_dict(keep_vars=True)
            check_state(wanted, likes, where=f"base.weights: {path}", what="model", may_lack="num_batches_tracked")
            held = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
            if not all(id(wanted[name]) in held for name in likes):  # a module with a state of its own making
                model.load_state_dict({**model.state_dict(), **{name: files.read(name) for name in likes}})
                return
            with torch.no_grad():
                for name in likes:
                    wanted[name].copy_(files.read(name))
    except store.errors.HeaderError as error:
        raise ConfigError(f"base.weights: {path}: expected a safetensors file: {error.problem}") from None
