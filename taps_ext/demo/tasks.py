"""The problems of `taps demo`: one base and the tasks it is adapted to, real images from installed packages.

All come out at one geometry, 16 x 16 grey, so that one small network serves them. Three image domains:
handwriting, print, photographs. They range from a task the base nearly solves to one unlike anything it has
seen.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..data.registry import open_source
from ..data.source import Source

SIZE = 16
CHANNELS = 1


@dataclass(frozen=True)
class DemoTask:
    """One problem of the demo: a task name, the spec of its data, and why it is there."""

    name: str
    spec: str
    why: str


BASE = DemoTask("base", "digits:plain", "what the base network is pretrained on")

TASKS = (
    DemoTask("parity", "digits:parity", "the base's own images under new labels"),
    DemoTask("rotated", "digits:rotated", "the base's classes, turned on their side"),
    DemoTask("occluded", "digits:occluded", "the base's classes, moved and partly hidden"),
    DemoTask("print", "glyphs:digits", "the base's classes in another domain; test fonts unseen"),
    DemoTask("letters", "glyphs:letters", "another domain and 26 new classes; test fonts unseen"),
    DemoTask("photos", "photos:patches", "photographs: the furthest from handwriting"),
)


def open_demo(seed: int = 0) -> tuple[Source, dict[str, Source]]:
    """The base's source and the tasks' sources by name, all [CHANNELS, SIZE, SIZE].

    Raises:
        SourceError: scikit-learn, matplotlib or pillow is not installed.
    """

    def load(task: DemoTask) -> Source:
        return open_source(task.spec, size=SIZE, channels=CHANNELS, seed=seed)

    return load(BASE), {task.name: load(task) for task in TASKS}
