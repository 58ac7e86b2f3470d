"""Dataflow: which layer's result each normalisation alone reads, as one forward shows it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..parts.host import held, is_norm, original_class

LAYERS = {nn.Linear: 0, nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
"""The layers that are looked for, and the dimensions of a kernel of theirs."""


@dataclass
class Dataflow:
    """What one forward says of the normalisations of a model.

    Attributes:
        layer: norm -> the linear or convolution layer whose result is its input, and is read by nothing else, where
            both run once, on a batch. why: norm -> why there is none.
    """

    layer: dict[str, str] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)


class _Watch(TorchDispatchMode):
    """Who reads the results and the weights of layers: the operators of a norm, of a layer, or others (None)."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[str] = []  # of the watched modules, the innermost last
        self.results: dict[int, tuple[str, Tensor]] = {}  # held, so that no other tensor gets the id
        self.weights: dict[int, str] = {}
        self.readers: dict[str, set[str | None]] = {}
        self.borrowed: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reader = self.running[-1] if self.running else None
        for leaf in tree_leaves((args, kwargs)):
            if id(leaf) in self.results:
                self.readers[self.results[id(leaf)][0]].add(reader)
            if self.weights.get(id(leaf), reader) != reader:
                self.borrowed.add(self.weights[id(leaf)])
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def dataflow(base: nn.Module, run: Callable[[], Any]) -> Dataflow:
    """Watch one forward of a model.

    Args:
        base: the model, whose modules may be routed. run: calls it, once, as it is to be used.
    """
    norms = {name: module for name, module in base.named_modules() if is_norm(module)}
    layers = {name: module for name, module in base.named_modules() if original_class(module) in LAYERS}
    calls: Counter[str] = Counter()
    inputs: dict[str, Any] = {}
    watch = _Watch()
    handles: list[Any] = []
    for name, module in {**layers, **norms}.items():

        def before(module: nn.Module, args: Any, name: str = name) -> None:
            calls[name] += 1
            watch.running.append(name)
            inputs[name] = args[0] if args else None

        def after(module: nn.Module, args: Any, result: Any, name: str = name) -> None:
            watch.running.pop()
            if name in layers and isinstance(result, Tensor):
                watch.results[id(result)] = (name, result)
                watch.readers.setdefault(name, set())

        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    for name, layer in layers.items():
        watch.weights |= {id(tensor): name for key in ("weight", "bias") if (tensor := held(layer, key)) is not None}
    try:
        with watch:
            output = run()
    finally:
        for handle in handles:
            handle.remove()
    given = {watch.results[id(leaf)][0] for leaf in tree_leaves(output) if id(leaf) in watch.results}
    found = Dataflow()
    for name in norms:
        made = watch.results.get(id(inputs.get(name)))
        if not calls[name]:
            found.why[name] = "this forward does not run it"
        elif calls[name] > 1:
            found.why[name] = f"it runs {calls[name]} times in a forward"
        elif made is None:
            found.why[name] = "its input is not the result of a linear or convolution layer"
        else:
            layer, result = made
            dims = LAYERS[original_class(layers[layer])]
            if calls[layer] > 1:
                found.why[name] = f"{layer} before it runs {calls[layer]} times in a forward"
            elif watch.readers[layer] != {name} or layer in given:
                found.why[name] = f"the result of {layer} before it is used elsewhere, too"
            elif layer in watch.borrowed:
                found.why[name] = f"the weight of {layer} before it is used elsewhere, too"
            elif result.dim() != dims + 2:
                found.why[name] = f"it does not normalise the outputs of {layer} before it"
            else:
                found.layer[name] = layer
    return found
