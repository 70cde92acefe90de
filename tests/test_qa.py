"""Question answering: windows and their labels, predictions against plain transformers, training end to end."""

from __future__ import annotations

import copy
import itertools
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import one_thread, randomise, transformers  # noqa: F401

import bert_fast
from bert_fast.tasks import DataError, Model, Sources, Training, open_model, task_named
from bert_fast.tasks.context_windows import Cut, Window, cut_windows
from bert_fast.tasks.data.squad import Question, Span
from bert_fast.tasks.finetune import finetune
from bert_fast.tasks.loop import arguments
from bert_fast.tasks.qa import Answer

NAMES = ["anna", "bert", "cleo", "dora"]
FILLERS = ["the", "old", "river", "flows", "to", "sea", "at", "dawn", "##s"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "who", "where", "?", ",", *FILLERS, *NAMES]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
SHORT: dict[str, Any] = {"max_length": 16, "stride": 3, "longest_question": 4, "longest_answer": 5, "n_best": 7}


def wordpieces(cls: Any = transformers.BertTokenizer) -> Any:
    return cls(vocab={word: index for index, word in enumerate(WORDS)}, model_max_length=64)


def byte_pairs(folder: Path) -> Any:
    from tokenizers import ByteLevelBPETokenizer

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([" ".join(WORDS)] * 3, vocab_size=290, special_tokens=special, show_progress=False)
    trained.save_model(str(folder))
    names = {"vocab": str(folder / "vocab.json"), "merges": str(folder / "merges.txt")}
    return transformers.RobertaTokenizer(**names, model_max_length=64)


@pytest.fixture(scope="module", params=["Bert", "DistilBert", "Roberta"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model that is not swapped, of a family with token types and of two without."""
    prefix = request.param
    if prefix == "Roberta":
        tokenizer = byte_pairs(tmp_path_factory.mktemp("roberta"))
    else:
        tokenizer = wordpieces(getattr(transformers, f"{prefix}Tokenizer"))
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48} if prefix == "DistilBert" else SIZES
    config = getattr(transformers, f"{prefix}Config")(
        **sizes, vocab_size=len(tokenizer), max_position_embeddings=66, pad_token_id=tokenizer.pad_token_id
    )
    module = getattr(transformers, f"{prefix}ForQuestionAnswering")(config).eval()
    randomise(module)
    return Model(module, tokenizer)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a BERT without a head for questions."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(3)
    config = transformers.BertConfig(**SIZES, vocab_size=len(WORDS), max_position_embeddings=64)
    transformers.BertModel(config).save_pretrained(folder)
    wordpieces().save_pretrained(folder)
    return str(folder)


def question(context: str, answers: tuple[Span, ...] | None = (), text: str = "who?") -> Question:
    return Question(f"f:{context[:9]}", context, text, context, answers)


def examples(number: int, seed: int = 1, share: float = 1.0) -> list[dict[str, Any]]:
    """Contexts of 3 to 40 words with one name, which is the answer; without one in the other share."""
    generator = random.Random(seed)
    rows = []
    for index in range(number):
        words = generator.choices(FILLERS[:-1], k=generator.randint(3, 40))
        has_answer = index < share * number
        name = generator.choice(NAMES)
        place = generator.randrange(len(words))
        words[place] = name if has_answer else words[place]
        answer = {"text": name, "answer_start": len(" ".join(["", *words[:place]]))}
        row = {"id": index, "question": "who?", "context": " ".join(words), "answers": [answer] if has_answer else []}
        rows.append({**row, "is_impossible": not has_answer})
    return rows


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


# ---- windows ---------------------------------------------------------------------------------------------------------

TEN = "the old river flows to sea at dawn anna bert"


def windows_of(context: str, text: str = "who", **cut: int) -> list[Window]:
    lengths = {"window": 10, "shared": 2, "question": 1, **cut}
    return list(cut_windows(wordpieces(), [text], [context], Cut(**lengths)))


def test_windows() -> None:
    """Of 10 words 6 go into a window, beside [CLS] who [SEP] and the last [SEP]; 2 of them again into the next."""
    tokenizer = wordpieces()
    found = windows_of(TEN)
    assert [tokenizer.decode(window.inputs["input_ids"]) for window in found] == [
        "[CLS] who [SEP] the old river flows to sea [SEP]",
        "[CLS] who [SEP] to sea at dawn anna bert [SEP]",
    ]
    assert [window.first for window in found] == [3, 3]
    assert [TEN[slice(*window.covers)] for window in found] == [
        "the old river flows to sea",
        "to sea at dawn anna bert",
    ]


@pytest.mark.parametrize(
    ("answer", "first", "second"),
    [
        ("the", (3, 3), (0, 0)),
        ("anna bert", (0, 0), (7, 8)),
        ("to sea", (7, 8), (3, 4)),
        ("flows to sea at", (0, 0), (0, 0)),
        ("sea at", (0, 0), (4, 5)),
        ("flows to", (6, 7), (0, 0)),
        ("iver flo", (5, 6), (0, 0)),
        (" old ", (4, 4), (0, 0)),
        (" ", (0, 0), (0, 0)),
    ],
)
def test_labels(answer: str, first: tuple[int, int], second: tuple[int, int]) -> None:
    span = Span(answer, TEN.index(answer))
    assert [window.positions(span) for window in windows_of(TEN)] == [first, second]


def test_labels_where_nothing_stands_between() -> None:
    [window] = windows_of("anna, bert, anna")
    assert window.positions(Span("anna", 0)) == (3, 3)
    assert window.positions(Span(",", 4)) == (4, 4)
    assert window.positions(Span("anna", 12)) == (7, 7)


def test_context_that_begins_and_ends_with_nothing() -> None:
    [window] = windows_of("\u200b  old\u200b river \u200b")
    assert window.covers == (0, 15)
    assert window.positions(Span("\u200b  old\u200b", 0)) == (3, 3)
    assert window.positions(Span("\u200b", 14)) == (0, 0)


@pytest.mark.parametrize(("text", "kept"), [("who where who", "who where"), ("olds where", "old ##s"), ("who", "who")])
def test_long_question_is_cut(text: str, kept: str) -> None:
    for window in windows_of(TEN, text, question=2, window=11):
        ids = window.inputs["input_ids"]
        assert wordpieces().convert_ids_to_tokens(ids[1 : ids.index(3)]) == kept.split()


@pytest.mark.parametrize("number", [1, 1300])
def test_order_of_windows(number: int) -> None:
    contexts = [" ".join(["sea"] * (1 + index % 14)) for index in range(number)]
    found = list(cut_windows(wordpieces(), ["who"] * number, contexts, Cut(window=10, shared=2, question=1)))
    counts = [1 if index % 14 < 6 else 2 if index % 14 < 10 else 3 for index in range(number)]
    assert [window.question for window in found] == [i for i, count in enumerate(counts) for _ in range(count)]
    assert all(len(contexts[window.question]) >= window.offsets.max() for window in found)


def test_no_room() -> None:
    with pytest.raises(ValueError, match=r"max_length is 10 and longest_question 5, which leaves 2 tokens .* is 2"):
        windows_of(TEN, question=5)
    with pytest.raises(ValueError, match="longest_question 64, which leaves 0 tokens"):
        windows_of(TEN, question=64)


def test_what_is_saved_cuts_nothing(tmp_path: Path) -> None:
    tokenizer = wordpieces()
    list(cut_windows(tokenizer, ["who"], [TEN], Cut(window=10, shared=2, question=1)))
    tokenizer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["truncation"] is None


def test_no_cls() -> None:
    tokenizer = wordpieces()
    tokenizer.cls_token = "[MASK]"
    with pytest.raises(ValueError, match=r"does not begin with \[CLS\]"):
        list(cut_windows(tokenizer, ["who"], [TEN], Cut(window=10, shared=2, question=1)))


# ---- predictions -----------------------------------------------------------------------------------------------------

CONTEXTS = [
    *(row["context"] for row in examples(12)),
    "anna",
    "  the \u20ac old\u00a0river,  olds \U0001f600\U0001f600 flows\n\nto , \u00e9t\u00e9 sea \u200b at dawn ",
    "".join(map(chr, range(0x1F600, 0x1F617))),
]


def plain(model: Model, context: str, task: Answer) -> tuple[list[Any], float]:
    """All spans of a context, the best first, and the score of no answer: window by window, span by span."""
    tokenizer, nulls = model.tokenizer, []
    spans: dict[tuple[int, str], float] = {}
    encoded = tokenizer(
        "who?",
        context,
        truncation="only_second",
        max_length=task.max_length,
        stride=task.stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    for row in range(len(encoded["input_ids"])):
        inputs = {name: torch.tensor([encoded[name][row]]) for name in tokenizer.model_input_names if name in encoded}
        with torch.no_grad():
            output = model.module(**inputs)
        starts, ends = output.start_logits[0].tolist(), output.end_logits[0].tolist()
        nulls.append(starts[0] + ends[0])
        tokens = [index for index, part in enumerate(encoded.sequence_ids(row)) if part == 1]
        for first, last in itertools.product(tokens, repeat=2):
            begin, end = encoded["offset_mapping"][row][first][0], encoded["offset_mapping"][row][last][1]
            if first <= last < first + task.longest_answer and context[begin:end].strip():
                key = (begin + len(context[begin:end]) - len(context[begin:end].lstrip()), context[begin:end].strip())
                spans[key] = max(spans.get(key, -1e9), starts[first] + ends[last])
    return sorted(((score, *key) for key, score in spans.items()), reverse=True), min(nulls)


@pytest.mark.parametrize("tokens_per_batch", [1, 100, 10_000])
@pytest.mark.parametrize("is_swapped", [False, True])
def test_predictions(model: Model, is_swapped: bool, tokens_per_batch: int) -> None:
    """Windows of all lengths in one batch give what each gives alone in plain transformers."""
    task = Answer(**SHORT)
    used = Model(copy.deepcopy(model.module), model.tokenizer)
    if is_swapped:
        bert_fast.swap(used.module)
    found = task.predict(used, [question(context) for context in CONTEXTS], tokens_per_batch)
    for context, prediction in zip(CONTEXTS, found, strict=True):
        spans, null = plain(model, context, task)
        best = prediction["n_best"]
        assert [row["score"] for row in best] == pytest.approx([span[0] for span in spans[: len(best)]], abs=1e-4)
        has_all = isinstance(model.tokenizer, transformers.RobertaTokenizer) or len(best) == min(7, len(spans))
        assert has_all  # pieces of one character give the same span more than once
        assert (prediction["start"], prediction["text"]) == spans[0][1:]
        assert all(row["text"] == context[row["start"] : row["end"]].strip() != "" for row in best)
        assert all(row["end"] - row["start"] == len(row["text"]) for row in best)
        assert prediction["null_score"] == pytest.approx(null, abs=1e-4)
        assert {name: prediction[name] for name in best[0]} == best[0]
        assert prediction["id"] == context


def test_the_mode_stays(model: Model) -> None:
    for is_training in (True, False):
        model.module.train(is_training)
        Answer(**SHORT).predict(model, [question(TEN)], 100)
        assert model.module.training == is_training


def test_silence(model: Model) -> None:
    """A question is not answered where the score of "no answer" is higher by more than the threshold."""
    always = Answer(**SHORT)
    asked = [question(TEN)]
    [answered] = always.predict(model, asked, 100)
    margin = answered["null_score"] - answered["score"]
    may = replace(always, has_impossible=True)
    assert replace(may, null_threshold=margin).predict(model, asked, 100) == [answered]
    [silent] = replace(may, null_threshold=margin - 1e-6).predict(model, asked, 100)
    null = {"text": "", "start": None, "end": None, "score": answered["null_score"]}
    assert silent == {**answered, **null}
    assert replace(always, null_threshold=margin - 1e-6).predict(model, asked, 100) == [answered]


def test_context_without_tokens(model: Model) -> None:
    for prediction in Answer(**SHORT).predict(model, [question(" ")], 100):
        assert (prediction["text"], prediction["start"], prediction["n_best"]) == ("", None, [])


def test_no_questions(model: Model) -> None:
    assert Answer(**SHORT).predict(model, [], 100) == []


def test_logits_that_are_no_numbers(model: Model) -> None:
    broken: Any = copy.deepcopy(model.module)
    broken.qa_outputs.bias.data[1] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        Answer(**SHORT).predict(Model(broken, model.tokenizer), [question(TEN)], 100)


# ---- the task --------------------------------------------------------------------------------------------------------


def test_learnt_and_checked() -> None:
    answered, impossible, unknown = (question(TEN, answers) for answers in ((Span("old", 4),), (), None))
    assert not Answer().fitted([answered]).has_impossible
    assert Answer(has_impossible=True).fitted([answered]).has_impossible
    assert Answer().fitted([answered, impossible]).has_impossible
    Answer(has_impossible=True).check([answered, impossible])
    Answer().check([answered])
    with pytest.raises(DataError, match="f:the old r: a question without an answer; the model was trained"):
        Answer().check([answered, impossible])
    with pytest.raises(DataError, match="f:the old r: no answers to compare"):
        Answer().check([answered, unknown])
    with pytest.raises(DataError, match="none of the training examples"):
        Answer().fitted([impossible])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stride": -1}, "stride is -1"),
        ({"longest_question": 0}, "longest_question is 0"),
        ({"longest_answer": 0}, "longest_answer is 0"),
        ({"n_best": 0}, "n_best is 0"),
        ({"null_threshold": float("nan")}, "null_threshold is nan"),
        ({"strides": 3}, "qa has no setting 'strides'"),
    ],
)
def test_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task_named("qa").of_settings(settings)


@pytest.mark.parametrize(("max_length", "longest"), [(None, 64), (20, 20)])
def test_window_of_the_model(encoder: str, max_length: int | None, longest: int) -> None:
    task = Answer(max_length=max_length, stride=4, longest_question=2)
    rows = task.trainer(task.build(encoder), [question("sea " * 100)], training_arguments(Path("x"))).train_dataset
    assert max(len(row["input_ids"]) for row in rows) == longest


def test_window_longer_than_the_model(encoder: str) -> None:
    task = Answer(max_length=65)
    with pytest.raises(ValueError, match="max_length is 65; it must be within 3 and the model's 64"):
        task.predict(task.build(encoder), [question(TEN)], 100)


def test_model_without_a_head(encoder: str) -> None:
    with pytest.raises(ValueError, match="holds BertModel, which answers no questions"):
        Answer().load(encoder)


# ---- training --------------------------------------------------------------------------------------------------------


def training_arguments(out: Path, number: int = 100) -> dict[str, Any]:
    training = Training(epochs=1, batch_size=1, warmup=0.5)
    return arguments(training, out, examples=number, best=None, device=torch.device("cpu"))


def test_rows_for_training(encoder: str, tmp_path: Path) -> None:
    """Labels are those of the first answer; the warm-up is a share of the steps, which are as many as windows."""
    task = Answer(max_length=10, stride=2, longest_question=1)
    answers = (Span("at dawn", 27), Span("the", 0))
    asked = [question(TEN, answers, "who"), question(TEN, (), "who"), question("old sea", (Span("sea", 4),), "who")]
    trainer = task.trainer(task.build(encoder), asked, training_arguments(tmp_path, 3))
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch.keys() == {"input_ids", "token_type_ids", "attention_mask", "start_positions", "end_positions"}
    labels = [(row["start_positions"], row["end_positions"]) for row in trainer.train_dataset]
    assert labels == [(0, 0), (5, 6), (0, 0), (0, 0), (4, 4)]
    assert [len(row["input_ids"]) for row in trainer.train_dataset] == [10, 10, 10, 10, 6]
    assert trainer.args.warmup_steps == round(round(0.5 * 3) * 5 / 3)


@pytest.mark.parametrize("share", [1.0, 0.7])
def test_finetune(encoder: str, tmp_path: Path, share: float) -> None:
    """Names are found by their words alone, so that a tiny model learns it in 20 steps."""
    train, dev = (write(tmp_path / f"{seed}.jsonl", examples(64, seed, share)) for seed in (1, 2))
    out = tmp_path / "out"
    outcome = finetune(
        Answer(**SHORT),
        Sources(model=encoder, train=train, dev=dev),
        out,
        Training(epochs=4, batch_size=32, learning_rate=2e-2, warmup=0.0, eval_steps=10),
        before=True,
        device=torch.device("cpu"),
    )
    assert outcome.measures["f1"] > 80 > outcome.before["f1"] + 20
    assert ("NoAns_f1" in outcome.measures) == (share < 1)

    tuned = open_model(out, device=torch.device("cpu"))
    assert isinstance(tuned.task, Answer)
    assert tuned.task.has_impossible == (share < 1)
    asked = tuned.task.read(dev)
    predictions = tuned.predict(asked)
    assert tuned.measure(asked, predictions) == outcome.measures

    module = transformers.AutoModelForQuestionAnswering.from_pretrained(out).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    batch = tokenizer(["who?"] * 3, CONTEXTS[:3], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected, found = module(**batch), tuned.model.module(**batch)
    mask = batch["attention_mask"] != 0
    for name in ("start_logits", "end_logits"):
        torch.testing.assert_close(found[name][mask], expected[name][mask], rtol=1e-4, atol=1e-4)

    unlabelled = write(tmp_path / "new.jsonl", [{"question": "who?", "context": "to cleo at dawn"}])
    [new] = tuned.predict(tuned.task.read(unlabelled, is_labelled=False))
    assert (new["text"], new["id"]) == ("cleo", f"{unlabelled}:1")
