"""The engine over real sockets: what clients send, slowly, wrongly, or many at a time."""

from __future__ import annotations

import http.client
import io
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from serving import SIDE, folder_of, model, write

from taps_ext import ProbeConfig, TaskFolder, TaskModel
from taps_ext.data.folder import read_image
from taps_ext.data.source import apply_normalize
from taps_ext.dense import DenseBase, LightDecoder
from taps_ext.serve import Engine
from taps_ext.zoo import SmallResNet

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")
image_module = pytest.importorskip("PIL.Image")

from taps_ext.serve.http import make_app  # noqa: E402

MOST_BODY, MOST_PIXELS = 50_000, 100_000
HEAD = b"POST /tasks/t0/predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n"


class Server:
    """A server in a thread of this process, on a port of its own."""

    def __init__(self, engine: Engine, **words: Any) -> None:
        self.engine = engine
        app = make_app(engine, **{"max_body": MOST_BODY, "max_pixels": MOST_PIXELS, "body_seconds": 1.0, **words})
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port = self.socket.getsockname()[1]
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=20))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})
        self.thread.start()

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, Any]:
        """(status, JSON or text, headers)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, {key.replace("_", "-"): value for key, value in headers.items()})
            answer = connection.getresponse()
            text = answer.read().decode()
            kind = answer.headers.get_content_type()
            return answer.status, json.loads(text) if kind == "application/json" else text, answer.headers
        finally:
            connection.close()

    def post(self, task: str, body: Any, kind: str = "image/png", query: str = "") -> tuple[int, Any, Any]:
        return self.ask("POST", f"/tasks/{task}/predict{query}", body, Content_Type=kind)

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()
        self.socket.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> TaskFolder:
    path = tmp_path_factory.mktemp("http")
    folder = folder_of(path, 4)
    folder.add(write(path / "n.taps", "free", 9, images=False))
    folder.add(write(path / "u.taps", "à b", 10))
    whole = folder.file("t3").read_bytes()
    folder.file("t3").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    return folder


@pytest.fixture(scope="module")
def server(folder: TaskFolder) -> Iterator[Server]:
    served = Server(Engine(model(), folder, max_delay=0.002))
    yield served
    served.close()
    assert not served.engine.alive and served.engine.model.tasks == []


def png(seed: int = 0, size: tuple[int, int] = (11, 9), format: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    file = io.BytesIO()
    image_module.fromarray(pixels).save(file, format)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def wanted(folder: TaskFolder, task: str, body: bytes, path: Path) -> list[float]:
    """What `taps predict` would say: the probabilities, in the order of the labels."""
    path.write_bytes(body)
    alone = model()
    x = apply_normalize(read_image(path, SIDE, 3), ([0.5], [0.25])).double()
    with torch.no_grad():
        return alone(x[None], task=alone.load_task(folder.file(task)))[0].softmax(0).tolist()


def refused(answer: tuple[int, Any, Any], status: int, *words: str) -> None:
    """One sentence that says the words."""
    code, body, _ = answer
    assert code == status, body
    assert set(body) == {"error", "kind"} and "\n" not in body["error"]
    for word in words:
        assert word in body["error"], body["error"]


def test_an_image_is_answered_as_predict_does(server: Server, folder: TaskFolder, tmp_path: Path) -> None:
    for seed, (task, format) in enumerate([("t0", "PNG"), ("t1", "BMP"), ("t2", "JPEG"), ("%C3%A0%20b", "WEBP")]):
        name, body = "à b" if task.startswith("%") else task, png(seed, format=format)
        chances = wanted(folder, name, body, tmp_path / "image")
        code, found, _ = server.post(task, body, f"image/{format.lower()}", "?top=4")
        assert code == 200, found
        got = {score["label"]: score["probability"] for score in found["top"]}
        # float32 probabilities of float64 logits: one rounding each of the logit, of the exponential and of the sum.
        assert [got[f"{name} {i}"] for i in range(4)] == pytest.approx(chances, abs=1e-6)
        assert found["label"] == found["top"][0]["label"] == f"{name} {max(range(4), key=chances.__getitem__)}"
        assert found["task"] == name and found["digest"] == folder.header(name).digest
    assert len(server.post("t0", png(), query="?top=2")[1]["top"]) == 2
    assert server.post("t0", png(), "application/octet-stream")[0] == 200


def test_forms_and_arrays(server: Server) -> None:
    body = png(3)
    want = server.post("t0", body)[1]
    form = b"--x\r\nContent-Disposition: form-data; name=note\r\n\r\nhello\r\n"
    file = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    assert server.post("t0", form + file + body + b"\r\n--x--\r\n", "multipart/form-data; boundary=x")[1] == want
    refused(server.post("t0", form + b"--x--\r\n", "multipart/form-data; boundary=x"), 422, "a form with one file")
    refused(server.post("t0", b"nothing", "multipart/form-data"), 422, "a form with one file")
    two = file + body + b"\r\n" + file + body + b"\r\n--x--\r\n"
    refused(server.post("t0", two, "multipart/form-data; boundary=x"), 422, "a form with one file")
    x = np.random.default_rng(0).normal(size=(3, SIDE, SIDE))
    code, found, _ = server.post("t0", npy(x), "application/x-npy")
    batch = server.post("t0", npy(np.asfortranarray(x[None])), "application/x-npy")[1]
    big = server.post("t0", npy(x.astype(">f8")), "application/x-npy")[1]
    assert code == 200 and found == batch == big
    assert server.post("free", npy(x[None]), "application/x-npy")[0] == 200


def test_bodies_that_are_none(server: Server) -> None:
    array, x = "application/x-npy", np.zeros((3, SIDE, SIDE))
    refused(server.post("t0", b""), 422, "cannot read image: expected a JPEG, PNG")
    refused(server.post("t0", b"GIF89a nothing"), 422, "cannot read image")
    refused(server.post("t0", png()[:-30]), 422, "cannot read image")
    refused(server.post("t0", b"%!PS-Adobe-3.0 EPSF-3.0\n"), 422, "expected a JPEG, PNG")
    refused(server.post("t0", b"{}", "application/json"), 415, "expected image/*", "got application/json")
    refused(server.post("free", png()), 422, "'free' does not say how images become its inputs")
    refused(
        server.post("t0", npy(x[:, 1:]), array), 422, "takes torch.float64 [3, 8, 8]", "got torch.float64 [3, 7, 8]"
    )
    refused(server.post("t0", npy(x.astype("f4")), array), 422, "got torch.float32 [3, 8, 8]")
    refused(server.post("free", npy(x[None, :2]), array), 422, "does not take torch.float64 [1, 2, 8, 8]")
    refused(server.post("free", npy(np.zeros((2, 3, SIDE, SIDE))), array), 500, "one score for each class", "[2, 4]")
    refused(server.post("free", npy(np.full((1, 3, SIDE, SIDE), np.nan)), array), 500, "got Inf or NaN")
    refused(server.post("t0", npy(x)[:-1], array), 422, "1536 bytes of float64", "got 1535 bytes")
    refused(server.post("t0", npy(np.array([{}], dtype=object)), array), 422, "got objects")
    refused(server.post("t0", npy(np.zeros(3, dtype="U1")), array), 422, "a type that torch has")
    huge = npy(x).replace(b"(3, 8, 8), ", b"(99999999999,), ")
    for body in (huge, b"\x93NUMPY\x09\x00", b"\x93NUMPY\x01\x00\xff\xff", b"no"):
        refused(server.post("t0", body, array), 422, "expected")
    for query in ("?top=0", "?top=x"):
        refused(server.post("t0", png(), query=query), 422, "top: ")


def test_too_large(server: Server) -> None:
    refused(server.post("t0", b"x" * (MOST_BODY + 1)), 413, f"at most {MOST_BODY} bytes, got {MOST_BODY + 1}")
    chunks = iter([b"x" * 1000] * (MOST_BODY // 1000 + 1))  # which say nothing before
    refused(server.post("t0", chunks), 413, f"at most {MOST_BODY} bytes, got more")

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 300, 400, 8, 2, 0, 0, 0)  # 120,000 pixels, of which it holds a few bytes
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    refused(server.post("t0", bomb), 422, f"at most {MOST_PIXELS} pixels, got 300 x 400")


def test_tasks_that_are_none_or_damaged(server: Server) -> None:
    refused(server.post("t00", png()), 404, "no task 't00'", "did you mean 't0'?")
    refused(server.ask("GET", "/tasks/t00"), 404, "did you mean")
    for answer in (server.post("t3", png()), server.ask("GET", "/tasks/t3"), server.post("t3", png())):
        refused(answer, 500, "t3.taps: tensor", "expected sha256:")
        assert str(server.engine.folder.path) not in answer[1]["error"] and answer[1]["error"].startswith("t3.taps")
    assert server.post("t0", png())[0] == 200


def test_what_it_says_of_itself(server: Server, folder: TaskFolder) -> None:
    server.post("t1", png())
    code, found, _ = server.ask("GET", "/tasks")
    assert code == 200 and found["tasks"] == list(folder) and "t1" in found["resident"]
    code, found, _ = server.ask("GET", "/tasks/t1")
    assert code == 200 and found["labels"] == [f"t1 {i}" for i in range(4)] and found["resident"] is True
    geometry = {"channels": 3, "height": SIDE, "width": SIDE, "normalize": [[0.5], [0.25]]}
    assert found["method"] == "taps" and found["preprocessing"] == geometry
    assert server.ask("GET", "/health")[:2] == (200, {"live": True, "ready": True})
    code, text, headers = server.ask("GET", "/metrics")
    assert code == 200 and "\ntaps_answers_total " in text and headers["Content-Type"].startswith("text/plain; version")
    assert server.ask("GET", "/docs")[0] == 200
    api = server.ask("GET", "/openapi.json")[1]["paths"]
    assert set(api) == {"/tasks", "/tasks/{task}", "/tasks/{task}/predict", "/health", "/metrics"}
    assert "image/*" in api["/tasks/{task}/predict"]["post"]["requestBody"]["content"]
    refused(server.ask("GET", "/nothing"), 404, "/nothing: Not Found")
    refused(server.ask("DELETE", "/tasks"), 405, "/tasks: Method Not Allowed")


def test_sixteen_clients(server: Server, folder: TaskFolder, tmp_path: Path) -> None:
    clients(server, folder, tmp_path, count=16, requests=12)


def clients(server: Server, folder: TaskFolder, path: Path, *, count: int, requests: int) -> None:
    """So many at a time, each on one connection; every answer is its own task's of its own image."""
    names, bodies = ["t0", "t1", "t2"], [png(seed) for seed in range(4)]
    want = {(name, i): wanted(folder, name, body, path / "image") for name in names for i, body in enumerate(bodies)}

    def client(number: int) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        for turn in range(requests):
            name, i = names[(number + turn) % 3], (number * turn) % 4
            connection.request("POST", f"/tasks/{name}/predict?top=4", bodies[i], {"Content-Type": "image/png"})
            answer = connection.getresponse()
            found = json.loads(answer.read())
            assert answer.status == 200, found
            got = {score["label"]: score["probability"] for score in found["top"]}
            assert [got[f"{name} {k}"] for k in range(4)] == pytest.approx(want[name, i], abs=1e-6)
        connection.close()
        return requests

    with ThreadPoolExecutor(count) as pool:
        assert sum(pool.map(client, range(count))) == count * requests


def test_slow_and_broken_clients_hold_up_nobody(server: Server) -> None:
    body, slow = png(), []
    head = HEAD % len(body)
    for _ in range(8):
        connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
        connection.sendall(head + body[:10])
        slow.append(connection)
    begin = time.monotonic()
    assert server.post("t0", body)[0] == 200 and time.monotonic() - begin < 5  # one after another they take eight
    for connection in slow[:4]:
        connection.close()  # in the middle
    for connection in slow[4:]:  # the time for a body is over
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))  # noqa: B023  (it is used up here)
        assert answer.startswith(b"HTTP/1.1 408 ") and b"within 1 seconds" in answer
        connection.close()
    reader = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    reader.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 50)  # and reads nothing
    garbage = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    garbage.sendall(b"\x00\xff no request\r\n\r\n")
    assert garbage.recv(1 << 16).startswith(b"HTTP/1.1 400 ")
    assert server.post("t0", body)[0] == 200
    reader.close()
    garbage.close()


def test_a_full_queue_and_a_closed_engine_say_when_to_come_again(folder: TaskFolder) -> None:
    engine = Engine(model(), folder, max_queue=1, max_delay=0.0)
    served = Server(engine)
    try:
        run, entered, go = engine._run, threading.Event(), threading.Event()
        engine._run = lambda chosen: (entered.set(), go.wait(30), run(chosen))[2]  # type: ignore[method-assign]
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(served.post, "t0", png())
            assert entered.wait(30)
            answer = served.post("t0", png())
            refused(answer, 503, "1 samples wait, of at most 1")
            assert answer[2]["Retry-After"] == "1"
            go.set()
            assert first.result(30)[0] == 200
        engine.close()
        refused(served.post("t0", png()), 503, "the engine is closed")
        assert served.ask("GET", "/health")[:2] == (503, {"live": False, "ready": False})
    finally:
        served.close()


def test_bodies_together_have_a_limit(folder: TaskFolder) -> None:
    served = Server(Engine(model(), folder), max_body=1000, body_seconds=20.0)
    held = []
    try:
        for _ in range(16):
            connection = socket.create_connection(("127.0.0.1", served.port), timeout=30)
            connection.sendall(HEAD % 1000 + b"x")
            held.append(connection)
        for _ in range(200):
            answer = served.post("t0", b"x" * 900)
            if answer[0] == 503:
                break
            time.sleep(0.02)
        refused(answer, 503, "bodies of 16000 bytes are being read")
    finally:
        for connection in held:
            connection.close()
        served.close()


def test_a_task_that_is_replaced_meanwhile_is_asked_anew(folder: TaskFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images are made as the old state wants them; the new one gets none of those."""
    engine = Engine(model(), folder)
    served, stale, asked = Server(engine), engine.facts("t0"), list[str]()
    try:
        engine.predict(torch.zeros(3, SIDE, SIDE, dtype=torch.float64), "t0")
        facts = engine.facts

        def old_first(task: str) -> Any:
            asked.append(task)
            return type(stale)(**{**vars(stale), "digest": "sha256:0"}) if len(asked) < 3 else facts(task)

        monkeypatch.setattr(engine, "facts", old_first)
        code, found, _ = served.post("t0", png())
        assert code == 200 and found["digest"] == stale.digest and len(asked) == 3
        asked.clear()
        monkeypatch.setattr(engine, "facts", lambda task: (asked.append(task), old_first(task), asked.clear())[1])
        refused(served.post("t0", png()), 503, "is being replaced")
    finally:
        served.close()


def test_a_task_that_makes_maps_is_refused_before_its_forward(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = DenseBase(SmallResNet(channels=3, widths=(4, 6, 8), blocks=1, stem_stride=2), image=(3, 16, 16))
    made = TaskModel(base, ProbeConfig()).eval()
    folder = TaskFolder(tmp_path / "maps", create=True)
    preprocessing = {"channels": 3, "height": 16, "width": 16, "normalize": None}
    for name, more in (("told", {"map": {"kind": "depth", "taps": []}}), ("untold", {})):
        made.add_task(name, head=LightDecoder(base.channels, 1, width=4))
        made.save_task(name, tmp_path / "made.taps", preprocessing={**preprocessing, **more})
        folder.add(tmp_path / "made.taps")
        made.delete_task(name)
    served = Server(Engine(made, folder, max_delay=0.0))
    try:
        refused(served.post("told", png()), 422, "task 'told': makes a map of an image (depth)", "taps predict")
        refused(served.post("told", npy(np.zeros((3, 16, 16), "f4")), "application/x-npy"), 422, "(depth)")
        assert served.engine.resident == []
        refused(served.post("untold", png()), 422, "task 'untold': makes maps [1, 1, 16, 16]", "labels")
        assert served.ask("GET", "/tasks/told")[1]["preprocessing"]["height"] == 16
    finally:
        served.close()
