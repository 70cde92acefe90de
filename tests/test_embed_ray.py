"""Files of texts embedded by a Ray cluster of two processes, one of which is killed."""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from models import one_thread, transformers  # noqa: F401
from tiny_models import save_encoder

from bert_fast.tasks.data.texts import Text
from bert_fast.tasks.vectors import Cluster, Options, Progress, embed, ray_engine
from bert_fast.tasks.vectors.blocks import cut
from bert_fast.tasks.vectors.embedder import fingerprint
from bert_fast.tasks.vectors.work import opened

pytest.importorskip("sentence_transformers")
pytest.importorskip("pyarrow")

TEXTS = [" ".join(["the", "very", "good", "film", "of", "a", "day"][: 1 + 3 * i % 7] * (1 + i % 5)) for i in range(43)]


class InterruptionError(Exception):
    """What interrupts a call."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "texts.txt"
    file.write_text("".join(f"{text}\n" for text in TEXTS), encoding="utf-8")
    return file


@pytest.mark.filterwarnings("ignore:`use_:DeprecationWarning:ray")  # Ray Data sets its own old names
def test_killed_worker(folder: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks are done without Ray, the others by two processes, the first of which dies at its second block."""
    pytest.importorskip("ray.data")
    options = Options(block=5, tokens_per_batch=100, device="cpu")
    expected = embed(folder, source, tmp_path / "alone.npy", options=options).out.read_bytes()
    marker, log = tmp_path / "marker", tmp_path / "log"

    class Mortal(ray_engine.Worker):
        def __call__(self, batch: dict[str, Any]) -> dict[str, list[int]]:
            number = int(batch["number"][0])
            if self.work.staged(number).exists():  # else it is done
                with log.open("a") as lines:
                    lines.write(f"{number} {os.getpid()} {torch.get_num_threads()}\n")
            if number == 5 and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(batch)

    def stop(progress: Progress) -> None:
        if progress.texts == 10:
            raise InterruptionError

    out = tmp_path / "out.npy"
    with pytest.raises(InterruptionError):
        embed(folder, source, out, options=options, on_progress=stop)
    monkeypatch.setattr(ray_engine, "Worker", Mortal)
    before = {name: value for name, value in os.environ.items() if name.startswith("RAY")}
    seen: list[int] = []
    summary = embed(
        folder,
        source,
        out,
        options=options,
        engine="ray",
        cluster=Cluster(workers=2),
        on_progress=lambda progress: seen.append(progress.texts),
    )
    assert out.read_bytes() == expected
    assert (summary.rows, summary.resumed) == (43, 10)
    assert seen[-1] == 43
    assert marker.exists()
    calls = [line.split() for line in log.read_text().splitlines()]
    assert Counter(number for number, _, _ in calls) == {**dict.fromkeys("234678", 1), "5": 2}
    assert len({process for _, process, _ in calls}) > 1
    assert {threads for _, _, threads in calls} == {"1"}
    assert {name: value for name, value in os.environ.items() if name.startswith("RAY")} == before
    assert not (tmp_path / "out.npy.work").exists()


def test_worker(folder: Path, tmp_path: Path) -> None:
    """What a worker does, without a cluster."""
    options = Options(device="cpu")
    with opened(tmp_path / "work", {"model": fingerprint(str(folder))}, keep_text=True) as work:
        worker = ray_engine.Worker(str(folder), options, work)
        (block,) = cut([Text(tmp_path, 1, "a film", "x"), Text(tmp_path, 2, "", "y")], 5)
        tasks = list(ray_engine._staged(iter([block]), work))
        assert tasks == [{"number": 0, "texts": 2}]
        batch = {name: np.array([value]) for name, value in tasks[0].items()}
        assert worker(batch) == {"texts": [2]}
        assert not work.staged(0).exists()
        assert work.has(block)
        written = work.done(0).stat().st_mtime_ns
        assert worker(batch) == {"texts": [2]}  # asked again, by Ray, which has lost the answer
        assert work.done(0).stat().st_mtime_ns == written
        (table,) = work.tables(1)
        assert table.select(["id", "text"]).to_pylist() == [{"id": "x", "text": "a film"}, {"id": "y", "text": ""}]
        other = save_encoder(tmp_path / "other", seed=2)
        with pytest.raises(ValueError, match=r"the model .*other of .* has other files than where embed was called"):
            ray_engine.Worker(str(other), options, work)


@pytest.mark.parametrize(
    ("there", "cluster", "room"),
    [
        ({"CPU": 8.0}, Cluster(), (8, 0)),
        ({"CPU": 8.0}, Cluster(cpus=3), (2, 0)),
        ({"CPU": 8.0, "GPU": 2.0}, Cluster(), (2, 1)),
        ({"CPU": 8.0, "GPU": 2.0}, Cluster(gpus=0.5), (4, 0.5)),
        ({"CPU": 8.0, "GPU": 2.0}, Cluster(gpus=0, cpus=2), (4, 0)),
        ({"CPU": 8.0}, Cluster(workers=3), (3, 0)),
        ({"CPU": 2.0}, Cluster(cpus=3), "a worker is to have 3 CPU, 0 GPU; the cluster has 2 CPU, 0 GPU"),
        ({"CPU": 2.0}, Cluster(gpus=1), "a worker is to have 1 CPU, 1 GPU; the cluster has 2 CPU, 0 GPU"),
    ],
)
def test_room(there: dict[str, float], cluster: Cluster, room: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = SimpleNamespace(cluster_resources=lambda: there)
    monkeypatch.setattr(ray_engine, "package", lambda *_: ray)
    if isinstance(room, tuple):
        assert ray_engine._room(cluster) == room
    else:
        with pytest.raises(ValueError, match=room):
            ray_engine._room(cluster)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"workers": 0}, "workers is 0; it must be at least 1"),
        ({"cpus": -1}, "cpus is -1"),
        ({"gpus": -1}, "gpus is -1"),
    ],
)
def test_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Cluster(**options)


def test_only_ray_takes_a_cluster(folder: Path, source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="only 'ray' takes one"):
        embed(folder, source, tmp_path / "out.npy", cluster=Cluster())


def test_missing_package(folder: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"engine 'ray' needs ray\[data\] \(pip install 'ray\[data\]'\)"):
        embed(folder, source, tmp_path / "out.npy", engine="ray")
