"""WordPiece vocabularies (Wu et al. 2016; Devlin et al. 2018): training, loading, saving, encoding."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from .shards import write_atomically

__all__ = ["Vocabulary", "load", "train"]

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PREFIX = "##"

# Characters that get an entry: at least so many of the most frequent, and as many as make this share of the text. The
# first bounds what rare scripts take from an English vocabulary, the second gives Chinese what it needs.
MIN_ALPHABET = 1000
COVERAGE = 0.9999


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """A WordPiece tokenizer and what pretraining needs to know of it; see `load` and `train`.

    Attributes:
        tokenizer: the tokenizer, without truncation and padding.
        size: entries; the ids are [0, size).
        pad_id, unk_id, cls_id, sep_id, mask_id: ids of [PAD], [UNK], [CLS], [SEP] and [MASK].
        is_continuation: (size,) bool, whether an entry continues a word ("##ing").
    """

    tokenizer: Tokenizer
    size: int
    pad_id: int
    unk_id: int
    cls_id: int
    sep_id: int
    mask_id: int
    is_continuation: npt.NDArray[np.bool_]

    @property
    def special_ids(self) -> list[int]:
        """The ids of [PAD], [UNK], [CLS], [SEP] and [MASK], ascending."""
        return sorted((self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer.json that `save` writes, in hexadecimal."""
        return hashlib.sha256(self._json()).hexdigest()

    def _json(self) -> bytes:
        content = json.loads(self.tokenizer.to_str())
        return json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode("utf-8")

    def encode_lines(self, lines: Sequence[str]) -> list[list[int]]:
        """The ids of each line, without special tokens; "[SEP]" written in a text is text, "[", "sep" and "]"."""
        self.tokenizer.encode_special_tokens = True  # not kept in JSON, thus lost in pickles
        return [line.ids for line in self.tokenizer.encode_batch_fast(list(lines), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids, special tokens included."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json, vocab.txt and tokenizer_config.json into `folder`, which is made.

        With BERT's config.json beside them transformers.AutoTokenizer reads them, as a BertTokenizerFast.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        ids = self.tokenizer.get_vocab()
        normalizer = self.tokenizer.normalizer
        config = {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": normalizer.lowercase,
            "strip_accents": normalizer.strip_accents,
            "tokenize_chinese_chars": normalizer.handle_chinese_chars,
            **{f"{token[1:-1].lower()}_token": token for token in SPECIAL_TOKENS},
        }
        write_atomically(folder / "vocab.txt", "".join(f"{token}\n" for token in sorted(ids, key=ids.__getitem__)))
        write_atomically(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
        write_atomically(folder / "tokenizer.json", self._json())


def load(path: str | Path) -> Vocabulary:
    """Reads a BERT vocabulary.

    Args:
        path: tokenizer.json, or vocab.txt, or a folder with one of them, the first preferred. With vocab.txt the rules
            come from a tokenizer_config.json beside it (do_lower_case, strip_accents, tokenize_chinese_chars), without
            one they are those of bert-base-uncased.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no BERT WordPiece vocabulary; the message names what is missing.
    """
    file = _file(Path(path))
    try:
        tokenizer = Tokenizer.from_file(str(file)) if file.suffix == ".json" else _from_vocab_txt(file)
    except ValueError:
        raise
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"{file} cannot be read: {error}") from None
    return _checked(tokenizer, str(file))


def train(documents: Iterable[list[str]], *, size: int, lowercase: bool = True, min_frequency: int = 2) -> Vocabulary:
    """Trains a WordPiece vocabulary with BERT's normaliser and pre-tokenizer; the same text gives the same vocabulary.

    The text is kept in a temporary file meanwhile.

    Args:
        documents: lists of lines.
        size: entries at most; fewer where the text has no more pieces. [PAD], [UNK], [CLS], [SEP], [MASK] are 0 to 4.
        lowercase: whether upper case and accents are taken away.
        min_frequency: occurrences that a piece of several characters needs.

    Raises:
        ValueError: there is no text, size is too small for its characters, or min_frequency is below 1.
    """
    if min_frequency < 1:
        raise ValueError(f"min_frequency is {min_frequency}; it must be at least 1")
    trained = _tokenizer({}, lowercase=lowercase)
    characters: Counter[str] = Counter()
    with TemporaryFile("w+", encoding="utf-8", newline="\n") as text:
        for document in documents:
            for line in document:
                characters.update(line)
                text.write(line.replace("\n", " ") + "\n")
        # Given the alphabet as "special tokens" its ids do not depend on the order of a hash map, as they else would;
        # the trainer's own alphabet is empty then.
        entries = [*SPECIAL_TOKENS, *_alphabet(characters, trained)]
        if len(entries) == len(SPECIAL_TOKENS):
            raise ValueError("documents hold no text")
        if len(entries) > size:
            raise ValueError(f"size is {size}; special tokens and the text's characters alone need {len(entries)}")
        trainer = trainers.WordPieceTrainer(
            vocab_size=size, min_frequency=min_frequency, special_tokens=entries, limit_alphabet=0, show_progress=False
        )
        text.seek(0)
        trained.train_from_iterator(text, trainer)
    return _checked(_tokenizer(trained.get_vocab(), lowercase=lowercase), "the trained vocabulary")


def _alphabet(characters: Counter[str], tokenizer: Tokenizer) -> list[str]:
    """Entries of one character, as a word's first ("a") and, where it can be, as a later one ("##a")."""

    def words(text: str) -> list[str]:
        return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))]

    counts: Counter[str] = Counter()
    for character, count in characters.items():
        for part in "".join(words(character)):
            counts[part] += count
    total, covered = sum(counts.values()), 0
    kept: list[str] = []
    for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if len(kept) >= MIN_ALPHABET and covered >= COVERAGE * total:
            break
        kept.append(character)
        covered += count
    kept.sort()
    return [*kept, *(PREFIX + character for character in kept if len(words("a" + character)) == 1)]


def _tokenizer(
    ids: dict[str, int], *, lowercase: bool, strip_accents: bool | None = None, chinese: bool = True
) -> Tokenizer:
    """BERT's tokenizer with these entries."""
    model = models.WordPiece(ids, unk_token="[UNK]", continuing_subword_prefix=PREFIX, max_input_chars_per_word=100)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=lowercase, strip_accents=strip_accents, handle_chinese_chars=chinese
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix=PREFIX)
    return tokenizer


def _file(path: Path) -> Path:
    if path.is_file():
        if path.suffix not in (".json", ".txt"):
            raise ValueError(f"{path} is neither a tokenizer.json nor a vocab.txt")
        return path
    files = [file for name in ("tokenizer.json", "vocab.txt") if (file := path / name).is_file()]
    if not files:
        raise FileNotFoundError(f"{path} is no file, and no folder with tokenizer.json or vocab.txt")
    return files[0]


def _from_vocab_txt(file: Path) -> Tokenizer:
    config: dict[str, Any] = {}
    beside = file.with_name("tokenizer_config.json")
    if beside.is_file():
        config = json.loads(beside.read_text(encoding="utf-8"))
    return _tokenizer(
        models.WordPiece.read_file(str(file)),
        lowercase=config.get("do_lower_case", True),
        strip_accents=config.get("strip_accents"),
        chinese=config.get("tokenize_chinese_chars", True),
    )


def _checked(tokenizer: Tokenizer, source: str) -> Vocabulary:
    """The vocabulary of a tokenizer that is one of BERT's."""
    _check_parts(tokenizer, source)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokens = tokenizer.get_vocab()
    size = len(tokens)
    pad_id, unk_id, cls_id, sep_id, mask_id = (tokens[token] for token in SPECIAL_TOKENS)
    if sorted(tokens.values()) != list(range(size)):
        raise ValueError(
            f"{source} has {size} entries with ids up to {max(tokens.values())}; an entry stands in it twice"
        )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    if tokenizer.decoder is None:
        tokenizer.decoder = decoders.WordPiece(prefix=PREFIX)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", cls_id), ("[SEP]", sep_id)],
    )
    is_continuation = np.zeros(size, dtype=np.bool_)
    is_continuation[[index for token, index in tokens.items() if token.startswith(PREFIX) and token != PREFIX]] = True
    return Vocabulary(tokenizer, size, pad_id, unk_id, cls_id, sep_id, mask_id, is_continuation)


def _check_parts(tokenizer: Tokenizer, source: str) -> None:
    expected = (
        ("model", tokenizer.model, models.WordPiece),
        ("normalizer", tokenizer.normalizer, normalizers.BertNormalizer),
        ("pre_tokenizer", tokenizer.pre_tokenizer, pre_tokenizers.BertPreTokenizer),
    )
    for name, part, kind in expected:
        if not isinstance(part, kind):
            found = "missing" if part is None else type(part).__name__
            raise ValueError(f"{source}: {name} is {found}; it must be {kind.__name__}, as BERT's is")
    if tokenizer.model.continuing_subword_prefix != PREFIX:
        raise ValueError(
            f"{source}: continuing_subword_prefix is {tokenizer.model.continuing_subword_prefix!r}; it must be '##'"
        )
    if missing := [token for token in SPECIAL_TOKENS if tokenizer.token_to_id(token) is None]:
        raise ValueError(f"{source} has no {', '.join(missing)}; BERT needs {', '.join(SPECIAL_TOKENS)}")
