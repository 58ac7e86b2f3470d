"""Patches of tensors in memory: bit for bit, all or nothing, each refusal with its own words."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
from patch_states import DTYPES, changed, copies, example, flat, random_pair, same
from safetensors.torch import load_file, save_file
from stages import SEED, THOROUGH
from torch import Tensor, nn

from taps_ext import ConfigError, TaskFileError, patch
from taps_ext.patch import applying, kernels
from taps_ext.patch.codes import CodeFault
from taps_ext.patch.errors import (
    AlreadyAppliedError,
    BaseMismatchError,
    ChainOrderError,
    OtherTensorsError,
    SharedMemoryError,
)
from taps_ext.store.errors import (
    DtypeMismatchError,
    MissingTensorError,
    ShapeMismatchError,
    TensorNameError,
    UnexpectedTensorError,
    UnsupportedTensorError,
)


def versions(state: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: tensor._version for name, tensor in state.items()}


@pytest.mark.parametrize("part", range(8))
def test_random_patches(part: int, record_property: Callable[[str, object], None]) -> None:
    """All dtypes, layouts, sizes and densities; through the file's bytes; 100,000 of them in the long run."""
    record_property("drawn", f"random patches from seed {SEED}")
    for number in range(12_500 if THOROUGH else 40):
        seed = int(SEED) * 1_000_000 + part * 100_000 + number
        old, new = random_pair(seed)
        made = patch.diff(old, new)
        read = patch.parse(made.to_bytes())
        assert (read.before, read.after) == (made.before, made.after), seed
        target = copies(old)
        done = patch.apply(target, read, verify=("full", "touched")[number % 2])
        assert same(target, new) and same(patch_plain(old, read), new), seed
        assert (done.before, done.after) == (patch.digest(old), patch.digest(new)), seed
        assert done.tensors == sum(not torch.equal(flat(old[name]), flat(new[name])) for name in old), seed


def patch_plain(old: dict[str, Tensor], made: patch.Patch) -> dict[str, Tensor]:
    """The same without the compiled kernels."""
    target, compiled = copies(old), kernels.C
    kernels.C = None
    try:
        patch.apply(target, made)
    finally:
        kernels.C = compiled
    return target


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
def test_every_dtype_on_every_road(dtype: torch.dtype, density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    for strides in ((40, 1), (1, 30), (80, 2)):
        old = {"w": changed(torch.empty_strided((30, 40), strides, dtype=dtype).zero_(), 1.0, generator)}
        new = {"w": changed(old["w"], density, generator)}
        made = patch.diff(old, new)
        with monkeypatch.context() as context:
            context.setattr(kernels, "C", None)
            assert patch.diff(old, new).to_bytes() == made.to_bytes()
        target = copies(old)
        patch.apply(target, made)
        assert same(target, new) and target["w"].stride() == strides


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for density, strides in ((0.0, (40, 1)), (0.02, (40, 1)), (0.02, (1, 30)), (1.0, (40, 1))):
        old = {"w": changed(torch.empty_strided((30, 40), strides, dtype=dtype).zero_(), 1.0, generator)}
        new = {"w": changed(old["w"], density, generator)}
        there = {name: tensor.cuda() for name, tensor in old.items()}
        made = patch.diff(old, new)
        assert patch.diff(there, {n: t.cuda() for n, t in new.items()}).to_bytes() == made.to_bytes()
        assert patch.diff(there, new).to_bytes() == made.to_bytes()
        state = patch.State(there)
        assert state.digest == made.before
        patch.apply(state, made)
        state.check()
        assert same(there, new)


def test_bits_not_values() -> None:
    old = {"w": torch.tensor([0.0, float("nan"), 1.0, 2.0] + [0.0] * 60)}
    new = {"w": old["w"].clone()}
    assert patch.diff(old, new).changed == {}
    new["w"][0] = -0.0
    new["w"].view(torch.int32)[1] ^= 5  # another NaN
    made = patch.diff(old, new)
    assert made.elements == 2
    patch.apply(old, made)
    assert same(old, new)


def test_bytes_for_each_changed_element() -> None:
    """Of a tensor with a part of its elements changed: an element's own, and about one for its number."""
    generator = torch.Generator().manual_seed(0)
    old = torch.zeros(400_000, dtype=torch.int16)
    for density, most in ((0.001, 2.1), (0.01, 1.1), (0.03, 1.01), (0.2, 0.63), (0.4, 0.32)):
        new = old.clone()
        new[torch.rand(len(old), generator=generator) < density] = 1
        made = patch.diff({"w": old.view(torch.bfloat16)}, {"w": new.view(torch.bfloat16)})
        assert made.elements == int(new.sum())
        assert made.nbytes / made.elements < 2 + most
    new = old + 1
    assert patch.diff({"w": old}, {"w": new}).changed["w"].part.coding == "whole"  # type: ignore[union-attr]


def test_codings_are_chosen_by_bytes() -> None:
    old, new = example()
    codings = {name: entry.part.coding for name, entry in patch.diff(old, new).changed.items() if entry.part}
    assert codings == {
        "bit": "bitmask",
        "far": "gap16",
        "gap": "gap8",
        "one": "whole",
        "truth": "gap8",
        "wide": "gap8",
    }
    far = torch.zeros(1 << 22, dtype=torch.uint8)
    there = far.clone()
    there[-1] = 1
    made = patch.diff({"w": far}, {"w": there}).changed["w"].part
    assert made is not None and (made.coding, len(made.places)) == ("gap32", 4)


def test_a_model_and_its_ties_and_versions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 8), nn.BatchNorm1d(8), nn.Linear(8, 20))
    model[2].weight = model[0].weight
    old = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model[0].weight[3] += 1
        model[1].running_mean[2] = 7
    new = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(old)
    made = patch.diff(old, new)
    before = versions(model.state_dict(keep_vars=True))
    patch.apply(model.state_dict(keep_vars=True), made)  # parameters that require gradients
    assert same(model.state_dict(), new) and made.elements == 17
    after = versions(model.state_dict(keep_vars=True))
    assert all((after[name] > before[name]) == (name in made.changed) for name in after)
    assert model[2].weight is model[0].weight


@pytest.mark.parametrize("seed", range(3))
def test_threads_change_nothing(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = random_pair(seed, most=9000)
    old.update(example()[0])
    new.update(example()[1])
    made = patch.diff(old, new)
    monkeypatch.setattr(applying, "MANY", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    target = copies(old)
    patch.apply(target, made)
    assert same(target, new)
    unchanged(target, lambda: patch.apply(target, made), AlreadyAppliedError, "already")


def test_an_application_is_proportional_to_the_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read of the state, in elements: what changes, with a State as without one."""
    old = {f"w{i}": torch.zeros(50_000) for i in range(4)}
    new = copies(old)
    new["w1"][::5000] = 1
    made, state = patch.diff(old, new), patch.State(old)
    monkeypatch.setattr(kernels, "sum_of", lambda tensor: pytest.fail("all of a tensor was read"))
    monkeypatch.setattr(applying, "forms_of", lambda given: pytest.fail("all of the state was read"))
    done = patch.apply(state, made)
    assert (done.tensors, done.elements, done.verified, state.digest) == (1, 10, "state", made.after)
    assert same(old, new)


# ----------------------------------------------------------------------------------------------- refusals


def unchanged(state: dict[str, Tensor], call: Callable[[], object], kind: type[BaseException], words: str) -> None:
    """It raises, and nothing was written."""
    before, seen = copies(state), versions(state)
    with pytest.raises(kind, match=words) as stop:
        call()
    assert same(state, before) and versions(state) == seen
    assert type(stop.value) is kind and len(str(stop.value)) < 1000


@pytest.mark.parametrize("verify", ["touched", "full"])
@pytest.mark.parametrize("kept", [False, True])
def test_twice_and_on_another_base(verify: str, kept: bool) -> None:
    old, new = example()
    made = patch.diff(old, new)
    target = copies(new)
    given = patch.State(target) if kept else target
    unchanged(target, lambda: patch.apply(given, made, verify=verify), AlreadyAppliedError, "already applied")
    for name in made.changed:  # half applied
        target = copies(old)
        target[name] = new[name].clone()
        given = patch.State(target) if kept else target
        call = partial(patch.apply, given, made, verify=verify)
        unchanged(target, call, BaseMismatchError, repr(name))
    target = copies(old)
    target["gap"][0, 0] += 1
    given = patch.State(target) if kept else target
    unchanged(target, lambda: patch.apply(given, made, verify=verify), BaseMismatchError, "tensor 'gap'")


def test_what_only_the_whole_state_tells() -> None:
    """An element that the patch does not touch: seen by verify="full" and by a State, not by the default."""
    old, new = example()
    made = patch.diff(old, new)
    odd = copies(old)
    odd["stays"][1, 1] = 77
    target = copies(odd)
    unchanged(target, lambda: patch.apply(target, made, verify="full"), BaseMismatchError, "'stays'")
    unchanged(target, lambda: patch.apply(patch.State(target), made), BaseMismatchError, "'stays'")
    assert patch.apply(target, made).verified == "touched"
    state = patch.State(copies(old))
    state.tensors["stays"][1, 1] = 77  # behind its back
    patch.apply(state, made)
    with pytest.raises(BaseMismatchError, match="'stays'.*was written to"):
        state.check()


def test_other_tensors() -> None:
    old, new = example()
    made = patch.diff(old, new)
    cases: list[tuple[dict[str, Tensor], type[Exception], str]] = [
        ({k: v for k, v in old.items() if k != "one"}, MissingTensorError, "'one': expected one"),
        ({**old, "two": torch.zeros(2)}, UnexpectedTensorError, "'two'"),
        ({**old, "gap": old["gap"].reshape(100, 30)}, ShapeMismatchError, r"\[30, 100\], got \[100, 30\]"),
        ({**old, "gap": old["gap"].view(torch.float16)}, DtypeMismatchError, "'gap': expected BF16, got F16"),
    ]
    for target, kind, words in cases:
        unchanged(target, lambda target=target: patch.apply(target, made), kind, words)  # type: ignore[misc]


def test_a_patch_that_adds_removes_or_reshapes() -> None:
    old, _ = example()
    rest = {name: tensor for name, tensor in old.items() if name != "one"}
    for new, word in (
        (rest, "removes"),
        ({**old, "two": torch.zeros(2)}, "adds"),
        ({**old, "gap": old["gap"].reshape(100, 30)}, "reshapes or retypes"),
        ({**old, "gap": old["gap"].view(torch.float16)}, "reshapes or retypes"),
    ):
        made = patch.parse(patch.diff(old, new).to_bytes())
        assert made.after == patch.digest(new)
        unchanged(old, lambda made=made: patch.apply(old, made), OtherTensorsError, word)  # type: ignore[misc]


def test_tensors_that_share_memory() -> None:
    base = torch.zeros(100)
    old = {"a": base[:60], "b": base[40:]}
    free = {"a": torch.ones(60), "b": torch.zeros(60)}
    unchanged(old, lambda: patch.apply(old, patch.diff(copies(old), free)), SharedMemoryError, "'b'.*with 'a'")
    tied = {"a": base, "b": base}
    apart = {"a": torch.ones(100), "b": torch.zeros(100)}
    unchanged(tied, lambda: patch.apply(tied, patch.diff(copies(tied), apart)), SharedMemoryError, "apart")
    wide = {"a": torch.zeros(1).expand(5)}
    made = patch.diff({"a": torch.zeros(5)}, {"a": torch.arange(5.0)})
    with pytest.raises(SharedMemoryError, match="expanded"):
        patch.apply(wide, made)
    halves = torch.zeros(4, 10)
    split = {"a": halves[:2], "b": halves[2:]}
    patch.apply(split, patch.diff(copies(split), {"a": torch.ones(2, 10), "b": torch.zeros(2, 10)}))
    assert halves[:2].eq(1).all() and halves[2:].eq(0).all()


def test_what_is_no_state() -> None:
    good = {"w": torch.zeros(3)}
    bad: list[tuple[Mapping[str, object], type[Exception], str]] = [
        ({"w": 3}, UnsupportedTensorError, "'w'.*got int"),
        ({"w": torch.zeros(3).to_sparse()}, UnsupportedTensorError, "sparse"),
        ({"w": torch.zeros(3, device="meta")}, UnsupportedTensorError, "meta"),
        ({"w": torch.zeros(3, dtype=torch.complex64).conj()}, UnsupportedTensorError, "lazy"),
        ({"": torch.zeros(3)}, TensorNameError, "name"),
        ({"a\n": torch.zeros(3)}, TensorNameError, "name"),
    ]
    made = patch.diff(good, good)
    for state, kind, words in bad:
        for call in (patch.digest, lambda s: patch.diff(good, s), lambda s: patch.apply(s, made), patch.State):
            with pytest.raises(kind, match=words):
                call(state)  # type: ignore[arg-type, operator]
    for call, words in (
        (lambda: patch.diff(good, 3), "new: expected a path or a mapping.*int"),
        (lambda: patch.apply(3, made), "target: expected a path"),  # type: ignore[arg-type]
        (lambda: patch.apply(good, 3), "patch: expected a Patch"),  # type: ignore[arg-type]
        (lambda: patch.apply(good, []), "patch: expected a Patch, a path, or a list of them, got an empty list"),
        (lambda: patch.apply(good, ()), "patch: expected a Patch, a path, or a list of them, got an empty tuple"),
        (lambda: patch.apply(good, {}), "patch: expected a Patch, a path, or a list of them, got dict"),  # type: ignore[arg-type]
        (lambda: patch.apply(good, made, verify="some"), "verify: expected one of full, touched, got 'some'"),
        (lambda: patch.apply(good, made, out="x"), "out: expected none"),
        (lambda: patch.State(3), "tensors: expected a mapping"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ConfigError, match=words):
            call()


def test_inference_tensors() -> None:
    with torch.inference_mode():
        old = {"w": torch.zeros(100)}
    made = patch.diff(old, {"w": torch.arange(100.0)})
    with pytest.raises(UnsupportedTensorError, match="inference"):
        patch.apply(old, made)
    with torch.inference_mode():
        patch.apply(old, made)
    assert torch.equal(old["w"], torch.arange(100.0))


def test_ctrl_c_between_two_tensors_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = example()
    made, prepare, calls = patch.diff(old, new), kernels.prepare, [0]

    def interrupted(target: Tensor, change: kernels.Numbers) -> tuple[int, Callable[[], None]]:
        replaced, write = prepare(target, change)

        def once() -> None:
            calls[0] += 1
            if calls[0] == 3:
                raise KeyboardInterrupt
            write()

        return replaced, once

    monkeypatch.setattr(kernels, "prepare", interrupted)
    monkeypatch.setattr(kernels, "C", None)  # the road on which all is proven first
    state = patch.State(copies(old))
    seen = versions(state.tensors)
    with pytest.raises(KeyboardInterrupt):
        patch.apply(state, made)
    assert same(state.tensors, new) and state.digest == made.after
    state.check()
    assert all((state.tensors[n]._version > seen[n]) == (n in made.changed) for n in seen)


# ------------------------------------------------------------------- written while they are proven, and put back


def layers(count: int = 5) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors that all can be swapped, several batches of changes each; in order of names."""
    generator = torch.Generator().manual_seed(0)
    dtypes = (torch.bfloat16, torch.float32, torch.uint8, torch.complex128, torch.float64)
    old = {f"w{i}": changed(torch.zeros(40, 500, dtype=dtypes[i]), 1.0, generator) for i in range(count)}
    return old, {name: changed(tensor, 0.03, generator) for name, tensor in old.items()}


def swaps_only(monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels.C is None:
        pytest.skip("the extension is missing")
    monkeypatch.setattr(kernels, "prepare", lambda *_: pytest.fail("two passes"))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("at", range(5))
def test_another_base_in_any_tensor(at: int, kept: bool, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit of one element is other, in the first place that is written or in the last: all else goes back."""
    swaps_only(monkeypatch)
    monkeypatch.setattr(applying, "MANY", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    old, new = layers()
    made, name = patch.diff(old, new), f"w{at}"
    numbers = kernels.numbers_of(made.changed[name].numbers())
    for place in (numbers[0], numbers[-1]):
        state = patch.State(copies(old))
        target = state.tensors
        unit = kernels.unit_of(target[name].dtype)
        target[name].view(-1).view(torch.uint8).view(-1, unit)[place, 0] ^= 1  # behind its back
        given = state if kept else target
        unchanged(target, lambda given=given: patch.apply(given, made), BaseMismatchError, f"tensor '{name}': does")  # type: ignore[misc]
        assert state.digest == made.before
        target[name].view(-1).view(torch.uint8).view(-1, unit)[place, 0] ^= 1
        assert patch.apply(state, made).after == made.after and same(target, new)


def test_all_that_are_wrong_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    swaps_only(monkeypatch)
    old, new = layers()
    made = patch.diff(old, new)
    for few in itertools.combinations(sorted(old), 2):
        target = {name: (new if name in few else old)[name].clone() for name in old}
        unchanged(target, lambda t=target: patch.apply(t, made), BaseMismatchError, rf"'{few[0]}' \(and 1 more\)")  # type: ignore[misc]
    target = copies(new)
    unchanged(target, lambda: patch.apply(target, made), AlreadyAppliedError, "already applied")


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", range(1, 6))
def test_what_stops_the_writing_puts_all_back(
    at: int, after: bool, error: type[BaseException], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each tensor, before and after it is written; a Ctrl-C while they are put back waits for the end of that."""
    swaps_only(monkeypatch)
    monkeypatch.setattr(applying, "MANY", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    swap, back, calls = kernels.Swap.swap, kernels.Swap.back, itertools.count(1)
    again = iter([False, True])  # a second Ctrl-C, after the first was put back

    def stopped(self: kernels.Swap) -> int:
        number = next(calls)
        if number == at and not after:
            raise error
        found = swap(self)
        if number == at:
            raise error
        return found

    def stopped_back(self: kernels.Swap) -> None:
        if next(again, False):
            raise KeyboardInterrupt
        back(self)

    monkeypatch.setattr(kernels.Swap, "swap", stopped)
    monkeypatch.setattr(kernels.Swap, "back", stopped_back)
    old, new = layers()
    made, state = patch.diff(old, new), patch.State(copies(old))
    unchanged(state.tensors, lambda: patch.apply(state, made), KeyboardInterrupt, "^$")
    assert state.digest == made.before
    state.check()
    patch.apply(state, made)
    assert same(state.tensors, new)


def test_an_index_that_is_none_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A patch in memory whose last tensor's index was written to: nothing of the others has changed."""
    swaps_only(monkeypatch)
    old, new = layers()
    made = patch.diff(old, new)
    part = made.changed["w4"].part
    assert part is not None
    part.places[-1] = 0
    unchanged(old, lambda: patch.apply(old, made), CodeFault, "Fault")


def test_both_roads_at_once() -> None:
    """Tied, strided and wholly new tensors are proven first; those that are swapped are not written if one of these is
    wrong, nor these if one of those is."""
    old, new = layers()
    generator = torch.Generator().manual_seed(1)
    old |= {"across": torch.zeros(50, 40).t(), "tied": torch.zeros(60, 60), "whole": torch.zeros(20)}
    new |= {"across": changed(old["across"], 0.1, generator), "tied": changed(old["tied"], 0.1, generator)}
    new |= {"whole": torch.arange(20.0) + 1, "tied.too": new["tied"]}
    old["tied.too"] = old["tied"]
    made = patch.diff(old, new)

    def tied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        target = copies(state)
        target["tied.too"] = target["tied"]
        return target

    target = tied(old)
    patch.apply(target, made)
    assert same(target, new) and target["tied"].data_ptr() == target["tied.too"].data_ptr()
    for name in made.changed:
        target = tied(old)
        target[name].copy_(new[name])
        word = "'tied' .and 1 more" if name.startswith("tied") else repr(name)
        unchanged(target, lambda t=target: patch.apply(t, made), BaseMismatchError, word)  # type: ignore[misc]


# ------------------------------------------------------------------------------------------------- chains


def chain(seed: int, length: int = 4) -> list[dict[str, Tensor]]:
    states = [random_pair(seed)[0]]
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    for _ in range(length - 1):
        states.append({n: changed(t, chance.choice((0.0, 0.02, 0.3, 1.0)), generator) for n, t in states[-1].items()})
    return states


@pytest.mark.parametrize("seed", range(2000 if THOROUGH else 40))
def test_a_chain_composes(seed: int) -> None:
    states = chain(seed)
    steps = [patch.diff(a, b) for a, b in itertools.pairwise(states)]
    one = copies(states[0])
    for step in steps:
        patch.apply(one, step)
    at_once, joined = copies(states[0]), patch.compose(patch.compose(steps[0], steps[1]), steps[2])
    patch.apply(at_once, patch.parse(joined.to_bytes()), verify="full")
    listed = copies(states[0])
    done = patch.apply(listed, steps)
    assert same(one, states[3]) and same(at_once, states[3]) and same(listed, states[3])
    direct = patch.diff(states[0], states[3])
    assert (joined.before, joined.after) == (direct.before, direct.after) == (done.before, done.after)


def test_a_chain_that_comes_back_and_one_that_reshapes() -> None:
    old, new = example()
    there, back = patch.diff(old, new), patch.diff(new, old)
    assert patch.compose(there, back).changed == {}
    more = {**new, "two": torch.arange(5), "gap": new["gap"].reshape(100, 30)}
    gone = {name: tensor for name, tensor in more.items() if name != "one"}
    odd = {**gone, "two": torch.arange(1, 6), "one": torch.tensor(3.0)}
    states = [old, new, more, gone, odd]
    steps = [patch.diff(a, b) for a, b in itertools.pairwise(states)]
    whole = steps[0]
    for number, step in enumerate(steps[1:], 2):
        whole = patch.compose(whole, step)
        assert patch.parse(whole.to_bytes()).after == patch.digest(states[number])


@pytest.mark.parametrize("verify", ["full", "touched"])
@pytest.mark.parametrize("form", ["file", "file that grows", "mapping", "state"])
def test_a_chain_that_is_applied_in_part(tmp_path: Path, form: str, verify: str) -> None:
    states = [{"w": torch.full((50,), float(i))} for i in range(4)]
    if form == "file that grows":
        for state in states[1:]:
            state["new"] = torch.ones(3)
    file = tmp_path / "x.safetensors"
    steps = [patch.diff(a, b) for a, b in itertools.pairwise(states)]
    chain = [patch.Patch(s.entries, f"{i}.tapspatch", s.before, s.after) for i, s in enumerate(steps)]

    def refusal(state: dict[str, Tensor]) -> str:
        save_file(state, file)
        held = copies(state)
        target = {"mapping": held, "state": patch.State(held)}.get(form, file)
        with pytest.raises(TaskFileError) as caught:
            patch.apply(target, chain, verify=verify)
        assert same(held, state) and same(load_file(file), state)
        return str(caught.value)

    assert refusal(states[1]).endswith(
        f"; it is at {steps[1].before}: the first patch is applied already; apply from '1.tapspatch'"
    )
    assert refusal(states[2]).endswith(
        f"; it is at {steps[2].before}: the first 2 patches are applied already; apply from '2.tapspatch'"
    )
    done = ": all 3 patches are applied already" if form == "file that grows" else " is already applied"
    assert refusal(states[3]).endswith(done)
    odd = {name: tensor + 9 for name, tensor in states[1].items()}
    assert refusal(odd).endswith(f"; it is at {patch.digest(odd)}")


def test_a_wrong_order_in_a_chain() -> None:
    states = [{"w": torch.full((50,), float(i))} for i in range(4)]
    steps = [patch.diff(a, b) for a, b in itertools.pairwise(states)]
    named = [patch.Patch(s.entries, f"{i}.tapspatch", s.before, s.after) for i, s in enumerate(steps)]
    target = copies(states[0])
    unchanged(target, lambda: patch.apply(target, [named[0], named[2]]), ChainOrderError, "patch 2 of 2: begins at")
    words = "the right order is '0.tapspatch', '1.tapspatch', '2.tapspatch'"
    unchanged(target, lambda: patch.apply(target, [named[1], named[0], named[2]]), ChainOrderError, words)
    with pytest.raises(ChainOrderError):
        patch.compose(named[1], named[0])
    unchanged(target, lambda: patch.apply(target, named[1]), BaseMismatchError, "'w'")
