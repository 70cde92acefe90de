"""Files of texts into files of vectors: beside sentence-transformers, resumed, killed, with faults."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import one_thread, transformers  # noqa: F401
from tiny_models import save_encoder

import bert_fast
from bert_fast.tasks.data.problems import DataError
from bert_fast.tasks.data.texts import Text, find_texts, read_texts
from bert_fast.tasks.vectors import Options, Progress, Summary, embed

sentence_transformers: Any = pytest.importorskip("sentence_transformers")
arrow: Any = pytest.importorskip("pyarrow")
parquet: Any = pytest.importorskip("pyarrow.parquet")

embedding = import_module("bert_fast.tasks.vectors.embed")

WORDS = ["the", "film", "was", "very", "good", "and", "a", "book", "is", "not", "dull", "with", "grim", "day", "of"]
PROMPTS = {"query": "a very good book: ", "document": "the day: "}

Make = Callable[..., Summary]


def make_texts(count: int) -> list[str]:
    """Of 0 to 30 words, in no order of length."""
    generator = np.random.default_rng(3)
    return [" ".join(generator.choice(WORDS, 7 * i % 31)) for i in range(count)]


TEXTS = make_texts(47)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a SentenceTransformer with prompts."""
    plain = save_encoder(tmp_path_factory.mktemp("encoder"), max_position_embeddings=37)
    model = sentence_transformers.SentenceTransformer(str(plain), device="cpu", prompts=PROMPTS)
    model.max_seq_length = 37
    path = tmp_path_factory.mktemp("model")
    model.save(str(path))
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    """The same, of sentence-transformers, as it is."""
    return sentence_transformers.SentenceTransformer(str(folder), device="cpu")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "texts.txt", TEXTS)


def write(file: Path, texts: list[str]) -> Path:
    file.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return file


@pytest.fixture
def make(folder: Path, file: Path, tmp_path: Path) -> Make:
    """embed in blocks of 10, with what of it a test leaves open."""

    def call(
        name: str = "out.npy",
        source: Any = None,
        on_progress: Callable[[Progress], None] | None = None,
        model: Path | None = None,
        **options: Any,
    ) -> Summary:
        settings = Options(**{"block": 10, "tokens_per_batch": 200, "device": "cpu", **options})
        return embed(model or folder, source or file, tmp_path / name, options=settings, on_progress=on_progress)

    return call


def beside(out: Path) -> list[str]:
    """What a call has left beside its file."""
    return sorted(path.name for path in out.parent.iterdir() if path.name.strip(".").startswith(out.stem))


# ---- vectors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "encode"),
    [
        ({}, {}),
        ({"block": 100}, {}),
        ({"normalize": True}, {"normalize_embeddings": True}),
        ({"prompt": "not good: "}, {"prompt": "not good: "}),
        ({"prompt_name": "document"}, {"prompt_name": "document"}),
        ({"max_length": 8}, {}),
    ],
)
def test_vectors(
    make: Make, model: Any, options: dict[str, Any], encode: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = make(**options)
    found = np.load(summary.out)
    monkeypatch.setattr(model, "max_seq_length", options.get("max_length", 37))
    expected = model.encode(TEXTS, **encode)
    assert found.shape == (47, 32) == (summary.rows, summary.dimensions)
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() < 1e-5
    assert np.abs(expected - expected[0]).max() > 0.1
    assert summary.empty == TEXTS.count("") == 2
    assert beside(summary.out) == ["out.npy", "out.npy.json"]


def test_half_precision(make: Make) -> None:
    whole = np.load(make("a.npy").out)
    for suffix in (".npy", ".parquet"):
        out = make(f"b{suffix}", dtype="float16").out
        found = np.load(out) if suffix == ".npy" else np.array(parquet.read_table(out)["embedding"].to_pylist())
        assert np.array_equal(found, whole.astype(np.float16))
    assert np.load(make("c.npy", dtype="float16").out).dtype == np.float16
    near = np.load(make("d.npy", precision="bf16").out)
    assert 0 < np.abs(near - whole).max() < 0.1


def test_int8(make: Make, folder: Path) -> None:
    twin = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    bert_fast.swap(twin, int8=True)
    found, whole = np.load(make("a.npy", int8=True).out), np.load(make("b.npy").out)
    assert np.abs(found - twin.encode(TEXTS)).max() < 0.02
    assert 0 < np.abs(found - whole).max() < 0.3


def test_parquet(make: Make, tmp_path: Path) -> None:
    expected = np.load(make("a.npy").out)
    table = parquet.read_table(make("b.parquet", keep_text=True).out)
    assert table.schema.field("embedding").type == arrow.list_(arrow.float32(), 32)
    assert np.array_equal(np.array(table["embedding"].to_pylist(), np.float32), expected)
    assert table["id"].to_pylist() == list(range(47))
    assert table["text"].to_pylist() == TEXTS
    rows = [{"id": f"d{i}", "text": text} for i, text in enumerate(TEXTS)]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    table = parquet.read_table(make("c.parquet", source).out)
    assert table.column_names == ["id", "embedding"]
    assert table["id"].to_pylist() == [row["id"] for row in rows]
    out = make("d.npy", source).out
    assert (tmp_path / "d.ids.txt").read_text(encoding="utf-8").split("\n") == [*(row["id"] for row in rows), ""]
    assert np.array_equal(np.load(out), expected)


def test_values_are_finite(make: Make, folder: Path, tmp_path: Path) -> None:
    twin = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    with torch.no_grad():
        twin[0].auto_model.encoder.layer[-1].output.LayerNorm.weight.mul_(1e6)
    twin.save(str(tmp_path / "large"))
    with pytest.raises(ValueError, match=r"the vector of the text '.*' is not finite in float16"):
        make(model=tmp_path / "large", dtype="float16")
    assert np.isfinite(np.load(make(model=tmp_path / "large").out)).all()


# ---- texts -----------------------------------------------------------------------------------------------------------

SOME = ["the film, was good", "", 'a "book"\tof', "naïve day"]


def write_all(folder: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """SOME in files of all kinds, and how their columns are named."""
    lines = "".join(f"{text}\n" for text in SOME).encode()
    rows = "".join(json.dumps({"id": i, "body": text}) + "\n\n" for i, text in enumerate(SOME)).encode()
    (folder / "a.txt").write_bytes(lines.replace(b"\n", b"\r\n"))
    (folder / "b.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + lines[:-1]))
    (folder / "c.jsonl").write_bytes(rows)
    (folder / "d.jsonl.xz").write_bytes(lzma.compress(rows.replace(b"body", b"text")))
    quoted = [text.replace('"', '""') for text in SOME]
    (folder / "e.csv").write_text("id,text\n" + "".join(f'{i},"{text}"\n' for i, text in enumerate(quoted)), "utf-8")
    (folder / "f.tsv").write_text(
        "".join(f"{i}\t{text}\n" for i, text in enumerate(SOME)).replace("\tof", " of"), "utf-8"
    )
    parquet.write_table(arrow.table({"text": SOME, "id": range(4)}), folder / "g.parquet")
    by_name = {"text": "body"}
    columns = [{}, {}, by_name, {}, {}, {"id": "1", "text": "2"}, {}]
    yield from zip(sorted(folder.iterdir()), columns, strict=True)


def test_files_of_all_kinds(tmp_path: Path) -> None:
    for file, columns in write_all(tmp_path):
        found = list(read_texts(find_texts([file]), columns))
        expected = [text.replace("\t", " ") for text in SOME] if file.suffix == ".tsv" else SOME
        assert [text.text for text in found] == expected, file
        ids = [None] * 4 if ".txt" in file.name else ["0", "1", "2", "3"]
        assert [text.id for text in found] == ids


def test_folders(make: Make, model: Any, tmp_path: Path) -> None:
    source = tmp_path / "texts"
    (source / "part").mkdir(parents=True)
    (source / ".hidden").mkdir()
    write(source / "b.txt", TEXTS[13:20])
    write(source / "part" / "a.txt", TEXTS[20:])
    write(source / "a.txt", TEXTS[:13])
    write(source / "notes.md", ["not read"])
    write(source / ".hidden" / "c.txt", ["not read"])
    first = np.load(make("a.npy", source).out)
    assert np.abs(first - model.encode(TEXTS)).max() < 1e-5
    listed = [source / "a.txt", source / "b.txt", source / "part"]
    assert np.array_equal(np.load(make("b.npy", listed).out), first)


def test_titles(tmp_path: Path) -> None:
    file = tmp_path / "corpus.jsonl"
    file.write_text('{"_id": "a", "title": "T", "text": "b"}\n{"_id": "c", "title": "", "text": "d"}\n')
    assert [row.text for row in read_texts([file])] == ["b", "d"]
    assert [(row.id, row.text) for row in read_texts([file], {"title": "title"})] == [("a", "T b"), ("c", "d")]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", b"good\nb\xffad\n", r"a\.txt:2: not UTF-8 at byte 1"),
        ("a.txt", b"good\nb\0ad\n", r"a\.txt:2: NUL character"),
        ("a.txt", b"", r"a\.txt: no texts"),
        ("a.txt.gz", gzip.compress(b"good\n" * 99, mtime=0)[:-9], r"a\.txt\.gz:\d+: damaged or cut"),
        ("a.jsonl", b'{"text": "a"}\n{"text"\n', r"a\.jsonl:2: no JSON"),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', r"a\.jsonl:2: a list; an object is needed"),
        ("a.jsonl", b'{"body": "a"}\n', r"a\.jsonl:1: no field text or sentence .*; there are 'body'"),
        ("a.jsonl", b'{"text": null}\n', r"a\.jsonl:1: text is a NoneType; a string is needed"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl:1: text holds half of a surrogate pair"),
        ("a.jsonl", b'{"text": "a", "id": 1}\n{"text": "b"}\n', r"a\.jsonl:2: no id; the texts before it have one"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b", "id": "x"}\n', r"a\.jsonl:2: an id; those before it have none"),
        ("a.jsonl", b'{"text": "a", "id": "x\\ny"}\n', r"a\.jsonl:1: id is 'x\\ny'; it must be a line of text"),
        ("a.jsonl", b'{"text": "a", "id": 1.5}\n', r"a\.jsonl:1: id is 1\.5; a string or a whole number"),
        ("a.tsv", b"id\tbody\n1\ta\n", r"a\.tsv:1: no column text"),
        ("a.csv", b'id,text\n1,"a\n', r"a\.csv:2: no CSV"),
        ("a.tsv", b"id\ttext\n1\n", r"a\.tsv:2: 1 field; the first line has 2"),
        ("a.parquet", b"PAR1", r"a\.parquet:1: damaged, cut or no Parquet"),
        ("a.md", b"good\n", r"a\.md: no known suffix; it must be \.txt"),
        ("a.parquet.gz", b"", r"a\.parquet\.gz: no known suffix"),
    ],
)
def test_faults(make: Make, tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=reason):
        make(source=tmp_path / name)
    assert not (tmp_path / "out.npy").exists()


def test_faults_of_parquet(tmp_path: Path) -> None:
    cases = [
        ({"body": ["a"]}, r"a\.parquet: no field text .*; there are 'body'"),
        ({"text": ["a", None]}, r"a\.parquet:2: text is a NoneType"),
        ({"text": [1]}, r"a\.parquet:1: text is a int"),
    ]
    for columns, reason in cases:
        parquet.write_table(arrow.table(columns), tmp_path / "a.parquet")
        with pytest.raises(DataError, match=reason):
            list(read_texts([tmp_path / "a.parquet"]))
    with pytest.raises(DataError, match="gone: does not exist"):
        find_texts([tmp_path / "gone"])
    with pytest.raises(ValueError, match="column 'label' is unknown; there are text, id and title"):
        list(read_texts([tmp_path / "a.parquet"], {"label": "x"}))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: holds no texts"):
        find_texts([tmp_path / "empty"])


def test_blanks_for_bad_lines(make: Make, model: Any, tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(b'\xff\n{\n{"text": "good", "id": "x"}\n{"text": 1, "id": "y"}\n{"text": "", "id": "z"}\n\xff')
    summary = make(source=source, on_problem="blank", block=2)
    assert (summary.rows, summary.empty, summary.bad) == (6, 5, 4)
    assert np.abs(np.load(summary.out) - model.encode(["", "", "good", "", "", ""])).max() < 1e-5
    assert (tmp_path / "out.ids.txt").read_text(encoding="utf-8") == "\n\nx\n\nz\n\n"
    texts = tmp_path / "b.txt"
    texts.write_bytes(b"good\n\xff\nbad")
    lines = list(read_texts([texts], on_problem="blank"))
    assert [(line.line, line.text, line.is_bad) for line in lines] == [
        (1, "good", False),
        (2, "", True),
        (3, "bad", False),
    ]
    texts.write_bytes(b"good\nb\0d\n")  # what follows is lost, so that rows would be
    with pytest.raises(DataError, match=r"b\.txt:2: NUL"):
        list(read_texts([texts], on_problem="blank"))


# ---- blocks ----------------------------------------------------------------------------------------------------------


class InterruptionError(Exception):
    """What interrupts a call."""


def stop_at(texts: int) -> Callable[[Progress], None]:
    def stop(progress: Progress) -> None:
        if progress.texts == texts:
            raise InterruptionError

    return stop


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_resumption(make: Make, tmp_path: Path, suffix: str) -> None:
    expected = make(f"whole{suffix}").out.read_bytes()
    with pytest.raises(InterruptionError):
        make(f"out{suffix}", on_progress=stop_at(30))
    work = tmp_path / f"out{suffix}.work"
    assert not (tmp_path / f"out{suffix}").exists()
    os.truncate(work / "00000001.parquet", 99)  # as no call leaves it, but a broken disk might
    (work / ".00000003.parquet.abc.tmp").touch()
    seen: list[int] = []
    summary = make(f"out{suffix}", on_progress=lambda progress: seen.append(progress.texts))
    assert summary.out.read_bytes() == expected
    assert seen[-1] == 47
    assert (summary.resumed, len(seen)) == (20, 3)
    assert not work.exists()
    again = make(f"out{suffix}", tokens_per_batch=99)
    assert (again.rows, again.dimensions, again.resumed) == (47, 32, 47)
    assert beside(summary.out) == [f"out{suffix}", f"out{suffix}.json"]


def test_killed(make: Make, folder: Path, file: Path, tmp_path: Path) -> None:
    expected = make("whole.npy").out.read_bytes()
    out = tmp_path / "out.npy"
    script = f"""
import time, torch
from pathlib import Path
from bert_fast.tasks.vectors import Options, embed
torch.set_num_threads(1)
options = Options(block=10, tokens_per_batch=200, device="cpu")
embed({str(folder)!r}, Path({str(file)!r}), Path({str(out)!r}), options=options, on_progress=lambda _: time.sleep(0.2))
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(bert_fast.__file__).parents[1])}
    with subprocess.Popen([sys.executable, "-c", script], env=environment) as child:
        deadline = time.monotonic() + 60
        while not (tmp_path / "out.npy.work" / "00000001.parquet").exists():
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(BlockingIOError, match="another process works in"):
            make()
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    assert not out.exists()
    summary = make()
    assert summary.resumed >= 20
    assert out.read_bytes() == expected


def test_memory(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """At no time more than two blocks are read and not written."""
    read = written = most = 0
    save = embedding.Work.save

    def spying(*args: Any) -> Iterator[Text]:
        nonlocal read, most
        for text in read_texts(*args):
            read += 1
            most = max(most, read - written)
            yield text

    def saving(work: Any, block: Any, vectors: Any) -> None:
        nonlocal written
        save(work, block, vectors)
        written += len(block.texts)

    monkeypatch.setattr(embedding, "read_texts", spying)
    monkeypatch.setattr(embedding.Work, "save", saving)
    assert make(block=3).rows == read == written == 47
    assert 3 <= most <= 6


@pytest.fixture
def begun(make: Make, tmp_path: Path) -> Path:
    """The work folder of an interrupted call."""
    with pytest.raises(InterruptionError):
        make(on_progress=stop_at(20))
    return tmp_path / "out.npy.work"


def test_other_options(make: Make, begun: Path, tmp_path: Path) -> None:
    other = save_encoder(tmp_path / "other", seed=2, max_position_embeddings=37)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"prompt": "a: "}, "prompt = None, now it is 'a: '"),
        ({"prompt_name": "query"}, "prompt_name = None, now it is 'query'"),
        ({"normalize": True}, "normalize = False, now it is True"),
        ({"dtype": "float16"}, "dtype = 'float32'"),
        ({"precision": "bf16"}, "precision = 'fp32'"),
        ({"int8": True}, "int8 = False"),
        ({"max_length": 9}, "max_length = None"),
        ({"block": 11}, "block = 10, now it is 11; go back to it, delete out.npy.work or name another file"),
        ({"model": other}, "model = "),
    ]
    before = sorted(path.stat().st_mtime_ns for path in begun.iterdir() if path.suffix == ".parquet")
    for options, reason in cases:
        with pytest.raises(ValueError, match=f"out.npy.work is of {reason}"):
            make(**options)
    assert sorted(path.stat().st_mtime_ns for path in begun.iterdir() if path.suffix == ".parquet") == before
    assert make().resumed == 20


def test_nothing_done_binds_to_nothing(make: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="prompt_name is 'title'; the model has 'query', 'document'"):
        make(prompt_name="title")
    assert (tmp_path / "out.npy.work").is_dir()
    assert make(prompt_name="query").rows == 47


@pytest.mark.usefixtures("begun")
def test_other_texts(make: Make, file: Path) -> None:
    write(file, [*TEXTS[:12], "a new day", *TEXTS[13:]])
    with pytest.raises(ValueError, match=r"begun with other texts: rows 11 to 20 have changed"):
        make()
    write(file, TEXTS[:10])
    with pytest.raises(ValueError, match="begun with more texts than the 1 blocks"):
        make()
    write(file, [])
    with pytest.raises(ValueError, match="begun with more texts than the 0 blocks"):
        make()
    write(file, TEXTS)
    assert make().resumed == 20


def test_finished_files(make: Make, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = make().out.read_bytes()
    monkeypatch.setattr(embedding, "Embedder", None)
    assert make().resumed == 47
    with pytest.raises(ValueError, match=r"out\.npy is of normalize = False, now it is True"):
        make(normalize=True)
    write(file, [*TEXTS[:-1], "another day"])
    with pytest.raises(ValueError, match=r"out\.npy is of other texts"):
        make()
    assert (tmp_path / "out.npy").read_bytes() == before
    for name in ("a.npy", "a.npy.json", "a.ids.txt"):
        (tmp_path / name).touch()
        with pytest.raises(ValueError, match=f"{name} without the rest of what embed writes; delete them or"):
            make("a.npy")
        (tmp_path / name).unlink()
    (tmp_path / "a.npy.work").mkdir()
    (tmp_path / "a.npy.work" / "thesis.txt").touch()
    with pytest.raises(ValueError, match=r"a\.npy\.work holds thesis\.txt and no unfinished vectors"):
        make("a.npy")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"block": 0}, "block is 0; it must be at least 1"),
        ({"tokens_per_batch": 0}, "tokens_per_batch is 0"),
        ({"dtype": "int8"}, "dtype is 'int8'; it must be one of float32, float16"),
        ({"precision": "fp8"}, "precision is 'fp8'"),
        ({"precision": "fp16"}, "precision is 'fp16', which needs a GPU"),
        ({"on_problem": "skip"}, "on_problem is 'skip'; it must be one of refuse, blank"),
        ({"prompt": "a", "prompt_name": "b"}, "prompt is 'a' and prompt_name is 'b'"),
        ({"keep_text": True}, r"keep_text is True, and out is .*\.npy; only \.parquet"),
        ({"name": "out.csv"}, r"out is .*out\.csv; its suffix must be \.npy or \.parquet"),
        ({"name": "gone/out.npy"}, "the folder .*gone does not exist"),
        ({"max_length": 1000}, "max_length is 1000"),
    ],
)
def test_refused(make: Make, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make(**options)


def test_refused_places(make: Make, folder: Path, file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="which lies in the source"):
        make(source=tmp_path)
    with pytest.raises(ValueError, match="engine is 'spark'; it must be one of local, ray"):
        embed(folder, file, tmp_path / "out.npy", engine="spark")  # type: ignore[arg-type]
