"""The engine's answers are those of each task alone, whatever is in memory, in the batch, or wrong with a neighbour."""

from __future__ import annotations

import asyncio
import re
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from serving import GEOMETRY, SIDE, answers, folder_of, is_close, model, samples, write

from taps_ext import ConfigError, JointTapsConfig, TapsError, TaskFileError, TaskFolder, TaskModel
from taps_ext.serve import (
    Engine,
    EngineClosedError,
    InputError,
    QueueFullError,
    TaskReplacedError,
    TaskTooLargeError,
    UnknownTaskError,
)
from taps_ext.serve import batch as batches
from taps_ext.serve.building import bytes_of
from taps_ext.serve.counters import BOUNDS
from taps_ext.store.errors import ParentMismatchError

TASKS = 6


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("serve")
    folder_of(path, TASKS)
    return path / "folder"


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> TaskFolder:
    shutil.copytree(made, tmp_path / "tasks")
    return TaskFolder(tmp_path / "tasks")


@pytest.fixture(scope="module")
def wanted(made: Path) -> list[torch.Tensor]:
    """Of each task for `samples(8)`."""
    return answers([TaskFolder(made).file(f"t{i}") for i in range(TASKS)], samples(8))


@pytest.fixture(scope="module")
def nbytes(made: Path) -> int:
    """Of one task in memory, and of any."""
    alone = model()
    found = {bytes_of(alone.state(alone.load_task(TaskFolder(made).file(f"t{i}")))) for i in range(TASKS)}
    assert len(found) == 1
    return found.pop()


class Gate:
    """Holds the worker in its next forward until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.open, self.batches = threading.Event(), threading.Event(), list[list[str | None]]()
        run = batches.run

        def held(model: TaskModel, inputs: object, names: list[str | None], *rest: object) -> object:
            self.batches.append(list(names))
            self.entered.set()
            assert self.open.wait(30)
            return run(model, inputs, names, *rest)  # type: ignore[arg-type]

        monkeypatch.setattr(batches, "run", held)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def until(true: Callable[[], bool]) -> None:
    for _ in range(1000):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come")


# ------------------------------------------------------------------------------------------------ answers


def test_every_answer_is_that_of_its_task_alone(folder: TaskFolder, wanted: list[torch.Tensor]) -> None:
    x, served = samples(8), model()
    own = served.load_task(folder.file("t0"), "mine")  # beside the engine's
    with torch.no_grad():
        plain = served(x, task=None)
    with Engine(served, folder, max_batch=16) as engine:
        asked: list[tuple[int | None, int, Future[torch.Tensor]]] = []
        for i in range(240):
            task, row = (i * 5) % (TASKS + 1), i % 8
            number = None if task == TASKS else task
            given = x[row : row + 1] if number is None else x[row]  # of the base's own inputs nothing is known
            asked.append((number, row, engine.submit(given, None if number is None else f"t{number}")))
        for number, row, future in asked:
            want = plain[row : row + 1] if number is None else wanted[number][row]
            assert is_close(future.result(30), want)
        assert is_close(engine.predict(x, "t3"), wanted[3])
        assert is_close(engine.predict(x[2:3], "t3"), wanted[3][2:3])
        assert is_close(asyncio.run(engine.predict_async(x[1], "t1")), wanted[1][1])
        many = samples(8).repeat(5, 1, 1, 1)  # more than a batch
        assert is_close(engine.predict(many, "t5"), wanted[5].repeat(5, 1))
        stats = engine.stats()
        assert stats["requests"] == stats["answers"] == 244 and stats["samples"] == 240 + 8 + 1 + 1 + 40
        assert stats["batches"] < 60 and stats["queued_samples"] == 0 and stats["loads"] == TASKS
        assert sum(stats["latency"]["buckets"].values()) == 244
        assert not engine.predict(x, "t3").requires_grad
    assert served.tasks == [own]  # what was there before


def test_answers_share_no_memory(folder: TaskFolder) -> None:
    with Engine(model(), folder, max_delay=0.2) as engine:
        futures = [engine.submit(samples(1)[0], "t0") for _ in range(4)]
        found = [future.result(30) for future in futures]
        assert engine.stats()["batches"] == 1
        assert all(one.untyped_storage().nbytes() == one.nbytes for one in found)


def test_batches_fill_up_and_wait_no_longer_than_told(folder: TaskFolder, gate: Gate) -> None:
    x = samples(1)[0]
    with Engine(model(), folder, max_batch=4, max_delay=30.0, pin=["t0", "t1"]) as engine:
        gate.open.set()
        futures = [engine.submit(x, f"t{i % 2}") for i in range(8)]
        [future.result(10) for future in futures]  # two full ones; nobody waits for thirty seconds
        assert [len(names) for names in gate.batches] == [4, 4]
        assert all(len(set(names)) == 2 for names in gate.batches)
        last = engine.submit(x, "t0")
        with pytest.raises(TimeoutError):
            last.result(0.2)
        engine.close()  # which waits for nobody either
        assert last.result(0).shape == (4,)
    with Engine(model(), folder, max_delay=0.1, pin=["t0"]) as engine:
        begin = time.monotonic()
        engine.predict(x, "t0")
        assert 0.1 <= time.monotonic() - begin < 5


def test_packed_in_memory_as_in_the_file_or_as_asked(folder: TaskFolder, tmp_path: Path, nbytes: int) -> None:
    alone = model()
    alone.load_task(folder.file("t0"))
    alone.pack_task("t0", codec="int8")
    alone.save_task("t0", tmp_path / "packed.taps")
    folder.add(tmp_path / "packed.taps", "packed")
    small, x = bytes_of(alone.state("t0")), samples(4)
    with torch.no_grad():
        want = alone(x, task="t0")
    for pack, tasks in ((None, ["packed"]), ("int8", ["t0"])):
        with Engine(model(), folder, pack=pack) as engine:
            for task in tasks:
                assert is_close(engine.predict(x, task), want)
            assert engine.stats()["resident_bytes"] == small < nbytes
    with pytest.raises(ConfigError, match="codec"):
        Engine(model(), folder, pack="int9")


def test_a_callback_asks_for_more_and_must_not_wait(folder: TaskFolder) -> None:
    with Engine(model(), folder) as engine:
        found: list[object] = []

        def next_one(future: Future[torch.Tensor]) -> None:
            for wait in (lambda: engine.predict(samples(1), "t1"), lambda: engine.reload("t1")):
                with pytest.raises(TapsError, match="must not wait"):
                    wait()
            found.append(engine.submit(samples(1), "t1"))

        asked = engine.submit(samples(1), "t0")
        asked.add_done_callback(next_one)
        until(lambda: len(found) == 1)
        assert found[0].result(30).shape == (1, 4)  # type: ignore[attr-defined]
        again: list[object] = []  # an error is told where nothing is locked
        bad = engine.submit(samples(1)[:, :2], "t0")
        bad.add_done_callback(lambda _: again.append(engine.stats()["requests"]))
        until(lambda: again == [3])


# ---------------------------------------------------------------------------------------- what is in memory


def test_the_least_recently_used_goes_and_pinned_ones_stay(
    folder: TaskFolder, wanted: list[torch.Tensor], nbytes: int
) -> None:
    x = samples(8)
    with Engine(model(), folder, max_resident_bytes=3 * nbytes, pin=["t0"]) as engine:
        for i in (1, 2, 1, 3, 4, 0, 1, 5):
            assert is_close(engine.predict(x[i], f"t{i}"), wanted[i][i])
            stats = engine.stats()
            assert stats["resident_bytes"] == nbytes * stats["resident_tasks"] <= 3 * nbytes
            assert len(engine.model.tasks) == stats["resident_tasks"]
        # Loaded: 0, then 1, 2; 3 for 2, 4 for 1, 1 for 3, 5 for 4.
        assert engine.resident == ["t0", "t1", "t5"] and engine.stats()["evictions"] == 4
        assert engine.stats()["loads"] == 1 + 6


def test_a_task_that_fits_nowhere_is_its_own_error(folder: TaskFolder, tmp_path: Path, nbytes: int) -> None:
    folder.add(write(tmp_path / "wide.taps", "wide", 0, classes=1000))
    x = samples(1)[0]
    with Engine(model(), folder, max_resident_bytes=2 * nbytes, pin=["t0"]) as engine:
        with pytest.raises(TaskTooLargeError, match=f"'wide': takes .* max_resident_bytes = {2 * nbytes}"):
            engine.predict(x, "wide")
        engine.predict(x, "t1")
        with pytest.raises(TaskTooLargeError):
            engine.add(tmp_path / "wide.taps", "other")
        assert "other" not in folder and engine.resident == ["t0", "t1"]


def test_a_task_in_the_queue_is_answered_before_it_goes(
    folder: TaskFolder, wanted: list[torch.Tensor], nbytes: int, gate: Gate
) -> None:
    x = samples(8)
    with Engine(model(), folder, max_resident_bytes=2 * nbytes, max_delay=0.0) as engine:
        gate.open.set()
        for i in (0, 1):
            engine.predict(x[0], f"t{i}")
        gate.open.clear()
        gate.entered.clear()
        futures = {(0, 0): engine.submit(x[0], "t0")}
        assert gate.entered.wait(10)  # a batch runs with t0
        futures |= {(i, row): engine.submit(x[row], f"t{i}") for i in (1, 0) for row in (1, 2)}
        futures |= {(i, row): engine.submit(x[row], f"t{i}") for i in (2, 3) for row in (3, 4)}
        until(lambda: engine._install is not None)  # t2 is there, and there is no room
        futures |= {(i, row): engine.submit(x[row], f"t{i}") for i in (0, 1) for row in (5, 6)}
        gate.open.set()
        for (i, row), future in futures.items():
            assert is_close(future.result(30), wanted[i][row])
        assert engine.stats()["resident_bytes"] <= 2 * nbytes


def test_busy_tasks_make_room_for_one_that_comes(folder: TaskFolder, wanted: list[torch.Tensor], nbytes: int) -> None:
    """Of two for which there always are more requests than a batch takes, one goes for a third, and comes again."""
    x, stop = samples(8), threading.Event()

    def ask(engine: Engine, i: int) -> int:
        asked: list[Future[torch.Tensor]] = []
        while not stop.is_set():
            asked.append(engine.submit(x[i], f"t{i}"))
            if len(asked) > 40:
                assert is_close(asked[-40].result(30), wanted[i][i])
        assert all(is_close(future.result(30), wanted[i][i]) for future in asked[-40:])
        return len(asked)

    with (
        Engine(model(), folder, max_resident_bytes=2 * nbytes, max_batch=4, pin=["t0"]) as engine,
        ThreadPoolExecutor(2) as pool,
    ):
        engine.predict(x[1], "t1")
        busy = [pool.submit(ask, engine, i) for i in (0, 1)]
        try:
            until(lambda: engine.stats()["queued_samples"] > 60)
            for _ in range(3):
                assert is_close(engine.submit(x[2], "t2").result(20), wanted[2][2])
        finally:
            stop.set()
        assert all(future.result(60) > 40 for future in busy)


def test_families_are_shared_and_go_with_their_last_task(tmp_path: Path) -> None:
    """Two of one name, too: tasks and what they share, trained anew."""
    folder, x, want = TaskFolder(tmp_path / "tasks", create=True), samples(3), {}
    for seed in (1, 2):
        alone = TaskModel(model().unload(), JointTapsConfig(lam=0.1)).eval()
        names = [f"a{seed}", f"b{seed}"]
        for name in names:
            alone.add_task(name, num_classes=3)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in alone.families["joint-taps"].parameters():
                parameter.add_(torch.randn_like(parameter))
        where = tmp_path / str(seed)
        where.mkdir()
        alone.save_shared("joint-taps", where / "shared.taps")
        for name in names:
            alone.save_task(name, where / f"{name}.taps")
            with torch.no_grad():
                want[name] = alone(x, task=name)
    with Engine(model(), folder) as engine:
        for name in want:  # each finds its family beside it, and takes it along
            assert engine.add(tmp_path / name[1] / f"{name}.taps") == name
        assert len(engine.model.families) == 2
        total = engine.stats()["resident_bytes"]
        family = bytes_of(next(iter(engine.model.families.values())))
        assert total > 2 * family
        for name, output in want.items():
            assert is_close(engine.predict(x, name), output)
        for name in ("a1", "b1"):
            engine.remove(name)
        until(lambda: engine.stats()["resident_tasks"] == 2)
        until(lambda: len(engine.model.families) == 1)
        assert engine.stats()["resident_bytes"] == total // 2
    with Engine(model(), folder, max_resident_bytes=total // 2 + 100) as engine:  # from the folder alone
        for name in ("a2", "b2"):
            assert is_close(engine.predict(x, name), want[name])
    assert engine.model.families == {}


# -------------------------------------------------------------------------------------------- what is wrong


def test_a_bad_request_fails_alone(folder: TaskFolder, wanted: list[torch.Tensor]) -> None:
    x = samples(8)
    with Engine(model(), folder, max_delay=0.05) as engine:
        good = [engine.submit(x[i], f"t{i}") for i in range(3)]
        bad = {
            r"no task 't33' in .*did you mean 't3'\?": engine.submit(x[0], "t33"),
            "no task 3 in": engine.submit(x[0], 3),  # type: ignore[arg-type]
            r"'t1' takes torch.float64 \[3, 8, 8\] or a batch.* got torch.float64 \[3, 8, 9\]": engine.submit(
                torch.zeros(3, 8, 9, dtype=torch.float64), "t1"
            ),
            r"got torch.float32 \[3, 8, 8\]": engine.submit(x[0].float(), "t1"),
            r"one sample or more, got .*\[0, 3, 8, 8\]": engine.submit(x[:0], "t1"),
            "expected a tensor, got list": engine.submit([1.0], "t1"),  # type: ignore[arg-type]
        }
        for i, future in enumerate(good):
            assert is_close(future.result(30), wanted[i][i])
        for pattern, future in bad.items():
            error = future.exception(30)
            assert isinstance(error, ConfigError) and re.search(pattern, str(error)), error
        assert engine.stats()["errors"] == {"UnknownTaskError": 2, "InputError": 4}
        assert engine.stats()["queued_samples"] == 0


def test_a_forward_that_fails_for_one_fails_for_no_other(folder: TaskFolder, tmp_path: Path) -> None:
    """Two tasks whose files do not say what they take: inputs of one shape, of which the base refuses one."""
    folder.add(write(tmp_path / "n.taps", "free", 9, images=False))
    with Engine(model(), folder, max_delay=0.1, pin=["free"]) as engine:
        good, tall = samples(2), torch.zeros(1, 4, 8, 8, dtype=torch.float64)
        futures = [engine.submit(good, "free"), engine.submit(tall, "free"), engine.submit(tall, None)]
        assert futures[0].result(30).shape == (2, 4)
        for future in futures[1:]:
            with pytest.raises(RuntimeError, match=r"expected shape \[B, 3, H, W\]|channels"):
                future.result(30)
        nan = next(p for n, p in engine.model.state(engine.model.tasks[0]).named_parameters() if n.endswith("score"))
        with torch.no_grad():
            nan.fill_(float("nan"))  # a neighbour that cannot run
        both = [engine.submit(good, "free"), engine.submit(good, None)]
        assert "NaN" in str(both[0].exception(30)) and both[1].result(30).shape == (2, 2)
        with pytest.raises(InputError, match=r"expected a batch \[N, ...\]"):
            engine.predict(torch.zeros(()), "free")


def test_damaged_and_foreign_files_answer_for_themselves(
    folder: TaskFolder, wanted: list[torch.Tensor], tmp_path: Path
) -> None:
    whole = folder.file("t1").read_bytes()
    for name, damage in (("t1", whole[:-1] + bytes([whole[-1] ^ 1])), ("t2", whole[: len(whole) // 2]), ("t3", b"no")):
        folder.file(name).write_bytes(damage)
    stranger = model().unload()
    stranger[0].weight.data.mul_(2)  # type: ignore[index,operator,union-attr]
    other = TaskModel(stranger).eval()
    other.add_task("t4", num_classes=2, config=JointTapsConfig(lam=0.1))
    other.save_shared("joint-taps", tmp_path / "s.taps")
    other.save_task("t4", folder.file("t4"))
    x = samples(8)
    with Engine(model(), folder) as engine:
        futures = [(i, engine.submit(x[i], f"t{i}")) for i in (0, 1, 2, 3, 4, 5) for _ in range(2)]
        for i, future in futures:
            if i in (0, 5):
                assert is_close(future.result(30), wanted[i][i])
            else:
                error = future.exception(30)
                assert isinstance(error, TaskFileError) and isinstance(error, ParentMismatchError) == (i == 4)
        loads, read = engine.stats()["loads"], list[str]()
        assert loads == 2
        original = engine._load
        engine._load = lambda entry: (read.append(entry.name or ""), original(entry))[1]  # type: ignore[method-assign]
        assert isinstance(engine.submit(x[1], "t1").exception(30), TaskFileError)
        assert read == []  # it is known
        folder.file("t1").write_bytes(whole)
        assert is_close(engine.predict(x[1], "t1"), wanted[1][1]) and read == ["t1"]
        with pytest.raises(TaskFileError):
            engine.reload("t2")
        with pytest.raises(TaskFileError):
            engine.facts("t3")
        folder.file("t3").unlink()
        with pytest.raises(UnknownTaskError):
            engine.predict(x[3], "t3")
        with pytest.raises(TaskFileError):
            Engine(model(), folder, pin=["t2"])
        with pytest.raises(ConfigError, match="no task 't9'"):
            Engine(model(), folder, pin=["t9"])


def test_a_full_queue_refuses_at_once(folder: TaskFolder, gate: Gate) -> None:
    x = samples(8)
    with Engine(model(), folder, max_queue=5, max_delay=0.0, pin=["t0"]) as engine:
        taken = [engine.submit(x[0], "t0")]
        assert gate.entered.wait(10)
        taken += [engine.submit(x[:3], "t0"), engine.submit(x[0], "t0")]
        for _ in range(3):
            begin = time.monotonic()
            with pytest.raises(QueueFullError, match="5 samples wait, of at most 5"):
                engine.submit(x[0], "t0")
            assert time.monotonic() - begin < 1
        assert taken[2].cancel() and engine.stats()["refused"] == 3
        gate.open.set()
        assert [len(future.result(30).shape) for future in taken[:2]] == [1, 2]
        until(lambda: engine.stats()["queued_samples"] == 0)
        assert engine.stats()["cancelled"] == 1
        engine.predict(x[0], "t0")


def test_closing_answers_what_waits_and_refuses_what_comes(folder: TaskFolder, gate: Gate) -> None:
    x, engine = samples(8), Engine(model(), folder, max_delay=0.0)
    waiting = [engine.submit(x[i], f"t{i}") for i in range(4)]
    closing = threading.Thread(target=engine.close)
    closing.start()
    until(lambda: not engine.ready)
    with pytest.raises(EngineClosedError):
        engine.submit(x[0], "t0")
    with pytest.raises(EngineClosedError):
        engine.add(folder.file("t0"), "t9")
    gate.open.set()
    closing.join(30)
    assert not closing.is_alive() and all(future.result(0).shape == (4,) for future in waiting)
    engine.close()  # once more does nothing
    assert engine.model.tasks == [] and not engine.alive and "t9" not in folder


def test_a_mistake_in_the_worker_leaves_nobody_waiting(folder: TaskFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    engine = Engine(model(), folder, max_delay=0.3, pin=["t0"])
    monkeypatch.setattr(batches, "run", lambda *_: [])  # one answer for no request
    futures = [engine.submit(samples(1)[0], "t0"), engine.submit(samples(1)[0], "t1")]
    assert all(isinstance(future.exception(30), (ValueError, EngineClosedError)) for future in futures)
    until(lambda: not engine.alive)
    with pytest.raises(EngineClosedError, match="failed"):
        engine.submit(samples(1)[0], "t0")
    engine.close()


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        ({"max_batch": 0}, "max_batch: expected an int >= 1, got 0"),
        ({"max_queue": True}, "max_queue: expected an int >= 1, got True"),
        ({"max_resident_bytes": 1.5}, "max_resident_bytes: expected an int >= 1 or None, got 1.5"),
        ({"max_delay": -1}, "max_delay: expected seconds from 0 to 60, got -1"),
        ({"pin": "t0"}, "pin: expected a list of tasks, got 't0'"),
        ({"sample": [1]}, "sample: expected a tensor, got list"),
    ],
)
def test_arguments_that_make_no_sense(folder: TaskFolder, words: dict[str, object], pattern: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(pattern)):
        Engine(model(), folder, **words)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="expected one in evaluation mode"):
        Engine(model().train(), folder)
    with pytest.raises(ConfigError, match="batch_dim = 0, got 1"):
        Engine(TaskModel(model().unload(), batch_dim=1).eval(), folder)
    with pytest.raises(ConfigError, match="model: expected a TaskModel, got Sequential"):
        Engine(model().unload(), folder)  # type: ignore[arg-type]


def test_one_sample_for_all_says_what_inputs_are(folder: TaskFolder, tmp_path: Path) -> None:
    folder.add(write(tmp_path / "n.taps", "free", 9, images=False))
    with Engine(model(), folder, sample=samples(1)[0]) as engine:
        assert engine.predict(samples(1)[0], "free").shape == (4,)
        assert engine.predict(samples(1)[0], None).shape == (2,)
        with pytest.raises(InputError, match=r"torch.float64 \[3, 8, 8\]"):
            engine.predict(samples(1)[0, :, :4], "free")


def test_switching_the_active_task_costs_no_more_than_a_hundred_microseconds(folder: TaskFolder) -> None:
    made = model()
    names = [made.load_task(folder.file(f"t{i}")) for i in range(TASKS)]
    taken = []
    for i in range(200):
        begin = time.perf_counter()
        made.set_task(names[i % TASKS])
        taken.append(time.perf_counter() - begin)
    assert sorted(taken)[100] <= 100e-6


# ------------------------------------------------------------------------------------------------- counters


def test_the_page_for_prometheus_parses_line_by_line(folder: TaskFolder) -> None:
    with Engine(model(), folder) as engine:
        engine.predict(samples(8), "t0")
        engine.submit(samples(1), 'no "such"\n').exception(30)
        page, stats = engine.metrics_text(), engine.stats()
    assert page.endswith("\n")
    number = r"(?:[0-9.e+-]+|\+Inf|NaN)"
    sample = re.compile(rf'(taps_[a-z_]+)(?:\{{[a-z]+="(?:[^"\\\n]|\\[\\"n])*"\}})? {number}')
    values, kinds = {}, {}
    for line in page.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name not in kinds and kind in ("counter", "gauge", "histogram")
            kinds[name] = kind
        elif not line.startswith("# HELP "):
            found = sample.fullmatch(line)
            assert found is not None, line
            base = re.sub("_(bucket|sum|count)$", "", found[1])
            assert found[1] in kinds or kinds[base] == "histogram", line
            values[line.rpartition(" ")[0]] = float(line.rpartition(" ")[2])
    assert values["taps_requests_total"] == 2 and values["taps_answers_total"] == 1
    assert values['taps_errors_total{kind="UnknownTaskError"}'] == 1
    assert values["taps_resident_bytes"] == stats["resident_bytes"] > 0
    buckets = [values[f'taps_latency_seconds_bucket{{le="{bound}"}}'] for bound in (*BOUNDS, "+Inf")]
    assert buckets == sorted(buckets) and buckets[-1] == values["taps_latency_seconds_count"] == 1


def test_what_a_task_says_of_itself(folder: TaskFolder) -> None:
    with Engine(model(), folder) as engine:
        before = engine.facts("t2")
        engine.predict(samples(1)[0], "t2")
        assert engine.facts("t2") == before and before.labels == tuple(f"t2 {i}" for i in range(4))
        assert before.geometry is not None and before.geometry.height == GEOMETRY["height"] == SIDE
        assert before.digest == folder.header("t2").digest and before.shape == (3, 8, 8)
        answer = engine.request(samples(1)[0], "t2", digest=before.digest).result(30)
        assert answer.facts == before and answer.output.shape == (4,)
        with pytest.raises(TaskReplacedError):
            engine.request(samples(1)[0], "t2", digest="sha256:0").result(30)
        with pytest.raises(UnknownTaskError):
            engine.facts("t22")
