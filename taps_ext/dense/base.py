"""DenseBase: a backbone whose features a task's decoder makes maps of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, suggestion
from . import streams
from .taps import LAYOUTS, check_names, example_image, example_of, find_taps, hooked, outputs_of, take, tap_of


class Gone(nn.Module):
    """In the place of a module behind the last tap, of which no decoder sees anything."""

    def forward(self, input: Any, *args: Any, **kwargs: Any) -> Any:
        return input


class Undecoded(nn.Module):
    """The base's own decoder, which tasks replace: the last map as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("place", torch.zeros(0), persistent=False)  # where heads from files are made

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        return maps[-1]


class DenseBase(nn.Module):
    """A backbone as the base of dense tasks: images `[B, C, H, W]` to what a task's decoder makes of its features.

        base = DenseBase(timm.create_model("mobilenetv2_100", pretrained=True))
        model = TaskModel(base, TapsConfig())
        model.add_task("roads", head=LightDecoder(base.channels, 11))
        model(images, task="roads")                            # [B, 11, H, W]

    The outputs of named modules, whatever the backbone is, are collected as it runs, turned into maps `[B, C, h, w]`,
    and handed with the image's size to the child `decoder`, which is the head of this base: a task's own is called as
    `decoder(maps, (H, W))`. Without a task it is the last map.

    The names and layouts of the taps are in a buffer, so that files of tasks belong to a base with these taps alone.
    What runs behind the last tap (a classifier, the convolution and norm before it) is replaced in the backbone given:
    it is no part of this base, nor of its fingerprint.

    Args:
        backbone: any module that is called with images alone. It is taken, not copied.
        taps: names of its modules, finest map first; None finds them (:func:`find_taps`).
        layouts: "nchw", "nhwc" or "tokens" by name, where a tap's output says not by its shape.
        image: (channels, height, width) of an image to look at the features of; by default what the model was made
            for, or 224 pixels.

    Attributes:
        taps: a :class:`Tap` for each. tap_names: their modules, by name in this base. channels, strides: of the maps.

    Raises:
        ConfigError: a name that the backbone has not, an output that is no map of features, a backbone that needs what
            lies behind the last tap.
    """

    head_module = "decoder"
    """What tasks replace, for `TaskModel` to find."""

    def __init__(
        self,
        backbone: nn.Module,
        taps: Sequence[str] | None = None,
        *,
        layouts: Mapping[str, str] | None = None,
        image: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(backbone, nn.Module):
            raise ConfigError(f"backbone: expected an nn.Module, got {type(backbone).__name__}")
        names = check_names(backbone, find_taps(backbone, image) if taps is None else taps)
        given = dict(layouts or {})
        for name, layout in given.items():
            if name not in names:
                raise ConfigError(f"layouts: {name!r} is no tap{suggestion(name, names)}")
            if layout not in LAYOUTS:
                raise ConfigError(f"layouts: expected one of {list(LAYOUTS)}, got {layout!r}")
        example = example_of(backbone, image)
        changed: set[str] = set()
        before = outputs_of(backbone, names, example, changed)
        for name, output in zip(names, before, strict=True):
            if output is None:
                raise ConfigError(f"taps: expected the backbone's forward to run {name!r}, it did not")
        self.taps = tuple(
            tap_of(backbone, name, output, example, given.get(name)) for name, output in zip(names, before, strict=True)
        )
        self.tap_names = tuple(f"backbone.{name}" for name in names)
        self.channels = tuple(tap.channels for tap in self.taps)
        self.strides = tuple(tap.stride for tap in self.taps)
        _cut_behind(backbone, names, example, before)
        self._key = hooked(backbone, names, changed)
        said = ",".join(f"{tap.name}:{tap.layout}" for tap in self.taps)
        # A buffer, so that the fingerprint of this base, which files of tasks name, is that of its taps too.
        self.register_buffer("tapped", torch.tensor(list(said.encode()), dtype=torch.uint8))
        self.backbone = backbone
        self.decoder: nn.Module = Undecoded().to(next(backbone.parameters(), torch.zeros(0)).device)
        self.train(backbone.training)

    def features(self, image: Tensor) -> list[Tensor]:
        """The maps `[B, C, h, w]` of images `[B, C, H, W]`, one for each tap; of a task with streams (MTLoRA) its own.

        Raises:
            ConfigError: not such images; a tap that did not run, or returned something else than when it was wrapped.
        """
        if not isinstance(image, Tensor) or image.dim() != 4:
            got = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise ConfigError(f"image: expected images [B, C, H, W], got {got}")
        size = (image.shape[2], image.shape[3])
        outputs = take(self._key, self.backbone, [tap.name for tap in self.taps], image)
        return [tap.map(streams.of(output), size) for tap, output in zip(self.taps, outputs, strict=True)]

    def decode(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Any:
        """What the decoder makes of maps. `size`: (height, width) of the image."""
        return self.decoder(list(maps), size)

    def forward(self, image: Tensor) -> Any:
        return self.decode(self.features(image), (image.shape[2], image.shape[3]))


@torch.no_grad()
def _cut_behind(
    backbone: nn.Module, names: Sequence[str], example: tuple[int, int, int], before: Sequence[Any]
) -> None:
    """Replace the modules with parameters that run when all taps have, and only then."""
    waiting, early, late = set(names), set[str](), list[str]()
    handles = []
    for name, module in backbone.named_modules():

        def begun(module: nn.Module, args: Any, name: str = name) -> None:
            (early.add if waiting else late.append)(name)

        def done(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
            waiting.discard(name)

        handles += [module.register_forward_pre_hook(begun), module.register_forward_hook(done)]
    was = {module: module.training for module in backbone.modules()}
    try:
        for module in was:
            module.training = False
        backbone(example_image(backbone, example))
    finally:
        for handle in handles:
            handle.remove()
        for module, training in was.items():
            module.training = training
    behind: list[str] = []
    for name in dict.fromkeys(late):
        inside = any(name.startswith(f"{outer}.") for outer in behind)
        held = any(one == name or one.startswith(f"{name}.") for one in early)
        if not inside and not held and any(True for _ in backbone.get_submodule(name).parameters()):
            behind.append(name)
    for name in behind:
        parent, _, key = name.rpartition(".")
        backbone.get_submodule(parent)._modules[key] = Gone()
    try:
        after = outputs_of(backbone, names, example)
    except Exception as error:
        raise ConfigError(
            f"taps: expected a backbone that runs without what lies behind {names[-1]!r} ({', '.join(behind)}), but "
            f"{type(error).__name__}: {error}; name a later module as the last tap"
        ) from error
    for name, a, b in zip(names, before, after, strict=True):
        if not torch.equal(a, b):
            raise ConfigError(f"taps: {name!r} depends on what runs behind the last tap, or on chance")
