"""What is written is valid safetensors, canonical, and comes back bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from store_files import PARENT, VERSIONS, blob_of, example

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


def values_file(values: dict[str, torch.Tensor]) -> store.TaskFile:
    return store.TaskFile(method={"method": "full"}, parent=PARENT, values=values, versions=dict(VERSIONS))


@pytest.mark.parametrize("dtype", fmt.DTYPES.values(), ids=fmt.DTYPES)
def test_every_dtype_and_shape_comes_back_bit_equal(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    values = {f"t{i}": random_bits(dtype, shape) for i, shape in enumerate(SHAPES)}
    path = tmp_path / "a.taps"
    store.save(path, values_file(values))
    ours, theirs = store.load(path).values, safetensors_torch.load_file(path)
    assert ours.keys() == values.keys() and theirs.keys() == {n + ".value" for n in values}
    for name, tensor in values.items():
        for back in (ours[name], theirs[name + ".value"]):
            assert back.dtype == dtype and back.shape == tensor.shape
            assert bits(back) == bits(tensor)


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
    assert metadata["taps.format"] == "1.0" and json.loads(metadata["taps.labels"]) == ["jay", "wren"]
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
    shuffled = example(
        layers=dict(reversed(task.layers.items())),
        norms=dict(reversed(task.norms.items())),
        method={"lam": 1.0, "method": "taps"},
    )
    delta = shuffled.layers["conv1"].delta
    assert delta is not None
    shuffled.layers["conv1"].delta = torch.nn.Parameter(delta.to(memory_format=torch.channels_last))
    assert blob_of(shuffled, tmp_path) == first
    loaded = store.load(tmp_path / "made.taps")
    assert blob_of(loaded, tmp_path) == first
    loaded.labels = ["jay", "owl"]
    assert blob_of(loaded, tmp_path) != first


def test_strides_views_and_lazy_negation(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    negated = torch.complex(torch.zeros(3), torch.arange(3.0)).conj().imag
    assert negated.is_neg()
    values = {"t": base.t(), "step": base[::2, 1::2], "expanded": base[:1].expand(3, 6), "negated": negated}
    store.save(tmp_path / "a.taps", values_file(values))
    back = store.load(tmp_path / "a.taps").values
    for name, tensor in values.items():
        assert torch.equal(back[name], tensor) and store.tensor_digest(back[name]) == store.tensor_digest(tensor)


def test_layout_is_aligned_and_ordered(tmp_path: Path) -> None:
    values = {f"{n}{i}": random_bits(d, (i,)) for i, (n, d) in enumerate(fmt.DTYPES.items())}
    path = tmp_path / "a.taps"
    store.save(path, values_file(values))
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
    blob = blob_of(values_file(values), tmp_path)
    monkeypatch.setattr("sys.byteorder", "big")
    swapped = {name: tensors.swap_bytes(tensor) for name, tensor in values.items()}
    assert blob_of(values_file(swapped), tmp_path) == blob
    back = store.load(tmp_path / "made.taps").values
    assert all(bits(back[name]) == bits(swapped[name]) for name in values)


@pytest.mark.parametrize("count", [fmt.MAX_TENSORS + 1])
def test_limits_hold_for_the_writer_too(count: int, tmp_path: Path) -> None:
    one = torch.zeros(0)
    with pytest.raises(LimitError, match="65537 tensors"):
        store.save(tmp_path / "a.taps", values_file(dict.fromkeys(map(str, range(count)), one)))
    with pytest.raises(LimitError, match="header of"):
        store.save(tmp_path / "a.taps", example(labels=["x" * (1 << 20)] * 17))
    with pytest.raises(LimitError, match="513 characters"):
        store.save(tmp_path / "a.taps", values_file({"x" * 513: one}))
    assert list(tmp_path.iterdir()) == []


def test_many_tensors(tmp_path: Path) -> None:
    values = {f"layers.{i}.bias": torch.tensor(float(i)) for i in range(4_000)}
    store.save(tmp_path / "a.taps", values_file(values))
    assert store.load(tmp_path / "a.taps").values["layers.3999.bias"] == 3_999


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


@pytest.mark.parametrize("text", ['"[[[' + "[" * 99 + '"', r'"\"' + "[" * 99 + '"', r'"\\\"' + "{" * 99 + '"', r'"\\"'])
def test_brackets_in_strings_are_no_depth(text: str) -> None:
    assert strict_json.loads(text, path="p", where="w") == json.loads(text)


@pytest.mark.parametrize("text", [r'{"a":1,"\u0061":2}', '[{"a":{"b":1,"b":1}}]'])
def test_duplicate_keys_at_any_level(text: str) -> None:
    with pytest.raises(DuplicateKeyError, match="occurs twice"):
        strict_json.loads(text, path="p", where="w")


@pytest.mark.parametrize("piece", ['"' * 99, '\\"', "\\\\", '""', "[],", '"a":', "{}", " ", '"\\', "1"])
def test_hostile_text_takes_linear_time(piece: str) -> None:
    text = (piece * (1 << 22))[: 4 << 20]
    with pytest.raises(TaskFileError):
        strict_json.loads("[" + text, path="p", where="w")
