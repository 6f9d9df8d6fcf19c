"""Run a function on several processes that can talk to each other."""

import multiprocessing
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

# Processes are forked from one that has used its thread pool, which would deadlock in the child.
CONTEXT = multiprocessing.get_context("fork")


@contextmanager
def environment(count: int) -> Iterator[None]:
    """What a launcher tells its processes, but for their ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    added = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "WORLD_SIZE": str(count)}
    before = dict(os.environ)
    os.environ.update(added)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def on_ranks(
    function: Callable[[int, int], Any], count: int, *, talk: bool = True, seconds: float = 60.0
) -> list[Any]:
    """What `function(rank, count)` returns on each of `count` processes, in the order of their ranks.

    With `talk`, the processes can talk to each other at once.
    """
    with tempfile.TemporaryDirectory() as folder:
        queue: Any = CONTEXT.SimpleQueue()
        workers = [
            CONTEXT.Process(
                target=_work,
                args=(function, rank, count, f"{folder}/store" if talk else None, seconds, queue),
            )
            for rank in range(count)
        ]
        for worker in workers:
            worker.start()
        results = dict(queue.get() for _ in workers)
        for worker in workers:
            worker.join(seconds)
    failures = [result for result in results.values() if isinstance(result, _Failure)]
    assert not failures, "\n".join(failure.text for failure in failures)
    return [results[rank] for rank in range(count)]


def wait(condition: Callable[[], Any], seconds: float = 200.0) -> Any:
    """What a condition says as soon as it says anything."""
    begin = time.monotonic()
    while not (result := condition()):
        assert time.monotonic() - begin < seconds
        time.sleep(0.02)
    return result


def is_running(pid: int) -> bool:
    """Whether there is a process; where nobody collects orphans one that has ended stays as a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


class Reporting(pl.Callback):
    """Writes at the end of a training what a forked process cannot bring back."""

    def __init__(self, folder: Path, look: Callable[[pl.Trainer, Any], Any]) -> None:
        self.folder, self.look = folder, look

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        torch.save(self.look(trainer, pl_module), self.folder / f"{trainer.global_rank}.pt")

    def read(self, count: int = 2) -> list[Any]:
        """What each process wrote, in the order of their ranks."""
        return [torch.load(self.folder / f"{rank}.pt") for rank in range(count)]


class _Failure:
    def __init__(self, text: str) -> None:
        self.text = text


def _work(
    function: Callable[[int, int], Any], rank: int, count: int, store: str | None, seconds: float, queue: Any
) -> None:
    torch.set_num_threads(1)
    try:
        if store is not None:
            torch.distributed.init_process_group(
                "gloo",
                init_method=f"file://{store}",
                rank=rank,
                world_size=count,
                timeout=timedelta(seconds=seconds),
            )
        result = function(rank, count)
    except BaseException:
        result = _Failure(f"rank {rank}: {traceback.format_exc()}")
    queue.put((rank, result))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
