"""Two runs in one folder: the second is refused, until the first has ended, however it ends."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from test_trainer import build, data

from taps_ext import ConfigError, Task, TrainConfig, Trainer
from taps_ext.train import Callback
from taps_ext.train.alone import LOCK, alone

HOLDER = """
import os, sys, time
from pathlib import Path
from taps_ext.train.alone import alone
with alone(Path(sys.argv[1])):
    if not os.fork():  # as a worker that reads data, which outlives a killed run for seconds
        os.close(1)
        time.sleep(20)
        os._exit(0)
    print("held", flush=True)
    sys.stdin.read()
"""


def trainer(out: Path, *callbacks: Callback) -> Trainer:
    config = TrainConfig(out=str(out), epochs=1, batch_size=16, warmup_epochs=0)
    return Trainer(build(), {"t": Task(train=data(), val=data(48, 1))}, config, quiet=True, callbacks=callbacks)


@pytest.mark.parametrize("end", [signal.SIGKILL, None], ids=["killed", "done"])
def test_another_process_trains_into_it(tmp_path: Path, end: signal.Signals | None) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        message = f"that no other run trains into, got {tmp_path}, into which process {holder.pid} does; wait for it"
        with pytest.raises(ConfigError, match=f"out: expected a folder {message}"):
            trainer(tmp_path).fit()
        assert sorted(os.listdir(tmp_path)) == [LOCK]
        if end is None:
            holder.communicate("")
        else:
            holder.send_signal(end)
            holder.wait()
    assert (tmp_path / LOCK).exists() == (end is not None)
    trainer(tmp_path).fit()
    assert not (tmp_path / LOCK).exists() and (tmp_path / "t.taps").exists()


def test_another_trainer_of_this_process_trains_into_it(tmp_path: Path) -> None:
    class Another(Callback):
        found: Exception | None = None

        def on_step(self, run, step, values) -> None:
            if self.found is None:
                with pytest.raises(ConfigError, match=f"into which process {os.getpid()} does") as refusal:
                    trainer(tmp_path).fit()
                self.found = refusal.value

    another = Another()
    trainer(tmp_path, another).fit()
    assert another.found is not None


def test_a_run_that_failed_has_ended(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="mine"), alone(tmp_path):
        raise RuntimeError("mine")
    with alone(tmp_path), alone(None):
        assert (tmp_path / LOCK).read_text() == str(os.getpid())


def test_who_comes_as_the_lock_goes_takes_a_new_one(tmp_path: Path) -> None:
    """Never two at once, however they meet."""
    inside, most, failures = 0, 0, []
    count = threading.Lock()

    def run() -> None:
        nonlocal inside, most
        for _ in range(200):
            try:
                with alone(tmp_path):
                    with count:
                        inside += 1
                        most = max(most, inside)
                    with count:
                        inside -= 1
            except ConfigError:
                continue
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and not failures


def test_a_folder_that_cannot_be_written_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(number: int) -> None:
        def refused(*_: object) -> int:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "open", refused)

    refuses(errno.EROFS)
    with alone(tmp_path):
        assert os.listdir(tmp_path) == []
    refuses(errno.ENOSPC)
    with pytest.raises(OSError, match="No space"), alone(tmp_path):
        pass
