"""Files of text, or data sets, as documents: lists of lines, each a paragraph or a sentence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .problems import CorpusError, OnProblem, Problem, refuse
from .readers import READERS, document_in
from .sentences import split_sentences

__all__ = [
    "CorpusError",
    "OnProblem",
    "Problem",
    "documents_of",
    "find_files",
    "read_documents",
    "refuse",
    "split_sentences",
]

PACKED = (".gz", ".xz")
ALLOWED = ".txt, .jsonl (both also with .gz or .xz) or .parquet"

DATASET = Path("dataset")  # stands for a file's name in problems with data sets


def find_files(paths: Sequence[str | Path]) -> list[Path]:
    """The files of a corpus, each once, in the order of `paths`; a folder's files sorted by their paths.

    Folders are searched recursively for .txt, .jsonl (both also with .gz or .xz) and .parquet. Hidden files and folders
    are left out, and links to folders are not followed.

    Raises:
        CorpusError: a path does not exist, a file has another suffix, or nothing is found.
    """
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if _is_visible(file.relative_to(path)) and file.is_file())
        elif not path.exists():
            raise CorpusError(f"{path} does not exist; a file ({ALLOWED}) or a folder is needed")
        elif _kind(path) is None:
            raise CorpusError(f"{path} has no known suffix; it must be {ALLOWED}")
        else:
            files = [path]
        for file in files:
            if _kind(file) is not None:
                found.setdefault(file.resolve(), file)
    if not found:
        raise CorpusError(f"no files found in {', '.join(map(str, paths)) or 'no paths'}; they must be {ALLOWED}")
    return list(found.values())


def read_documents(file: Path, *, field: str = "text", on_problem: OnProblem) -> Iterator[list[str]]:
    """The documents of one file; each a list of its lines, stripped and none of them empty.

    .txt: UTF-8, blank lines between documents. .jsonl: an object a line. .parquet: a row each. Of the last two `field`
    is the document, a string with its lines or a list of strings. Files are streamed.

    Args:
        file: one of find_files.
        field: key or column of the text.
        on_problem: gets each line or row that is skipped because it is not UTF-8, holds NUL characters, is broken JSON,
            or lacks a text in `field`; a damaged or cut file, of which the rest is skipped; a line or a document that
            is longer than lines.MAX_LINE, of which the first is skipped and the second cut; a file without any text.

    Raises:
        CorpusError: the file has an unknown suffix.
    """
    kind = _kind(file)
    if kind is None:
        raise CorpusError(f"{file} has no known suffix; it must be {ALLOWED}")
    yield from _unless_empty(READERS[kind](file, field, on_problem), file, on_problem)


def documents_of(
    dataset: Iterable[Mapping[str, Any]], *, field: str = "text", on_problem: OnProblem
) -> Iterator[list[str]]:
    """The documents of a Hugging Face data set, a streamed one too, or of anything that yields mappings.

    Args:
        dataset: rows; `field` of each is a string with the document's lines, or a list of strings.
        field: key of the text.
        on_problem: gets each row that has no text in `field`, and a data set without any text.
    """
    documents = (document_in(row, field, DATASET, number, on_problem) for number, row in enumerate(dataset, 1))
    yield from _unless_empty(filter(None, documents), DATASET, on_problem)


def _unless_empty(documents: Iterable[list[str]], file: Path, on_problem: OnProblem) -> Iterator[list[str]]:
    is_empty = True
    for document in documents:
        is_empty = False
        yield document
    if is_empty:
        on_problem(Problem(file, None, "holds no text"))


def _is_visible(path: Path) -> bool:
    return not any(part.startswith(".") for part in path.parts)


def _kind(file: Path) -> str | None:
    """The suffix that says how to read a file; None where it is unknown."""
    suffixes = [suffix.lower() for suffix in file.suffixes[-2:]]
    if suffixes and suffixes[-1] in PACKED:
        return suffixes[0] if len(suffixes) == 2 and suffixes[0] in (".txt", ".jsonl") else None
    return suffixes[-1] if suffixes and suffixes[-1] in READERS else None
