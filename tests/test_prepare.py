"""Preparing a corpus: the shards' contents, resumption bit by bit, what is refused."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bert_fast
from bert_fast.pretraining import chunks
from bert_fast.pretraining import prepare as preparing
from bert_fast.pretraining.corpus import CorpusError, Problem, refuse, split_sentences
from bert_fast.pretraining.prepare import Prepared, Progress, prepare
from bert_fast.pretraining.shards import Corpus, open_shard, token_dtype, write_shard
from bert_fast.pretraining.vocabulary import Vocabulary, train

WORDS = ["padding", "is", "waste", "said", "the", "tokenizer", "twice", "rows", "of", "words", "make", "a", "batch"]


def make_documents(number: int) -> list[list[str]]:
    """Documents of 1 to 5 lines of 1 to 3 sentences; every 17th has a line without any token, one has no other."""
    generator = np.random.default_rng(7)
    documents = []
    for index in range(number):
        lines = []
        for _ in range(generator.integers(1, 6)):
            sentences = [" ".join(generator.choice(WORDS, generator.integers(1, 12))) for _ in range(index % 3 + 1)]
            lines.append(" ".join(f"{sentence.capitalize()} {index}." for sentence in sentences))
        documents.append([*lines, "\u200b"] if index % 17 == 1 else lines)
    return [*documents[: number // 2], ["\u200b"], *documents[number // 2 :]]


DOCUMENTS = make_documents(151)


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return train(DOCUMENTS, size=97)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "corpus.txt", DOCUMENTS)


def write(file: Path, documents: list[list[str]]) -> Path:
    file.write_text("\n\n".join("\n".join(lines) for lines in documents) + "\n", encoding="utf-8")
    return file


@pytest.fixture
def make(tmp_path: Path, file: Path, vocabulary: Vocabulary) -> Callable[..., Prepared]:
    def call(name: str = "out", **options: Any) -> Prepared:
        defaults = {
            "sources": [file],
            "vocabulary": vocabulary,
            "held_out": 0.1,
            "shard_bytes": 2500,
            "workers": 0,
            "on_problem": refuse,
        }
        return prepare(tmp_path / name, **{**defaults, **options})

    return call


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, vocabulary: Vocabulary) -> Path:
    out = tmp_path_factory.mktemp("finished")
    source = write(tmp_path_factory.mktemp("source") / "corpus.txt", DOCUMENTS)
    options: dict[str, Any] = {"held_out": 0.1, "shard_bytes": 2500, "workers": 0, "on_problem": refuse}
    return prepare(out, sources=[source], vocabulary=vocabulary, **options).folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A prepared corpus that a test may damage."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def contents(folder: Path) -> dict[str, str]:
    """The hash of every file."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def ids_of(corpus: Corpus) -> Iterator[list[list[int]]]:
    """Each document's sentences."""
    for shard in corpus.shards:
        for start, end in pairwise(shard.documents):
            bounds = shard.sentences[start : end + 1]
            yield [shard.tokens[a:b].tolist() for a, b in pairwise(bounds)]


def expected_ids(vocabulary: Vocabulary, held_out: float, is_split: bool) -> tuple[list[Any], list[Any]]:
    """The training and held-out documents, said plainly."""
    parts: tuple[list[Any], list[Any]] = ([], [])
    for lines in DOCUMENTS:
        number = int(hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16], 16) / 2**64
        sentences = [part for line in lines for part in split_sentences(line)] if is_split else lines
        ids = [line for line in vocabulary.encode_lines(sentences) if line]
        if ids:
            parts[number < held_out].append(ids)
    return parts


# ---- contents --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sentences", ["lines", "split"])
def test_contents(
    make: Callable[..., Prepared], vocabulary: Vocabulary, sentences: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "BATCH", 7)
    prepared = make(sentences=sentences)
    expected = expected_ids(vocabulary, 0.1, sentences == "split")
    assert 5 < len(expected[1]) < 30
    for part, documents in zip(("train", "held_out"), expected, strict=True):
        corpus = Corpus.open(prepared.folder, part, check=True)  # type: ignore[arg-type]
        assert list(ids_of(corpus)) == documents
        totals = {
            "documents": corpus.total_documents,
            "sentences": corpus.total_sentences,
            "tokens": corpus.total_tokens,
        }
        assert prepared.totals[part] == totals
        assert totals["documents"] == len(documents)
        assert totals["tokens"] == sum(len(ids) for document in documents for ids in document)
        assert corpus.vocabulary.fingerprint == vocabulary.fingerprint
        assert len(corpus.shards) > 3
    assert prepared.problems == 0
    assert prepared.seconds > 0


def test_split_is_independent_of_chunks(make: Callable[..., Prepared], tmp_path: Path) -> None:
    parts = []
    for number, (size, documents) in enumerate([(701, DOCUMENTS), (3001, DOCUMENTS), (2**30, DOCUMENTS[::-1])]):
        source = write(tmp_path / f"{number}.txt", documents)
        folder = make(f"out{number}", sources=[source], shard_bytes=size).folder
        corpora = [Corpus.open(folder, part) for part in ("train", "held_out")]
        assert (size == 2**30) == (len(corpora[0].shards) == 1)
        parts.append([sorted(ids_of(corpus)) for corpus in corpora])
    assert parts[0] == parts[1] == parts[2]


def test_sources_are_alike(make: Callable[..., Prepared], tmp_path: Path) -> None:
    rows = [{"text": "\n".join(lines)} for lines in DOCUMENTS]
    file = tmp_path / "rows" / "a.jsonl"
    file.parent.mkdir()
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    datasets = pytest.importorskip("datasets")
    sources = [(row for row in rows), datasets.Dataset.from_list(rows), [file.parent]]
    hashes = {Corpus.open(make(f"out{n}", sources=each).folder).fingerprint for n, each in enumerate(sources)}
    assert hashes == {Corpus.open(make().folder).fingerprint}


@pytest.mark.parametrize("held_out", [0.0, 0.999999])
def test_one_part_alone(make: Callable[..., Prepared], held_out: float) -> None:
    folder = make(held_out=held_out).folder
    sizes = [Corpus.open(folder, part).total_documents for part in ("train", "held_out")]
    assert sizes == ([151, 0] if held_out == 0 else [0, 151])


def test_progress(make: Callable[..., Prepared]) -> None:
    seen: list[Progress] = []
    prepared = make(progress=seen.append)
    assert [progress.chunks for progress in seen] == list(range(1, len(seen) + 1))
    assert seen[-1].bytes_read == sum(len("\n".join(lines).encode()) for lines in DOCUMENTS)
    assert seen[-1].tokens == sum(part["tokens"] for part in prepared.totals.values())
    assert sorted(progress.seconds for progress in seen) == [progress.seconds for progress in seen]


def test_problems_are_counted(make: Callable[..., Prepared], tmp_path: Path, file: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(b'{"text": "a"}\n{"text": 3}\n{\n')
    problems: list[Problem] = []
    assert make(sources=[file, bad], on_problem=problems.append).problems == 2
    assert [(problem.file, problem.line) for problem in problems] == [(bad, 2), (bad, 3)]
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["problems"] == 2
    assert make(sources=[file, bad], on_problem=problems.append).problems == 2  # from the manifest
    assert len(problems) == 2


# ---- resumption ------------------------------------------------------------------------------------------------------


def test_workers_change_nothing(make: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    assert contents(make("out0", workers=0).folder) == contents(make("out2", workers=2).folder)
    assert "TOKENIZERS_PARALLELISM" not in os.environ


class InterruptionError(Exception):
    """What interrupts a preparation."""


@pytest.mark.parametrize("is_list", [False, True], ids=["file", "rows"])
def test_resumption(make: Callable[..., Prepared], tmp_path: Path, is_list: bool) -> None:
    options: dict[str, Any] = {"sources": [{"text": "\n".join(lines)} for lines in DOCUMENTS]} if is_list else {}
    expected = contents(make("whole", **options).folder)

    def stop(progress: Progress) -> None:
        if progress.chunks == 5:
            raise InterruptionError

    with pytest.raises(InterruptionError):
        make(progress=stop, **options)
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="not prepared to the end; prepare it again"):
        Corpus.open(out)
    (out / "000001.train.tokens.npy").unlink()  # as after a power cut: finished by its name, but not whole
    (out / "000002.json").write_text("{")
    (out / ".000007.json.123.tmp").touch()
    kept = out / "000003.train.tokens.npy"
    before = kept.stat().st_mtime_ns
    make(**options)
    assert contents(out) == expected
    assert kept.stat().st_mtime_ns == before
    make(**options)
    assert contents(out) == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_killed(
    make: Callable[..., Prepared], tmp_path: Path, file: Path, vocabulary: Vocabulary, workers: int
) -> None:
    expected = contents(make("whole").folder)
    out = tmp_path / "out"
    vocabulary.save(tmp_path / "vocabulary")
    script = tmp_path / "script.py"
    script.write_text(
        f"""
import time
from pathlib import Path
from bert_fast.pretraining.corpus import refuse
from bert_fast.pretraining.prepare import prepare
from bert_fast.pretraining.vocabulary import load

if __name__ == "__main__":
    prepare(Path({str(out)!r}), sources=[Path({str(file)!r})], vocabulary=load({str(tmp_path / "vocabulary")!r}),
            held_out=0.1, shard_bytes=2500, workers={workers}, on_problem=refuse, progress=lambda _: time.sleep(0.3))
""",
        encoding="utf-8",
    )
    root = str(Path(bert_fast.__file__).parents[1])
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": root}, stdout=subprocess.PIPE) as child:
        deadline = time.monotonic() + 60
        while not (out / "000001.json").exists():
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(RuntimeError, match="another process prepares"):
            make()
        child.send_signal(signal.SIGKILL)
        child.communicate(timeout=60)  # ends when the workers have ended, who hold the pipe, too
    assert child.returncode == -signal.SIGKILL
    assert not (out / "manifest.json").exists()
    make()
    assert contents(out) == expected


def test_killed_worker(make: Callable[..., Prepared], tmp_path: Path) -> None:
    def kill(_: Progress) -> None:
        for child in multiprocessing.active_children():
            child.kill()

    with pytest.raises(RuntimeError, match="a worker was killed, perhaps for want of memory"):
        make(workers=1, progress=kill)
    make()
    assert contents(tmp_path / "out") == contents(make("whole").folder)


def test_finished_folders_are_left_alone(
    make: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = make()
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*.npy")}
    monkeypatch.setattr(preparing, "write_chunks", None)
    again = make()
    assert (again.totals, again.problems) == (first.totals, first.problems)
    assert {file: file.stat().st_mtime_ns for file in times} == times


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_other_options(make: Callable[..., Prepared], tmp_path: Path, file: Path) -> None:
    before = contents(make().folder)
    other = write(tmp_path / "other.txt", DOCUMENTS[:3])
    cases: list[tuple[dict[str, Any], str]] = [
        ({"sentences": "lines"}, "with sentences='split', and sentences is 'lines' now"),
        ({"held_out": 0.2}, r"held_out=0\.1, and held_out is 0\.2 now"),
        ({"shard_bytes": 7}, "shard_bytes=2500"),
        ({"field": "body"}, "field='text'"),
        ({"vocabulary": train(DOCUMENTS, size=96)}, "other vocabulary"),
        ({"sources": [file, other]}, r"other sources .*other\.txt is new, gone or changed"),
        ({"sources": [{"text": "a"}]}, "other sources"),
    ]
    for options, reason in cases:
        with pytest.raises(CorpusError, match=reason):
            make(**options)
    file.write_text(file.read_text(encoding="utf-8") + "more\n", encoding="utf-8")
    with pytest.raises(CorpusError, match=r"corpus\.txt is new, gone or changed"):
        make()
    assert contents(tmp_path / "out") == before


def test_other_rows(make: Callable[..., Prepared]) -> None:
    make(sources=[{"text": "a b"}, {"text": "c"}], shard_bytes=1)
    with pytest.raises(CorpusError, match=r"begun with another text \(chunk 000001\)"):
        make(sources=[{"text": "a b"}, {"text": "d"}], shard_bytes=1)


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"sentences": "words"}, ValueError, "sentences is 'words'; it must be 'lines' or 'split'"),
        ({"held_out": 1.0}, ValueError, r"held_out is 1\.0; it must lie in \[0, 1\)"),
        ({"held_out": -0.1}, ValueError, "held_out"),
        ({"shard_bytes": 0}, ValueError, "shard_bytes is 0; it must be at least 1"),
        ({"workers": -1}, ValueError, "workers is -1"),
        ({"sources": []}, CorpusError, "no files found"),
        ({"sources": [{"text": "\u200b"}]}, CorpusError, "no document found in list"),
        ({"sources": [{"text": "a"}, {"text": 1}], "workers": 2}, CorpusError, "dataset:2: field 'text' is a int"),
    ],
)
def test_refused(make: Callable[..., Prepared], options: dict[str, Any], error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason):
        make(**options)


def test_foreign_folder(make: Callable[..., Prepared], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").touch()
    with pytest.raises(CorpusError, match=r"out holds thesis\.txt and no preparation"):
        make()


# ---- shards ----------------------------------------------------------------------------------------------------------

IDS = [[[5, 6, 7], [8]], [[9, 10]]]


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_shard(tmp_path: Path, dtype: type) -> None:
    entry = write_shard(tmp_path, "a", IDS, dtype)
    shard = open_shard(tmp_path, "a", entry)
    assert shard.tokens.tolist() == [5, 6, 7, 8, 9, 10]
    assert shard.sentences.tolist() == [0, 3, 4, 6]
    assert shard.documents.tolist() == [0, 2, 3]
    assert [array.dtype for array in (shard.tokens, shard.sentences, shard.documents)] == [dtype, np.int64, np.int64]
    assert (shard.num_tokens, shard.num_sentences, shard.num_documents) == (6, 3, 2)
    assert {key: entry[key] for key in ("name", "tokens", "sentences", "documents")} == {
        "name": "a",
        "tokens": 6,
        "sentences": 3,
        "documents": 2,
    }
    for array in ("tokens", "sentences", "documents"):
        file = tmp_path / f"a.{array}.npy"
        assert entry["sha256"][array] == hashlib.sha256(file.read_bytes()).hexdigest()
        assert np.load(file).tolist() == getattr(shard, array).tolist()
        with pytest.raises(ValueError, match="read-only"):
            getattr(shard, array)[0] = 1
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("documents", [[], [[]], [[[5]], []], [[[5], []]], [[[-1]]], [[[5, 65536]]]])
def test_bad_shards(tmp_path: Path, documents: list[list[list[int]]]) -> None:
    with pytest.raises(ValueError, match="documents of shard a"):
        write_shard(tmp_path, "a", documents, np.uint16)
    assert list(tmp_path.iterdir()) == []


def test_token_dtype() -> None:
    assert [token_dtype(size) for size in (1, 65536, 65537)] == [np.uint16, np.uint16, np.uint32]


def test_corpus_is_pickled_by_name(finished: Path) -> None:
    corpus = Corpus.open(finished)
    content = pickle.dumps(corpus)
    assert len(content) < corpus.total_tokens  # not the tokens
    twin = pickle.loads(content)
    assert list(ids_of(twin)) == list(ids_of(corpus))
    assert (twin.fingerprint, twin.part, twin.folder) == (corpus.fingerprint, corpus.part, corpus.folder)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no list of open files on this system")
def test_shards_keep_no_file_open(finished: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    corpus = Corpus.open(finished)
    assert len(corpus.shards) > 3
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def change(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("000002.train.tokens.npy", Path.unlink, r"000002\.train\.tokens\.npy is missing; delete the folder"),
        ("000002.train.tokens.npy", lambda file: os.truncate(file, 199), "has 199 bytes, which is not what its header"),
        ("000002.train.tokens.npy", lambda file: os.truncate(file, 0), "is no .npy file"),
        ("000002.train.tokens.npy", change, r"tokens\.npy has changed since it was written"),
        ("000002.train.sentences.npy", change, r"000002\.train\.\*\.npy do not belong together"),
        ("vocabulary/tokenizer.json", change, r"tokenizer\.json is missing or is not the one"),
        ("vocabulary/tokenizer.json", Path.unlink, r"tokenizer\.json is missing or is not the one"),
        ("manifest.json", lambda file: os.truncate(file, 99), r"manifest\.json is damaged"),
        ("manifest.json", lambda file: file.write_text('{"format": 2}'), "is of format 2; this version reads 1"),
        ("manifest.json", Path.unlink, "is not prepared to the end"),
    ],
)
def test_damage(folder: Path, name: str, damage: Callable[[Path], Any], reason: str) -> None:
    damage(folder / name)
    with pytest.raises(ValueError, match=reason):
        Corpus.open(folder, check=True)


def test_exchanged_shards(folder: Path) -> None:
    for array in ("tokens", "sentences", "documents"):
        os.replace(folder / f"000001.train.{array}.npy", folder / f"000002.train.{array}.npy")
        (folder / f"000001.train.{array}.npy").write_bytes((folder / f"000003.train.{array}.npy").read_bytes())
    with pytest.raises(ValueError, match="do not belong together"):
        Corpus.open(folder)


def test_no_corpus(tmp_path: Path, finished: Path) -> None:
    with pytest.raises(ValueError, match=r"manifest\.json does not exist; a folder with a prepared corpus is needed"):
        Corpus.open(tmp_path)
    with pytest.raises(ValueError, match="part is 'test'; it must be one of 'train', 'held_out'"):
        Corpus.open(finished, "test")  # type: ignore[arg-type]
