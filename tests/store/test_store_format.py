"""What is written is valid safetensors, canonical, and comes back bit for bit."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from store_files import PARENT, VERSIONS, Record, blob_of, example, parts, state, stranger

from taps_ext import store
from taps_ext.store import format as fmt
from taps_ext.store import strict_json, tensors
from taps_ext.store.errors import DuplicateKeyError, HeaderError, LimitError, TaskFileError

safetensors_torch = pytest.importorskip("safetensors.torch")

SHAPES = [(), (0,), (1,), (3, 0, 5), (17,), (3, 5), (2, 3, 1, 4), (257, 3)]


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensors.memory(tensor.contiguous()))


def random_bits(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Any bit pattern: NaNs with payloads, infinities, denormals, negative zero."""
    if dtype is torch.bool:
        return torch.randint(0, 2, shape).bool()
    tensor = torch.empty(shape, dtype=dtype)
    count = tensor.numel() * tensor.element_size()
    if count:
        tensor.view(-1).view(torch.uint8).copy_(torch.randint(0, 256, (count,), dtype=torch.uint8))
    return tensor


def task_of(tensors: dict[str, torch.Tensor]) -> store.TaskFile:
    """A task of one part, of the module `m`."""
    parts = {"m": Record({"kind": "x"}, tensors)}
    return store.TaskFile(method={"method": "full"}, parent=PARENT, parts=parts, versions=dict(VERSIONS))


def state_of(values: dict[str, torch.Tensor]) -> store.TaskFile:
    return state(values=values)


@pytest.mark.parametrize("dtype", fmt.DTYPES.values(), ids=fmt.DTYPES)
def test_every_dtype_and_shape_comes_back_bit_equal(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    values = {f"t{i}": random_bits(dtype, shape) for i, shape in enumerate(SHAPES)}
    path = tmp_path / "a.taps"
    for task, stored in ((task_of(values), "m:{}"), (state_of(values), "{}.value")):
        store.save(path, task)
        back, theirs = store.load(path), safetensors_torch.load_file(path)
        ours = back.values if task.kind == "state" else back.parts["m"].tensors
        assert ours.keys() == values.keys() and theirs.keys() == {stored.format(n) for n in values}
        for name, tensor in values.items():
            for found in (ours[name], theirs[stored.format(name)]):
                assert found.dtype == dtype and found.shape == tensor.shape
                assert bits(found) == bits(tensor)


def test_special_numbers() -> None:
    special = torch.tensor([0x7FC00001, -0x3FFFFF, -(2**31), 0x7F800000, 1], dtype=torch.int32).view(torch.float32)
    assert special[0].isnan() and special[2] == 0 and torch.signbit(special[2])
    quiet = torch.tensor([0x7FC00002], dtype=torch.int32).view(torch.float32)
    assert store.tensor_digest(special[:1]) != store.tensor_digest(quiet)
    assert store.tensor_digest(torch.tensor(0.0)) != store.tensor_digest(torch.tensor(-0.0))


def test_their_metadata_and_ours(tmp_path: Path) -> None:
    from safetensors import safe_open

    path = tmp_path / "a.taps"
    store.save(path, example(extra={"format": "pt", "note": 'quotes " \\ and\nlines, Grüße 鳥'}))
    with safe_open(path, framework="pt") as theirs:
        metadata = theirs.metadata()
    assert metadata["taps.format"] == "1.2" and json.loads(metadata["taps.labels"]) == ["jay", "wren"]
    assert store.load(path).extra == {"format": "pt", "note": metadata["note"]}


def test_their_files_are_read_and_saved_files_of_theirs_are_no_tasks(tmp_path: Path) -> None:
    path = tmp_path / "base.safetensors"
    theirs = {
        "w": torch.randn(3, 4),
        "n": torch.tensor(3),
        "h": torch.randn(2).half(),
        "e": torch.empty(0, 2),
    }
    safetensors_torch.save_file(theirs, path, metadata={"a": "b"})
    ours, metadata = store.read_safetensors(path)
    assert metadata == {"a": "b"} and ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], t) and ours[n].dtype == t.dtype for n, t in theirs.items())
    with pytest.raises(TaskFileError, match="not a task file"):
        store.load(path)


def test_a_copy_saved_by_safetensors_is_refused_not_half_read(tmp_path: Path) -> None:
    path = tmp_path / "a.taps"
    store.save(path, example())
    safetensors_torch.save_file(safetensors_torch.load_file(path), path)
    with pytest.raises(TaskFileError, match=r"taps\.format"):
        store.load(path)


def test_same_content_same_bytes(tmp_path: Path) -> None:
    task = example()
    first = blob_of(task, tmp_path)
    gate = {"threshold": task.parts["conv1"].facts["gate"]["threshold"], "open": True, "learn": True}
    reordered = {
        module: Record(dict(reversed(record.facts.items())), dict(reversed(record.tensors.items())), module="elsewhere")
        for module, record in reversed(task.parts.items())
    }
    shuffled = example(parts=reordered, method={"lam": 1.0, "method": "taps"}, path="elsewhere", digest="another")
    conv = shuffled.parts["conv1"]
    conv.facts["gate"] = gate
    delta = conv.tensors["delta"].to(memory_format=torch.channels_last)
    conv.tensors = {**conv.tensors, "delta": torch.nn.Parameter(delta)}
    assert blob_of(shuffled, tmp_path) == first
    loaded = store.load(tmp_path / "made.taps")
    assert blob_of(loaded, tmp_path) == first
    loaded.labels = ["jay", "owl"]
    assert blob_of(loaded, tmp_path) != first


def test_every_fact_counts(tmp_path: Path) -> None:
    """Facts that differ, if only in the type of a number, are other files."""
    blobs = {blob_of(example(parts={"a": Record({"kind": "x", "y": y})}), tmp_path) for y in (1, 1.0, "1", [1])}
    blobs |= {blob_of(example(parts=table), tmp_path) for table in (parts(), {**parts(), "blocks.1": stranger()})}
    blobs.add(blob_of(example(), tmp_path))
    assert len(blobs) == 7


def test_strides_views_and_lazy_negation(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    negated = torch.complex(torch.zeros(3), torch.arange(3.0)).conj().imag
    assert negated.is_neg()
    values = {"t": base.t(), "step": base[::2, 1::2], "expanded": base[:1].expand(3, 6), "negated": negated}
    store.save(tmp_path / "a.taps", task_of(values))
    back = store.load(tmp_path / "a.taps").parts["m"].tensors
    for name, tensor in values.items():
        assert torch.equal(back[name], tensor) and store.tensor_digest(back[name]) == store.tensor_digest(tensor)


def test_layout_is_aligned_and_ordered(tmp_path: Path) -> None:
    values = {f"{n}{i}": random_bits(d, (i,)) for i, (n, d) in enumerate(fmt.DTYPES.items())}
    path = tmp_path / "a.taps"
    store.save(path, task_of(values))
    header = store.read_header(path)
    data_begin = header.file_bytes - max(t.end for t in header.tensors.values())
    assert data_begin % 8 == 0
    for info in header.tensors.values():
        assert (data_begin + info.begin) % info.torch_dtype.itemsize == 0
    keys = [(-t.torch_dtype.itemsize, t.name) for t in header.tensors.values()]
    assert keys == sorted(keys)


def test_big_endian_hosts_write_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host is big-endian when its memory holds swapped bytes: swap the values, and pretend."""
    values = {
        "f": torch.randn(3, 2),
        "h": torch.randn(5).half(),
        "i": torch.arange(4),
        "b": torch.tensor([True]),
    }
    blob = blob_of(task_of(values), tmp_path)
    monkeypatch.setattr("sys.byteorder", "big")
    swapped = {name: tensors.swap_bytes(tensor) for name, tensor in values.items()}
    assert blob_of(task_of(swapped), tmp_path) == blob
    back = store.load(tmp_path / "made.taps").parts["m"].tensors
    assert all(bits(back[name]) == bits(swapped[name]) for name in values)


@pytest.mark.parametrize("make", [task_of, state_of])
def test_limits_hold_for_the_writer_too(make: Callable[..., store.TaskFile], tmp_path: Path) -> None:
    one = torch.zeros(0)
    most = fmt.MAX_TENSORS if make is state_of else fmt.MAX_TASK_TENSORS
    with pytest.raises(LimitError, match=rf"more than {most} tensors|{most + 1} tensors"):
        store.save(tmp_path / "a.taps", make(dict.fromkeys(map(str, range(most + 1)), one)))
    with pytest.raises(LimitError, match="header of"):
        store.save(tmp_path / "a.taps", example(labels=["x" * (1 << 20)] * 17))
    with pytest.raises(LimitError, match="513 characters"):
        store.save(tmp_path / "a.taps", make({"x" * 513: one}))
    assert list(tmp_path.iterdir()) == []


def test_the_writer_writes_no_table_that_is_not_read(tmp_path: Path) -> None:
    many = {str(i): Record({"kind": "x", "y": [0] * 30}) for i in range(8_000)}
    with pytest.raises(LimitError, match=r"taps\.parts: at most \d+ JSON tokens"):
        store.save(tmp_path / "a.taps", example(parts=many))
    assert list(tmp_path.iterdir()) == []


def words(count: int) -> dict[str, object]:
    """A third of so many tokens in each of three entries."""
    third = count // 3
    return {
        "method": {"method": "taps", "x": [0] * third},
        "metrics": {"x": [0] * third},
        "labels": [""] * third,
    }


@pytest.mark.parametrize("content", ["tokens", "parts", "entries"])
def test_what_costs_more_than_a_task_may(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer refuses what the reader does, and the reader what the writer would not write."""
    path = tmp_path / "a.taps"
    makes = {
        "tokens": lambda more: example(**words(fmt.MAX_ENTRY_TOKENS - 2_000 + more * 3_000)),
        "parts": lambda more: example(
            parts={str(i): Record({"kind": "x"}) for i in range(fmt.MAX_TASK_TENSORS + more)}
        ),
        "entries": lambda more: example(extra={str(i): "" for i in range(fmt.MAX_ENTRIES - 11 + more)}),
    }
    problem = {
        "tokens": rf"at most {fmt.MAX_ENTRY_TOKENS} JSON tokens are read, got \d+, of which \d+ in other entries",
        "parts": f"{fmt.MAX_TASK_TENSORS + 1} parts, at most {fmt.MAX_TASK_TENSORS} allowed",
        "entries": f"entries, at most {fmt.MAX_ENTRIES} allowed",
    }[content]
    honest, dear = makes[content](0), makes[content](1)
    store.save(path, honest)
    assert len(store.load(path).parts) == len(honest.parts)
    with pytest.raises(LimitError, match=problem):
        store.save(tmp_path / "b.taps", dear)
    assert not (tmp_path / "b.taps").exists()
    with monkeypatch.context() as unchecked:
        unchecked.setattr(store.io, "check_tokens", lambda *a, **k: None)
        unchecked.setattr(store.io, "check_entries", lambda *a, **k: None)
        unchecked.setattr(store.metadata, "check_parts", lambda *a, **k: None)
        store.save(path, dear)
    with pytest.raises(LimitError, match=problem):
        store.read_header(path)


def test_a_states_limits_are_a_states(tmp_path: Path) -> None:
    """Neither a name nor a note that looks like a state's kind lets a task take more, nor where no state is wanted."""
    path, most = tmp_path / "a.taps", fmt.MAX_TASK_TENSORS
    store.save(path, state(values={f"part:{i}": torch.zeros(0) for i in range(most + 1)}))
    for act in (lambda: store.read_header(path, states=False), lambda: store.verify(path, states=False)):
        with pytest.raises(LimitError, match=f"{most + 1} tensors in a task's header"):
            act()
    with pytest.raises(LimitError, match=f"{most + 1} tensors in a task's header"):
        store.copy(path, tmp_path / "b.taps", replace=False)
    old = '"taps.method":"{\\"method\\":\\"trainer-state\\"}"'
    for mark in ("trainer-state", 'x\\"taps.kind":"state', old[1:-1], "x\\" + old[1:-1]):
        for count, size in ((300_000, 8), (1, 5 << 20)):
            key = f'"{mark}"' + ("" if '":"' in mark else ':"' + "x" * 3 + '"')
            more = "".join(f',"{i}":"{"x" * (size - 8)}"' for i in range(count))
            raw = ('{"__metadata__":{' + key + more + "}}").encode()
            json.loads(raw)
            path.write_bytes(len(raw).to_bytes(8, "little") + raw)
            with pytest.raises(LimitError, match="a task's header|JSON tokens"):
                store.read_header(path)


def test_many_parts(tmp_path: Path) -> None:
    """As many layers as a task's file may have: those of the largest model three times."""
    gate = {"learn": False, "open": True, "threshold": 0.5}
    facts = {"kind": "layer", "gate": gate, "change": {"kind": "dense"}}
    many = {f"l.{i}": Record(facts, {"delta": torch.tensor(float(i))}) for i in range(fmt.MAX_TASK_TENSORS)}
    store.save(tmp_path / "a.taps", example(parts=many))
    back = store.load(tmp_path / "a.taps").parts
    assert len(back) == fmt.MAX_TASK_TENSORS and back["l.8000"].tensors["delta"] == 8_000


def test_a_dear_header_is_refused_before_it_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of a task with more tensors or bytes than any has; that of a state only where a state may be."""
    path, parse = tmp_path / "a.taps", strict_json.loads
    most = fmt.MAX_TASK_TENSORS
    store.save(path, state(values={f"part:{i}": torch.zeros(0) for i in range(most + 1)}))
    assert len(store.load(path, kind="state").values) == len(store.read_header(path).tensors) == most + 1
    assert store.verify(path).ok
    raw = path.read_bytes()
    scanned: list[int] = []
    monkeypatch.setattr(strict_json, "loads", lambda text, **words: scanned.append(len(text)) or parse(text, **words))
    for kind in ("task", "shared"):
        with pytest.raises(LimitError, match=f"{most + 1} tensors in a task's header, at most {most} allowed"):
            store.load(path, kind=kind)
    path.write_bytes(raw.replace(b'"taps.kind":"state"', b'"taps.kind":"task" ', 1))
    with pytest.raises(LimitError, match=f"{most + 1} tensors in a task's header"):
        store.read_header(path)
    text = b'{"__metadata__":{"a":"' + b"x" * fmt.MAX_TASK_HEADER_BYTES + b'"}}'
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(LimitError, match=f"a task's header of {len(text)} bytes, at most {4 << 20} allowed"):
        store.verify(path)
    assert not scanned
    entry = b'"%d":{"dtype":"U8","shape":[],"data_\\u006fffsets":[0,0]},'  # by other letters it has too many tokens
    text = b"{" + b"".join(entry % i for i in range(3 * most)).rstrip(b",") + b"}"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(LimitError, match=f"at most {32 * most} JSON tokens"):
        store.verify(path)


@pytest.mark.parametrize(
    "value",
    [
        {},
        [],
        None,
        True,
        0,
        -1,
        2**64 - 1,
        0.1,
        -0.0,
        1e300,
        5e-324,
        "",
        'a"\\\n\u2028é鳥\U0001f426',
        {"": [[], {}]},
    ],
)
def test_json_comes_back(value: object) -> None:
    strict_json.check(value, path="p", where="w")
    back = strict_json.loads(strict_json.dumps(value), path="p", where="w")
    assert back == value and type(back) is type(value) and repr(back) == repr(value)


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ((1, 2), HeaderError),
        ({1: 2}, HeaderError),
        (float("nan"), HeaderError),
        (float("-inf"), HeaderError),
        (10**20, LimitError),
        ("\ud800", HeaderError),
        (b"bytes", HeaderError),
        ({"a": {"b": [torch.tensor(1)]}}, HeaderError),
    ],
)
def test_what_json_would_change_is_not_written(value: object, error: type[TaskFileError], tmp_path: Path) -> None:
    with pytest.raises(error, match=r"taps\.metrics\.m"):
        store.save(tmp_path / "a.taps", example(metrics={"m": value}))
    assert list(tmp_path.iterdir()) == []


def test_json_depth_is_the_same_for_reader_and_writer() -> None:
    deep: object = 1
    for _ in range(strict_json.MAX_DEPTH):
        deep = [deep]
    strict_json.check(deep, path="p", where="w")
    assert strict_json.loads(strict_json.dumps(deep), path="p", where="w") == deep
    with pytest.raises(LimitError, match="deeper"):
        strict_json.check([deep], path="p", where="w")
    with pytest.raises(LimitError, match="deeper"):
        strict_json.loads(strict_json.dumps([deep]), path="p", where="w")
    for extra in (0, 1):  # of both kinds in turn, beside others
        deep = 1
        for level in range(strict_json.MAX_DEPTH + extra):
            deep = {"a": deep, "b": [[]]} if level % 2 and level > 2 else [deep, 2]
        text = strict_json.dumps(deep)
        if extra:
            with pytest.raises(LimitError, match="deeper"):
                strict_json.loads(text, path="p", where="w")
        else:
            assert strict_json.loads(text, path="p", where="w") == deep


@pytest.mark.parametrize("text", ['"[[[' + "[" * 99 + '"', r'"\"' + "[" * 99 + '"', r'"\\\"' + "{" * 99 + '"', r'"\\"'])
def test_brackets_in_strings_are_no_depth(text: str) -> None:
    assert strict_json.loads(text, path="p", where="w") == json.loads(text)


@pytest.mark.parametrize(
    "text",
    [
        r'{"a":1,"\u0061":2}',
        '[{"a":{"b":1,"b":1}}]',
        '{"":1,"":2}',
        r'{"\"":1,"\"":2}',
        '{":":[],":":[]}',
        '{"a":{"x":1},"a":{"y":1,"z":2}}',
        '[[{"b":{}}],{"b":{}},{"c":3,"d":{"[":1},"c":3}]',
    ],
)
def test_duplicate_keys_at_any_level(text: str) -> None:
    with pytest.raises(DuplicateKeyError, match="occurs twice"):
        strict_json.loads(text, path="p", where="w")


def test_objects_without_duplicate_keys_are_read(tmp_path: Path) -> None:
    """Drawn at random, with strings of all that has a meaning in JSON: keys are counted in the text."""
    rng = random.Random(0)

    def draw(depth: int) -> object:
        kind = rng.randrange(4 if depth else 2)
        word = "".join(rng.choices('ab:,"[]{}\\ \n\u00e9', k=rng.randrange(5)))
        if kind == 0:
            return word
        if kind == 1:
            return rng.choice([None, True, 7, -1.5])
        many = range(rng.randrange(4))
        return [draw(depth - 1) for _ in many] if kind == 2 else {word + str(i): draw(depth - 1) for i in many}

    for _ in range(300):
        value = draw(6)
        for text in (strict_json.dumps(value), json.dumps(value, indent=1)):
            assert strict_json.loads(text, path="p", where="w") == value


@pytest.mark.parametrize("piece", ['"' * 99, '\\"', "\\\\", '""', "[],", '"a":', "{}", " ", '"\\', "1"])
def test_hostile_text_takes_linear_time(piece: str) -> None:
    text = (piece * (1 << 22))[: 4 << 20]
    with pytest.raises(TaskFileError):
        strict_json.loads("[" + text, path="p", where="w")
