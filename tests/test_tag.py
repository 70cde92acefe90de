"""Tagging: what is learnt from labels, training, predictions against plain transformers, measures against seqeval."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from models import one_thread, theirs  # noqa: F401

from bert_fast.tasks import DataError, Outcome, Sources, Training, open_model
from bert_fast.tasks.data.sentences import Sentence
from bert_fast.tasks.finetune import finetune
from bert_fast.tasks.tag import Tag
from bert_fast.tasks.task import Model, Prediction

transformers: Any = pytest.importorskip("transformers")

TAGS = {"Anna": "B-PER", "Otto": "B-PER", "Oslo": "B-LOC", "Rome": "B-LOC", "Hall": "I-LOC"}
OTHERS = ["a", "b", "in", "rain", "##s", "##lo", "Os", ".", "(", ")"]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *TAGS, *OTHERS]
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

LABELS = ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")


def save_tokenizer(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def save_model(folder: Path, name: str, **config: Any) -> Path:
    save_tokenizer(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    torch.manual_seed(3)
    whole = transformers.BertConfig(vocab_size=len(VOCABULARY), max_position_embeddings=64, **sizes, **config)
    getattr(transformers, name)(whole).save_pretrained(str(folder))
    return folder


def toy(count: int, seed: int) -> str:
    """Columns in which a word's label is always the same."""
    draw = random.Random(seed)
    phrases = ["Anna", "Otto", "Oslo", "Rome", "Rome Hall", "Oslo Hall", "a", "b", "in", "rains", ".", "(", ")"]
    rows = (" ".join(draw.choices(phrases, k=draw.randint(3, 9))).split() for _ in range(count))
    return "\n\n".join("\n".join(f"{word}\t{TAGS.get(word, 'O')}" for word in words) for words in rows)


def sentences(*rows: str, place: str = "x") -> list[Sentence]:
    """From "word/label word/label"."""
    pairs = [[word.rsplit("/", 1) for word in row.split()] for row in rows]
    return [
        Sentence(f"{place}:{number}", tuple(word for word, _ in row), tuple(label for _, label in row))
        for number, row in enumerate(pairs, 1)
    ]


def found(*rows: str) -> list[Prediction]:
    return [{"labels": row.split()} for row in rows]


def by_transformers(model: Any, tokenizer: Any, words: list[str]) -> list[str]:
    """Labels of the words' first pieces, for words that have some."""
    encoded = tokenizer([words], is_split_into_words=True, return_tensors="pt")
    with torch.no_grad():
        best = model(**encoded).logits[0].argmax(-1).tolist()
    first = {word: place for place, word in reversed(list(enumerate(encoded.word_ids(0)))) if word is not None}
    return [model.config.id2label[best[first[word]]] for word in sorted(first)]


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("run")
    (folder / "train.conll").write_text(toy(64, 1))
    (folder / "dev.conll").write_text(toy(24, 2))
    source = save_model(folder / "source", "BertModel", initializer_range=0.05, **STILL)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return finetune(
            Tag(),
            Sources(model=str(source), train=folder / "train.conll", dev=folder / "dev.conll"),
            folder / "out",
            Training(epochs=4, batch_size=16, learning_rate=2e-2),
            before=True,
            device=torch.device("cpu"),
        )
    finally:
        torch.set_num_threads(before)


def test_finetune(run: Outcome) -> None:
    assert run.before["f1"] < 0.3
    assert run.measures["f1"] > 0.9
    assert {"precision", "recall", "f1", "f1_lenient", "accuracy", "f1_LOC", "f1_PER"} == run.measures.keys()
    config = json.loads((run.folder / "config.json").read_text())
    assert config["id2label"] == {str(index): name for index, name in enumerate(LABELS)}
    assert config["label2id"] == {name: index for index, name in enumerate(LABELS)}
    task = json.loads((run.folder / "bert_fast_task.json").read_text())["settings"]
    assert (task["scheme"], task["labels"], task["fallback"]) == ("IOB2", list(LABELS), "O")
    assert {file.name for file in run.files} >= {"confusion.png", "metrics.json", "dev_predictions.jsonl", "loss.png"}
    rows = [json.loads(line) for line in (run.folder / "dev_predictions.jsonl").read_text().splitlines()]
    assert rows[0].keys() == {"place", "tokens", "labels", "scores", "entities"}


def test_plain_transformers_say_the_same(run: Outcome, tmp_path: Path) -> None:
    model = transformers.AutoModelForTokenClassification.from_pretrained(str(run.folder)).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(run.folder))
    (tmp_path / "a.conll").write_text(toy(30, 3))
    tuned = open_model(run.folder, device=torch.device("cpu"))
    examples = tuned.task.read(tmp_path / "a.conll")
    predictions = tuned.predict(examples, 50)
    for example, prediction in zip(examples, predictions, strict=True):
        assert prediction["labels"] == by_transformers(model, tokenizer, list(example.tokens))

    pipeline = transformers.pipeline("token-classification", model=model, tokenizer=tokenizer, ignore_labels=[])
    text = "Anna in Oslo ( Rome Hall )"
    (tmp_path / "a.txt").write_text(text)
    (ours,) = tuned.predict(tuned.task.read(tmp_path / "a.txt", is_labelled=False))
    rows = pipeline(text)
    assert ours["labels"] == [row["entity"] for row in rows]
    assert ours["scores"] == pytest.approx([float(row["score"]) for row in rows], abs=1e-5)


def test_entities_of_texts_and_of_words(run: Outcome, tmp_path: Path) -> None:
    tuned = open_model(run.folder, device=torch.device("cpu"), words="punctuation")
    rows: list[dict[str, Any]] = [
        {"text": " Anna  in (Rome\tHall)."},
        {"tokens": ["Anna", "in", "(", "Rome", "Hall", ")", "."]},
    ]
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    of_text, of_words = tuned.predict(tuned.task.read(file, is_labelled=False))
    assert of_text["labels"] == of_words["labels"] == ["B-PER", "O", "O", "B-LOC", "I-LOC", "O", "O"]
    assert [(row["type"], row["text"], row["start"], row["end"]) for row in of_text["entities"]] == [
        ("PER", "Anna", 1, 5),
        ("LOC", "Rome\tHall", 11, 20),
    ]
    assert [(row["type"], row["text"], row["start"], row["end"]) for row in of_words["entities"]] == [
        ("PER", "Anna", 0, 1),
        ("LOC", "Rome Hall", 3, 5),
    ]
    assert of_words["entities"][1]["score"] == pytest.approx(sum(of_words["scores"][3:5]) / 2)
    assert of_words["tokens"] == rows[1]["tokens"]


def test_a_word_without_pieces_shifts_nothing(run: Outcome) -> None:
    tuned = open_model(run.folder, device=torch.device("cpu"))
    words = ["Anna", "rains", "in", "Oslo", "."]
    with_none = Sentence("x:1", ("\ufe0f", *words[:2], "\u200b", *words[2:], "\x7f"))
    plain, odd, none = tuned.predict([Sentence("x:1", tuple(words)), with_none, Sentence("x:2", ("\u200b",))])
    assert plain["labels"] == ["B-PER", "O", "O", "B-LOC", "O"]
    assert [label for place, label in enumerate(odd["labels"]) if place not in (0, 3, 7)] == plain["labels"]
    assert [(odd["labels"][place], odd["scores"][place]) for place in (3, 7)] == [("O", 0.0)] * 2
    assert (none["labels"], none["scores"], none["entities"]) == (["O"], [0.0], [])
    tuned.model.tokenizer.padding_side = "left"
    assert [row["labels"] for row in tuned.predict([with_none, Sentence("x:3", ("Anna", "in"))])] == [
        odd["labels"],
        ["B-PER", "O"],
    ]


# ---- use of a random model -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("random") / "model"
    names = dict(enumerate(LABELS))
    return save_model(
        folder,
        "BertForTokenClassification",
        id2label=names,
        label2id={name: index for index, name in names.items()},
        initializer_range=0.6,
    )


def test_long_sentences(random_model: Path) -> None:
    """Windows of 18 words that share 4; in each of them plain transformers says the same of the words it owns."""
    tuned = open_model(random_model, device=torch.device("cpu"), max_length=20, stride=4)
    model = transformers.AutoModelForTokenClassification.from_pretrained(str(random_model)).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(random_model))
    draw = random.Random(4)
    words = draw.choices([*TAGS, "a", "b", "in", "rain"], k=60)
    ours, short = tuned.predict([Sentence("x:1", tuple(words)), Sentence("x:2", tuple(words[:18]))])
    windows = [by_transformers(model, tokenizer, words[start : start + 18]) for start in (0, 14, 28, 42)]
    parts = [windows[0][:16], windows[1][2:16], windows[2][2:16], windows[3][2:]]
    assert ours["labels"] == [label for part in parts for label in part]
    assert short["labels"] == windows[0]
    whole = by_transformers(model, tokenizer, words)
    assert ours["labels"] != whole
    assert (
        open_model(random_model, device=torch.device("cpu")).predict([Sentence("x", tuple(words))])[0]["labels"]
        == whole
    )


def test_training_rows(random_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bert_fast.tasks import hugging_face

    task = Tag(repair=True, max_length=7, stride=2).fitted(sentences("Oslo/B-LOC Oslos/I-PER a/O", "Anna/I-PER"))
    monkeypatch.setattr(hugging_face, "trainer", lambda *given: given[1])
    examples = sentences("Oslos/B-LOC rains/O Anna/I-PER Otto/I-PER", "\u200b/B-PER", "a/O")
    rows = task.trainer(task.load(str(random_model)), examples, {})
    ids = [[VOCABULARY[index] for index in row["input_ids"]] for row in rows]
    assert ids == [
        ["[CLS]", "Oslo", "##s", "rain", "##s", "Anna", "[SEP]"],
        ["[CLS]", "Anna", "Otto", "[SEP]"],
        ["[CLS]", "a", "[SEP]"],
    ]
    assert [row["labels"] for row in rows] == [
        [-100, LABELS.index("B-LOC"), -100, 0, -100, LABELS.index("B-PER"), -100],
        [-100, -100, LABELS.index("I-PER"), -100],
        [-100, 0, -100],
    ]
    with pytest.raises(DataError, match=r"x:1: the tokenizer leaves nothing of any training example"):
        task.trainer(task.load(str(random_model)), sentences("\u200b/O"), {})


def test_words_of_byte_tokenizers_stand_after_a_blank(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.processors import TemplateProcessing

    vocabulary = {piece: index for index, piece in enumerate(["<s>", "</s>", "<pad>", "<unk>", "Ġ", "a", "b", "Ġa"])}
    bytes_ = Tokenizer(BPE(vocab=vocabulary, merges=[("Ġ", "a")], unk_token="<unk>"))
    bytes_.pre_tokenizer = ByteLevel(add_prefix_space=False)
    bytes_.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    names = {"unk_token": "<unk>", "pad_token": "<pad>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=bytes_, **names).save_pretrained(str(tmp_path / "in"))
    theirs("BertModel", vocab_size=8).save_pretrained(str(tmp_path / "in"))
    model = Tag().fitted(sentences("a/B-X")).build(str(tmp_path / "in"))
    model.tokenizer.save_pretrained(str(tmp_path / "out"))
    for tokenizer in (model.tokenizer, transformers.AutoTokenizer.from_pretrained(str(tmp_path / "out"))):
        assert tokenizer([["a", "ab"]], is_split_into_words=True)["input_ids"] == [[0, 7, 7, 6, 1]]


# ---- labels ----------------------------------------------------------------------------------------------------------


def test_fitted() -> None:
    task = Tag().fitted(sentences("a/O Anna/B-PER", "Oslo/B-LOC b/I-LOC"))
    assert (task.scheme, task.labels, task.fallback, task.best) == ("IOB2", LABELS, "O", "f1")
    task = Tag().fitted(sentences("a/DT b/NN", "in/IN b/NN", "b/NN a/DT"))
    assert (task.scheme, task.labels, task.fallback) == ("none", ("DT", "IN", "NN"), "NN")
    assert task.best == "accuracy"
    assert Tag(scheme="none").fitted(sentences("a/O b/B-X")).labels == ("B-X", "O")
    assert Tag.of_settings(json.loads(json.dumps(task.settings()))) == task


@pytest.mark.parametrize(
    ("rows", "settings", "reason"),
    [
        (["a/O", "a/B-X b/I-Y"], {}, "x:2: word 2, 'b': label 'I-Y' between B-X and the end is impossible in IOB2"),
        (["a/B-X b/O", "a/I-X"], {}, "x:2: word 1, 'a': label 'I-X' between the beginning and the end is impossible"),
        (["a/I-X b/O c/B-X"], {"scheme": "IOB1"}, "x:1: word 3, 'c': label 'B-X' between O and the end is impossible"),
        (
            ["a/S-X b/B-X c/O"],
            {},
            "x:1: word 2, 'b': label 'B-X' between S-X and O is impossible in BIOES; repair would",
        ),
        (["a/B-X b/M-X"], {}, "x:1: word 2, 'b': label 'M-X' is no tag of IOB2"),
        (["a/B-X b/E-X c/U-X"], {}, "x:1: word 3, 'c': label 'U-X' is no tag of BIOES"),
        (["a/DT"], {"scheme": "IOB2", "repair": True}, "x:1: word 1, 'a': label 'DT' is no tag of IOB2"),
        (["a/O b/O"], {}, "x:1: the training examples have no entity, only the label 'O'"),
        (["a/NN b/NN"], {}, "the training examples have only the label 'NN'"),
        (["a/1 b/2 c/3"], {}, "the training examples have 3 labels of 3 words, such as 1, 2, 3; label_column"),
    ],
)
def test_bad_labels(rows: list[str], settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError) as caught:
        Tag(**settings).fitted(sentences(*rows))
    assert str(caught.value).startswith(reason)


def test_faults_name_the_line_of_the_word(tmp_path: Path) -> None:
    file = tmp_path / "a.conll"
    file.write_text("a O\n\nAnna B-PER\nin O\nOslo I-LOC\n")
    with pytest.raises(DataError, match=r"a\.conll:5: word 3, 'Oslo': label 'I-LOC' between O and the end"):
        Tag().fitted(Tag().read(file))
    task = Tag(repair=True)
    assert task.fitted(task.read(file)).labels == LABELS


def test_check() -> None:
    task = Tag().fitted(sentences("Anna/B-PER a/O"))
    task.check(sentences("Anna/B-PER Otto/I-PER"))
    with pytest.raises(
        DataError, match=r"x:1: word 1, 'Oslo': label 'B-LOC' is not among the model's: O, B-PER, I-PER"
    ):
        task.check(sentences("Oslo/B-LOC"))
    with pytest.raises(DataError, match=r"x:1: word 2, 'b': label 'I-PER' between O and the end is impossible"):
        task.check(sentences("a/O b/I-PER"))
    with pytest.raises(DataError, match=r"x:1: no labels"):
        task.check([Sentence("x:1", ("a",))])
    plain = Tag().fitted(sentences("a/DT b/NN a/DT b/NN"))
    with pytest.raises(DataError, match=r"x:1: word 1, 'a': label 'VB' is not among the model's: DT, NN"):
        plain.check(sentences("a/VB"))


@pytest.mark.parametrize(
    ("labels", "scheme", "expected", "fallback"),
    [
        (LABELS, "auto", "IOB2", "O"),
        (LABELS, "IOB1", "IOB1", "O"),
        (("I-PER", "O", "I-LOC"), "auto", "IOB1", "O"),
        (("DT", "NN"), "auto", "none", "DT"),
    ],
)
def test_of_model(labels: tuple[str, ...], scheme: Any, expected: str, fallback: str) -> None:
    config: Any = transformers.BertConfig(id2label=dict(enumerate(labels)))
    module = torch.nn.Module()
    module.config = config
    task = Tag(scheme=scheme).of_model(Model(module, None))
    assert (task.labels, task.scheme, task.fallback) == (labels, expected, fallback)
    assert task.of_model(Model(torch.nn.Module(), None)) is task


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"scheme": "BIO"}, "scheme is 'BIO'; it must be one of auto, none, IOB1, IOB2, BIOES, BILOU"),
        ({"words": "spaces"}, "words is 'spaces'; it must be one of blanks, punctuation"),
        ({"token_column": 0}, "token_column is 0; it must be at least 1"),
        ({"label_column": 0}, "label_column is 0; it must be from 1 on, or negative from the end"),
        ({"max_length": 2}, "max_length is 2; it must be at least 3"),
        ({"stride": -1}, "stride is -1; it must be at least 0"),
    ],
)
def test_bad_settings(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match="^" + reason):
        Tag.of_settings(settings)


@pytest.mark.parametrize("name", ["a.json", "a.csv.gz"])
def test_other_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"is not read; \.jsonl or columns"):
        Tag().read(tmp_path / name)


def test_text_is_columns_where_labels_are_needed(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("Anna B-PER\nsleeps O\n")
    assert [example.tokens for example in Tag().read(file)] == [("Anna", "sleeps")]
    assert [example.tokens for example in Tag().read(file, is_labelled=False)] == [("Anna", "B-PER"), ("sleeps", "O")]


# ---- measures --------------------------------------------------------------------------------------------------------


def test_measures() -> None:
    """Three entities are right of four predicted by strict rules and five there; seqeval's default takes the fifth."""
    from seqeval.metrics import f1_score

    truth = sentences("a/B-PER b/I-PER c/O d/B-LOC", "a/B-LOC b/O c/B-PER d/B-PER e/O")
    labels = ["B-PER I-PER O B-PER", "B-LOC O I-PER B-PER O"]
    task = Tag().fitted(truth)
    measures = task.measure(truth, found(*labels))
    assert measures == pytest.approx(
        {
            "precision": 3 / 4,
            "recall": 3 / 5,
            "f1": 2 / 3,
            "f1_lenient": f1_score([list(row.labels or ()) for row in truth], [row.split() for row in labels]),
            "accuracy": 7 / 9,
            "f1_LOC": 2 / 3,
            "f1_PER": 2 / 3,
        }
    )
    assert measures["f1_lenient"] == pytest.approx(0.8)
    assert task.measure(truth[:1], found("O O O O"))["f1"] == 0


def test_measures_of_ends() -> None:
    """In BIOES an entity without its end is none; a repaired truth counts as repaired."""
    truth = sentences("a/B-X b/E-X c/S-X")
    measures = Tag().fitted(truth).measure(truth, found("B-X I-X S-X"))
    assert (measures["precision"], measures["recall"]) == (1.0, 0.5)
    assert measures["accuracy"] == pytest.approx(2 / 3)
    truth = sentences("a/B-X b/O", "a/I-X")
    assert Tag(repair=True).fitted(truth).measure(truth, found("B-X O", "B-X"))["accuracy"] == 1


def test_nothing_to_find() -> None:
    task = Tag().fitted(sentences("a/B-X"))
    truth = sentences("a/O b/O")
    assert task.measure(truth, found("O O")) == {
        "precision": 0.0,
        "recall": 0.0,
        "f1": 0.0,
        "f1_lenient": 0.0,
        "accuracy": 1.0,
    }


def test_measures_of_plain_labels() -> None:
    """Of DT both are right, of NN one of two, VB is one too many: F1 of 1, 2/3 and 0."""
    task = Tag(scheme="none", labels=("DT", "IN", "NN", "VB"))
    truth = sentences("a/DT b/NN", "a/DT b/NN")
    assert task.measure(truth, found("DT NN", "DT VB")) == pytest.approx({"accuracy": 3 / 4, "f1_macro": 5 / 9})


def test_a_model_without_a_head_is_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "encoder", "BertModel")
    with pytest.raises(ValueError, match=r"no weights classifier\.bias, classifier\.weight"):
        open_model(folder, "tag", device=torch.device("cpu"))
