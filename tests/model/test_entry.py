"""Entry points: methods and attributes of the base, reached through the TaskModel."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from models import TinyNet, images, settle
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from taps_ext import BaseAttributeError, ConfigError, FullConfig, ProbeConfig, TapsConfig, TapsError, TaskModel


class Towers(nn.Module):
    """Two towers, of which a method runs one; settings, tensors and methods of every kind."""

    main_input_name = "pixels"

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("steps", torch.zeros(()))
        self.left, self.right = nn.Linear(6, 4), nn.Linear(5, 4)
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(4)
        self.fc = nn.Linear(4, 3)
        self.config = {"width": 4}
        self.note = "n"
        self.embed_text = lambda y: self.right(y)

    @property
    def device(self) -> torch.device:
        return self.scale.device

    @property
    def projected(self) -> Tensor:
        return self.fc.weight * self.scale

    @property
    def broken(self) -> str:
        raise AttributeError("of its own making")

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.fc(self.norm(self.drop(self.left(x))) * self.scale + self.right(y))

    def features(self, x: Tensor) -> Tensor:
        """The left tower's."""
        return self.norm(self.drop(self.left(x))) * self.scale

    @torch.no_grad()
    def repeat(self, x: Tensor, y: Tensor, *, times: int = 2) -> Tensor:
        """As `generate` does: the whole model, several times."""
        return torch.stack([self(x + i, y) for i in range(times)])

    def counted(self, x: Tensor) -> Tensor:
        self.steps += 1
        return x * self.steps

    def kinds(self, x: Tensor, task: str) -> Tensor:
        return x

    def many(self, x: Tensor, tasks: int = 1, **others: int) -> int:
        return tasks

    def others(self, x: Tensor, **others: int) -> dict[str, int]:
        return others

    def stream(self, x: Tensor):
        yield self.left(x)

    async def later(self, x: Tensor) -> Tensor:
        return self.left(x)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def fluent(self) -> nn.Module:
        return self

    def reset_classifier(self, num_classes: int) -> None:
        self.fc = nn.Linear(4, num_classes)

    def new_head(self) -> None:
        self.fc = nn.Linear(4, 3)

    def drop_right(self) -> None:
        del self.right

    def unfreeze(self) -> None:
        self.right.weight.requires_grad_(True)

    def extend(self) -> None:
        self.right.register_buffer("table", torch.zeros(2))

    def save_pretrained(self, path: str) -> None:
        raise AssertionError

    load_adapter = push_to_hub = set_adapter = save_pretrained

    @classmethod
    def made(cls) -> nn.Module:
        return cls()

    def in_training(self) -> bool:
        return self.training or self.drop.training

    def report(self) -> str:
        return "the base's"


def towers(config=None, **settings) -> TaskModel:
    torch.manual_seed(0)
    model = TaskModel(settle(Towers()), config or FullConfig(), **settings)
    for name, scale in (("a", 0.1), ("b", -0.2)):
        model.add_task(name, num_classes=3)
        with torch.no_grad():
            for key, p in model.state(name).named_parameters():
                if not key.endswith("score"):
                    p.add_(scale)
    return model.eval()


def xy(batch: int = 4) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(batch, 6), torch.randn(batch, 5)


def plain(model: TaskModel, name: str) -> Towers:
    return model._plain_copy(name).eval()


@pytest.mark.parametrize("gates", ["host", "device"])
@pytest.mark.parametrize("config", [FullConfig(), TapsConfig(lam=0.5, others="task"), ProbeConfig()])
def test_a_method_runs_the_active_task_or_the_named_one(config, gates: str) -> None:
    model, (x, y) = towers(config, gates=gates), xy()
    before = model.base.features(x)
    model.set_task("a")
    for name in ("a", "b"):
        want = plain(model, name)
        given = {} if name == "a" else {"task": "b"}
        with torch.no_grad():
            assert torch.equal(model.features(x, **given), want.features(x))
            assert torch.equal(model.embed_text(y, **given), want.right(y))
        got = model.repeat(x, y, times=3, **given)
        assert torch.equal(got, want.repeat(x, y, times=3)) and not got.requires_grad
    assert torch.equal(model.features(x, task=None), before) and torch.equal(model.base.features(x), before)
    with model.use_task(None):
        assert torch.equal(model.features(x), before)
    assert model.active_task == "a"


def test_a_merged_task_runs_merged() -> None:
    model, (x, y) = towers(), xy()
    want = model.repeat(x, y, task="a")
    model.merge_task("a")
    assert torch.equal(model.repeat(x, y, task="a"), want)
    model.train()
    with pytest.raises(TapsError, match="training: task 'a' is merged"):
        model.features(x, task="a")


def test_gates_are_fresh_and_hold_for_the_whole_method() -> None:
    model, (x, y) = towers(TapsConfig(lam=0.5)), xy()
    score = model.state("a").table["left"].gate.score
    open_, closed = model.features(x, task="a"), model.base.left(x)
    score.data.fill_(0.0)
    assert not torch.equal(model.features(x, task="a"), open_)
    want = model(x, y, task="a")

    def reopening(x: Tensor, y: Tensor) -> Tensor:
        first = model.base(x, y)
        score.data.fill_(1.0)  # read before the next call, not within this one
        return torch.stack([first, model.base(x, y)])

    model.base.reopening = reopening
    got = model.reopening(x, y, task="a")
    assert torch.equal(got[0], want) and torch.equal(got[1], want)
    assert torch.equal(model.features(x, task="a"), open_)
    assert torch.equal(model.base.left(x), closed)


def test_training_gives_the_gradients_that_the_whole_forward_gives() -> None:
    """A method is no less of a forward: the task's norms take the batch's statistics, closed Deltas get no gradient."""
    model, (x, y) = towers(TapsConfig(lam=0.5)), xy()
    model.base.drop.p = 0.0
    with torch.no_grad():
        model.state("a").table["right"].gate.score.zero_()
    model.train()
    other = copy.deepcopy(model)
    model.base.whole = lambda x, y: model.base.fc(model.base.features(x) + model.base.right(y))
    got, want = model.whole(x, y, task="a"), other(x, y, task="a")
    got.square().sum().backward()
    want.square().sum().backward()
    assert torch.equal(got, want)
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) and (p.grad is None or torch.equal(p.grad, q.grad)), name
    assert model.state("a").table["right"].change.delta.grad is None
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), other.buffers(), strict=True))
    assert all(p.grad is None for p in model.base.parameters())


def test_a_method_that_runs_a_part_is_no_bypass_and_proves_nothing_of_the_forward() -> None:
    model, (x, y) = towers(), xy()
    model.base.forward = lambda x, y: model.base.fc(model.base.left(x))
    model.train()
    assert model.features(x, task="a").requires_grad
    with pytest.raises(TapsError, match="never called forward on right"):
        model(x, y, task="a")


def test_checkpointing_around_a_method_recomputes_its_task() -> None:
    model, (x, _) = towers(), xy()
    model.set_task("a")
    model.train()
    model.base.drop.p = 0.0
    want = torch.autograd.grad(model.features(x).square().sum(), model.state("a").table["left"].change.delta)
    loss = checkpoint(model.features, x, use_reentrant=False).square().sum()
    model.set_task("b")
    got = torch.autograd.grad(loss, model.state("a").table["left"].change.delta)
    assert torch.equal(got[0], want[0])


def test_the_base_in_training_is_in_evaluation_mode_as_in_a_forward() -> None:
    model, (x, _) = towers(), xy()
    want = model.features(x, task=None)
    model.train()
    assert torch.equal(model.features(x, task=None), want) and model.in_training(task=None) is False
    assert model.in_training(task="a")
    assert model.fluent(task=None) is model
    with pytest.raises(TapsError, match="new_head: .*fc.weight, in whose place is another"):
        model.new_head(task=None)


def test_no_active_task_in_training_is_warned_of_where_it_is_called() -> None:
    model, (x, y) = towers(), xy()
    model.train()
    for call in (lambda: model.features(x), lambda: model(x, y)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        assert [w.filename for w in caught] == [__file__] and "no task is active" in str(caught[0].message)


@pytest.mark.parametrize(
    ("method", "what"),
    [
        ("counted", "steps, which was written to"),
        ("new_head", "fc.weight, in whose place is another"),
        ("drop_right", "right.weight, which is gone"),
        ("unfreeze", "right.weight, which requires gradients"),
        ("extend", "right.table, which is new"),
    ],
)
@pytest.mark.parametrize("task", ["a", None])
def test_a_method_that_changes_the_base_is_named_with_a_tensor(method: str, what: str, task: str | None) -> None:
    model = towers(ProbeConfig())
    with pytest.raises(TapsError, match=f"{method}: the base's method changed the base's tensor {what}"):
        getattr(model, method)(*xy()[: method == "counted"], task=task)


def test_a_tensor_that_a_method_writes_to_can_be_the_tasks() -> None:
    model, (x, _) = towers(FullConfig()), xy()
    assert torch.equal(model.counted(x, task="a"), x) and torch.equal(model.counted(x, task="a"), 2 * x)
    assert model.base.steps == 0


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("save_pretrained", "save_task"),
        ("push_to_hub", "merge_and_unload"),
        ("load_adapter", "load_task"),
        ("set_adapter", "set_task"),
        ("reset_classifier", "add_task"),
    ],
)
def test_what_is_for_whole_models_names_ours(name: str, ours: str) -> None:
    model = towers()
    with pytest.raises(TapsError, match=f"{name}: .*{ours}"):
        getattr(model, name)("x")
    assert not hasattr(model, name) and hasattr(model.base, name)
    with pytest.raises(AttributeError, match="neither has its base, a TinyNet"):
        getattr(TaskModel(TinyNet()), name)


def test_plain_attributes_are_the_bases_and_read_only() -> None:
    model = towers()
    assert model.config is model.base.config and model.note == "n" and model.device == torch.device("cpu")
    assert model.main_input_name == "pixels" and isinstance(model.made(), Towers)
    assert isinstance(model.default_config, FullConfig)
    for name in ("config", "note", "main_input_name", "device", "features", "fc", "scale"):
        with pytest.raises(BaseAttributeError, match=f"{name}: is the base's and can only be read"):
            setattr(model, name, None)
        with pytest.raises(AttributeError):
            delattr(model, name)
    assert model.base.note == "n"
    model.remark, model._note = 1, 2  # names that the base has not
    assert (model.remark, model._note) == (1, 2)


@pytest.mark.parametrize("name", ["fc", "scale", "steps", "projected"])
def test_modules_and_tensors_of_the_base_know_no_task(name: str) -> None:
    model = towers()
    with pytest.raises(BaseAttributeError, match=rf"{name}: is a .* of the base.*model\.base\.{name}"):
        getattr(model, name)


def test_a_method_does_not_return_modules_of_the_base() -> None:
    model = towers()
    with pytest.raises(TapsError, match=r"get_classifier: returned a module of the base.*model\.base\.get_classifier"):
        model.get_classifier(task="a")
    assert model.fluent(task="a") is model


def test_names_of_ours_win_and_what_is_not_there_is_said() -> None:
    model = towers()
    assert model.report("a").rows and model.base.report() == "the base's"
    assert model.state_dict().keys() != model.base.state_dict().keys()
    with pytest.raises(AttributeError, match="'TaskModel' object has no attribute 'colour', and neither has its base"):
        _ = model.colour
    with pytest.raises(AttributeError, match="'Towers' object has no attribute 'broken'"):
        _ = model.broken
    model.base._hidden = 1
    assert not hasattr(model, "_hidden")
    assert not hasattr(TaskModel(TinyNet()), "config")


def test_a_name_that_the_task_model_uses_itself_is_no_obstacle() -> None:
    base = TinyNet()
    base.gates = base.batch_dim = base.default_config = "the base's"
    model = TaskModel(base, ProbeConfig(), gates="host", batch_dim=1)
    assert (model.gates, model.batch_dim, model.default_config) == ("host", 1, ProbeConfig())


def test_arguments_called_task_and_tasks() -> None:
    model, (x, _) = towers(), xy()
    with pytest.raises(ConfigError, match=r"kinds: the base's method has an argument 'task'.*base\.my_kinds"):
        model.kinds(x, task="a")
    model.base.my_kinds = lambda x, kind: model.base.kinds(x, task=kind)
    assert model.my_kinds(x, "retrieval", task="a") is x
    assert model.many(x, tasks=3, task="a") == 3
    with pytest.raises(ConfigError, match="expected one of task and tasks, got both"):
        model.others(x, tasks=3, task="a")
    assert model.others(x, task="a", more=1) == {"more": 1}
    with pytest.raises(ConfigError, match="expected one of .*, got 'c'"):
        model.features(x, task="c")
    model.unload()
    with pytest.raises(TapsError, match="was unloaded"):
        model.features(x, task="a")


@pytest.mark.parametrize(("name", "kind"), [("stream", "generator"), ("later", "coroutine")])
def test_what_would_run_later_is_refused(name: str, kind: str) -> None:
    model, (x, _) = towers(), xy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a coroutine that nobody awaited
        with pytest.raises(TapsError, match=f"{name}: expected a method that has done its work.*got a {kind}"):
            getattr(model, name)(x, task="a")


def test_copies_and_pickles_never_ask_a_base_that_is_not_there() -> None:
    base, (x, _) = settle(Towers()), xy()
    del base.embed_text  # a lambda, which no pickle holds
    model = TaskModel(base, FullConfig()).eval()
    model.add_task("a", num_classes=3)
    empty = object.__new__(TaskModel)
    for name in ("config", "base", "features", "__setstate__x", "_states"):
        with pytest.raises(AttributeError):
            getattr(empty, name)
    want = model.features(x, task="a")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.base is not model.base and other.config is other.base.config
        assert torch.equal(other.features(x, task="a"), want)


def test_a_method_has_its_own_name_and_doc() -> None:
    model = towers()
    assert model.features.__doc__ == "The left tower's." and model.features.__name__ == "features"


def test_a_compiled_model_passes_methods_on() -> None:
    model, (x, y) = towers(), xy()
    model.set_task("a")
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(compiled(x, y), model(x, y)) and torch.equal(compiled.features(x), model.features(x))


def test_sampled_gates_learn_in_a_method() -> None:
    torch.manual_seed(0)
    model = TaskModel(settle(TinyNet()), TapsConfig(lam=0.5, gate_fraction=0.5))
    model.base.loss = lambda x, y: F.cross_entropy(model.base(x), y)
    model.add_task("t", num_classes=2)
    model.set_gates("t", open=[])
    model.train()
    model.loss(images(4), torch.tensor([0, 1, 1, 0]), task="t").backward()
    assert model.state("t").head.weight.grad is not None


class Deep(TinyNet):
    """With a token of the root's own, which makes its forward run on a task's copy of it, and a setting."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(3, 1, 1))
        self.shift, self.act = 0, F.relu

    def set_shift(self, shift: int) -> None:
        self.shift, self.act = shift, torch.tanh

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.act(x + self.token + self.shift))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("active", ["a", None])
@pytest.mark.parametrize("whole", [False, True], ids=["model", "base"])
def test_a_setting_that_a_method_makes_holds_for_all(train: bool, active: str | None, whole: bool) -> None:
    """Whoever runs meanwhile, as where it is called on the base."""
    torch.manual_seed(0)
    model, x = TaskModel(settle(Deep()), FullConfig()), images()
    for name in ("a", "b"):
        model.add_task(name, num_classes=4)
    before = [model.eval()(x, task=task) for task in ("a", "b", None)]
    model.train(train)
    (model.base if whole else model).set_shift(3, **({} if whole else {"task": active}))
    assert (model.shift, model.base.shift, model.base.act) == (3, 3, torch.tanh)
    after = [model.eval()(x, task=task) for task in ("a", "b", None)]
    assert not any(torch.equal(was, now) for was, now in zip(before, after, strict=True))
    plain = settle(Deep())
    plain.load_state_dict(model.base.state_dict())
    plain.set_shift(3)
    assert torch.equal(plain(x), after[2])
    assert torch.equal(model._plain_copy("b").eval()(x), after[1])


def test_a_task_is_not_set_by_assignment() -> None:
    model = TaskModel(nn.Linear(2, 2))
    with pytest.raises(AttributeError, match="task: expected model.set_task"):
        model.task = "a"
