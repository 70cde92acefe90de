"""Retrieval data in the layout of BEIR (Thakur et al. 2021): corpus, queries, and who answers whom."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from weakref import WeakValueDictionary

from ...lines import OPENERS
from .problems import DataError, bad_line, lines_of
from .queries import Corpus, Query
from .tables import Row, json_rows

__all__ = ["is_beir", "read_beir"]

HEADER = "query-id, corpus-id, score"

_read: WeakValueDictionary[tuple[Path, int, int], Corpus] = WeakValueDictionary()
"""Corpora that are in use, so that training and evaluation queries share one."""


def is_beir(path: Path) -> bool:
    """Whether a path is a folder, or a file of queries or qrels with a corpus where it belongs."""
    return path.is_dir() or ((_is_queries(path) or _is_qrels(path)) and bool(_named(_folder(path), "corpus.jsonl")))


def read_beir(path: Path, split: str | None = None, *, is_labelled: bool = True) -> list[Query]:
    """The queries of a split, in the order of its qrels, or all queries of a folder where none need be answered.

    A folder has corpus.jsonl (_id, title, text), queries.jsonl (_id, text) and qrels/SPLIT.tsv or qrels-SPLIT.tsv with
    the header query-id, corpus-id, score, each also with .gz or .xz. A document's text is its title and its text with a
    space between. Grades from 1 on make it relevant, others a negative of the query.

    Args:
        path: the folder, or one of its files of qrels, which says the split, or of queries.
        split: of the folder; None: its only one.
        is_labelled: whether the queries must have been judged.

    Raises:
        DataError: a missing file or split, a line that cannot be read, an id that is unknown or there twice.
        OSError: a file cannot be opened.
    """
    folder = _folder(path)
    corpus = _corpus(_the(folder, "corpus.jsonl"))
    queries = _queries(path if _is_queries(path) else _the(folder, "queries.jsonl"), corpus)
    if _is_qrels(path):
        return _judged(path, queries, corpus)
    if not is_labelled:
        return list(queries.values())
    if not path.is_dir():
        raise DataError(f"{path}: it does not say which documents are relevant; name the folder or a file of qrels")
    return _judged(_qrels(folder, split), queries, corpus)


# ---- files -----------------------------------------------------------------------------------------------------------


def _bare(file: Path) -> str:
    """The name without .gz and .xz."""
    return file.stem if file.suffix.lower() in OPENERS else file.name


def _is_queries(path: Path) -> bool:
    return _bare(path).startswith("queries") and _bare(path).endswith(".jsonl") and not path.is_dir()


def _is_qrels(path: Path) -> bool:
    name = _bare(path)
    is_there = path.parent.name == "qrels" or name.startswith("qrels-")
    return is_there and name.endswith(".tsv") and not path.is_dir()


def _folder(path: Path) -> Path:
    if path.is_dir():
        return path
    return path.parent.parent if path.parent.name == "qrels" and _is_qrels(path) else path.parent


def _named(folder: Path, name: str) -> list[Path]:
    return [file for suffix in ("", *OPENERS) if (file := folder / (name + suffix)).is_file()]


def _the(folder: Path, name: str) -> Path:
    found = _named(folder, name)
    if len(found) != 1:
        there = f"{len(found)} files: {', '.join(file.name for file in found)}" if found else "no such file"
        raise DataError(f"{folder / name}: {there}; a folder in the layout of BEIR has one")
    return found[0]


def _qrels(folder: Path, split: str | None) -> Path:
    files = sorted([*folder.glob("qrels/*.tsv*"), *folder.glob("qrels-*.tsv*")])
    splits = {_bare(file).removesuffix(".tsv").removeprefix("qrels-"): file for file in files if _is_qrels(file)}
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))
    if split not in splits:
        asked = "several splits" if split is None else f"no split {split!r}"
        there = ", ".join(splits) or "no qrels"
        raise DataError(f"{folder}: {asked} (there are {there}); the setting split, or the file's name, says which")
    return splits[split]


# ---- contents --------------------------------------------------------------------------------------------------------


def _corpus(file: Path) -> Corpus:
    status = file.stat()
    key = (file.resolve(), status.st_mtime_ns, status.st_size)
    corpus = _read.get(key)
    if corpus is None:
        corpus = Corpus()
        for row in _rows(file):
            name = _id(row)
            if name in corpus.rows:
                row.refuse(f"_id {name!r} is there twice")
            corpus.add(name, f"{_string(row, 'title', '')} {_string(row, 'text')}".strip())
        if not len(corpus):
            raise bad_line(file, None, "no documents")
        _read[key] = corpus
    return corpus


def _queries(file: Path, corpus: Corpus) -> dict[str, Query]:
    found: dict[str, Query] = {}
    for row in _rows(file):
        name, text = _id(row), _string(row, "text").strip()
        if name in found:
            row.refuse(f"_id {name!r} is there twice")
        found[name] = Query(row.place, name, text or row.refuse("text is empty"), {}, [], corpus)
    if not found:
        raise bad_line(file, None, "no queries")
    return found


def _judged(file: Path, queries: dict[str, Query], corpus: Corpus) -> list[Query]:
    """The queries of a file of qrels, with what is relevant to them."""
    found: dict[str, Query] = {}
    seen: set[tuple[str, str]] = set()
    for line, name, document, grade in _judgements(file):
        if name not in queries:
            raise bad_line(file, line, f"query-id {name!r} is not among the queries")
        if document not in corpus.rows:
            raise bad_line(file, line, f"corpus-id {document!r} is not in the corpus")
        if (name, document) in seen:
            raise bad_line(file, line, f"query-id {name!r} and corpus-id {document!r} are there twice")
        seen.add((name, document))
        query = found.setdefault(name, queries[name])
        if grade > 0:
            query.positives[document] = grade
        else:
            query.negatives.append(document)
    if not found:
        raise bad_line(file, None, "no rows")
    return list(found.values())


def _judgements(file: Path) -> Iterator[tuple[int, str, str, int]]:
    is_header = True
    for line, text in lines_of(file):
        fields = [field.strip() for field in text.split("\t")]
        if not text.strip():
            continue
        if len(fields) != 3:
            raise bad_line(file, line, f"{len(fields)} fields between tabs; there must be three, {HEADER}")
        try:
            grade = int(fields[2])
        except ValueError:
            if not is_header:
                raise bad_line(file, line, f"score is {fields[2]!r}; a whole number is needed") from None
        else:
            if is_header:
                raise bad_line(file, line, f"no header; the first line must be {HEADER}")
            yield line, fields[0], fields[1], grade
        is_header = False


def _rows(file: Path) -> Iterator[Row]:
    for line, values in json_rows(file):
        yield Row(file, line, values)


def _id(row: Row) -> str:
    value = row.values.get("_id")
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        row.refuse("no _id, which must be a string" if value in (None, "") else f"_id is {value!r}; a string is needed")
    return str(value)


def _string(row: Row, name: str, default: str | None = None) -> str:
    value = row.values.get(name)
    if value is None:
        value = default if default is not None else row.refuse(f"no {name}")
    if not isinstance(value, str):
        row.refuse(f"{name} is a {type(value).__name__}; a string is needed")
    return value
