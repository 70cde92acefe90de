"""The commands of pretraining: from texts to a model that transformers loads, and what they say of bad input."""

from __future__ import annotations

import json
import math
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("click")
pytest.importorskip("matplotlib")
pytest.importorskip("pyarrow")
pytest.importorskip("pydantic")
pytest.importorskip("rich")

from click.testing import CliRunner

from bert_fast import BertForPreTraining
from bert_fast.cli import app, fill_mask
from bert_fast.cli import options as command_options
from bert_fast.cli import prepare as preparing
from bert_fast.cli import pretrain as work
from bert_fast.pretraining import chunks, loop, vocabulary
from bert_fast.pretraining import config as configuration
from bert_fast.pretraining.corpus import refuse
from bert_fast.pretraining.log import read_log
from bert_fast.pretraining.shards import Corpus

ROOT = Path(__file__).resolve().parents[1]

PARTS: tuple[Literal["train", "held_out"], ...] = ("train", "held_out")

CONFIG = """
out = "{folder}/run"
data.corpus = "{folder}/corpus"
optimizer.learning_rate = 1e-3
schedule.steps = 6

[model]
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 2
max_position_embeddings = 32

[batch]
tokens_per_step = 512
tokens_per_pack = 256

[log]
every = 2
tensorboard = false

[checkpoint]
every = 4
"""


class Result(NamedTuple):
    status: int
    output: str


def call(*arguments: object) -> Result:
    """The command, in this process."""
    found = CliRunner(env={"COLUMNS": "120"}).invoke(app.app, [str(argument) for argument in arguments])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    assert "Traceback" not in found.output
    return Result(found.exit_code, found.output)


def passed(*arguments: object) -> str:
    status, output = call(*arguments)
    assert status == 0, output
    return output


def refused(*arguments: object) -> str:
    """The line that says why."""
    status, output = call(*arguments)
    assert status == 2, output
    return output.partition("Error: ")[2]


def write_texts(file: Path, documents: int, seed: int = 0) -> Path:
    """Documents of one to nine sentences of made-up words."""
    draws = random.Random(seed)
    words = ["".join(draws.choices(("ka", "lo", "mi", "ru", "ste", "von"), k=draws.randint(1, 3))) for _ in range(200)]

    def sentence() -> str:
        return " ".join(draws.choices(words, k=draws.randint(3, 11))).capitalize() + "."

    texts = ["\n".join(sentence() for _ in range(draws.randint(1, 9))) for _ in range(documents)]
    file.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    return file


class Trained(NamedTuple):
    """
    Attributes:
        folder: with texts.txt, run.toml, corpus and run.
        prepared, told: what the two commands said.
    """

    folder: Path
    prepared: str
    told: str

    @property
    def corpus(self) -> Path:
        return self.folder / "corpus"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def config(self) -> Path:
        return self.folder / "run.toml"

    @property
    def model(self) -> Path:
        return self.run / "checkpoints" / "step-00000006"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A corpus and a run of six steps."""
    folder = tmp_path_factory.mktemp("pretraining")
    texts = write_texts(folder / "texts.txt", 97)
    (folder / "run.toml").write_text(CONFIG.format(folder=folder.as_posix()), encoding="utf-8")
    options = ("--train-vocabulary", 300, "--held-out", 0.15, "--workers", 0)
    prepared = passed("pretrain", "prepare", texts, "--out", folder / "corpus", *options)
    return Trained(folder, prepared, passed("pretrain", "run", folder / "run.toml"))


# ---- the whole way ---------------------------------------------------------------------------------------------------


def test_prepare_says_what_it_made(trained: Trained) -> None:
    for label, part in zip(("training", "held out"), PARTS, strict=True):
        corpus = Corpus.open(trained.corpus, part)
        assert corpus.total_documents > 1
        figures = (corpus.total_documents, corpus.total_sentences, corpus.total_tokens)
        assert re.search(rf"{label} +{' +'.join(f'{figure:,}' for figure in figures)}\b", trained.prepared)
    size = vocabulary.load(trained.corpus / "vocabulary").size
    assert 100 < size <= 300
    assert f"vocabulary of {size} entries" in trained.prepared
    assert "MB/s" in trained.prepared
    assert "problems" not in trained.prepared


def test_prepare_again_reads_nothing(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(vocabulary, "train")
    options = ("--train-vocabulary", 300, "--held-out", 0.15, "--workers", 0)
    output = passed("pretrain", "prepare", trained.folder / "texts.txt", "--out", trained.corpus, *options)
    assert "ready already" in output


def test_run_says_what_it_does(trained: Trained) -> None:
    model = BertForPreTraining.from_pretrained(trained.model)
    assert f"2 layers, 32 wide, {sum(x.numel() for x in model.parameters()):,} parameters" in trained.told
    tokens = [Corpus.open(trained.corpus, part).total_tokens for part in PARTS]
    assert f"{tokens[0]:,} tokens, held out {tokens[1]:,}" in trained.told
    assert "2 packs of 256 tokens; sequences of up to 32 tokens" in trained.told
    assert "6 steps on 1 x" in trained.told
    assert re.findall(r"^step (\d)/6 ", trained.told, re.MULTILINE) == ["2", "4", "6"]
    evaluation = read_log(trained.run / "log.jsonl")[-1]
    assert evaluation["kind"] == "evaluation"
    assert f"{evaluation['mlm_loss']:.4f}\n" in trained.told
    assert re.search(rf"next sentence +{evaluation['nsp_accuracy']:.2%}\n", trained.told)
    assert trained.told.splitlines()[-2:] == [f"checkpoint in {trained.model}", f"loss in {trained.run / 'loss.png'}"]
    assert (trained.run / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_eval_finds_what_the_run_found(trained: Trained, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    options = ("--length", 32, "--tokens-per-pack", 256, "--json", file)
    output = passed("pretrain", "eval", trained.model, "--corpus", trained.corpus, *options)
    found = json.loads(file.read_text(encoding="utf-8"))
    evaluation = read_log(trained.run / "log.jsonl")[-1]
    assert found["mlm_loss"] == pytest.approx(evaluation["mlm_loss"], rel=1e-6)
    for name in ("mlm_accuracy", "nsp_accuracy", "tokens"):
        assert found[name] == evaluation[name]
    assert found["perplexity"] == pytest.approx(math.exp(found["mlm_loss"]))
    assert (found["part"], found["instances"], found["length"]) == ("held_out", "nsp", 32)
    assert f"{found['perplexity']:,.2f}\n" in output


@pytest.mark.parametrize(("instances", "pairs"), [("sop", "sentence order"), ("full", None)])
def test_eval_of_other_instances(trained: Trained, instances: str, pairs: str | None) -> None:
    options = ("--length", 32, "--part", "train", "--packs", 1, "--instances", instances)
    output = passed("pretrain", "eval", trained.model, "--corpus", trained.corpus, *options)
    assert "masked-LM loss" in output
    assert "next" not in output
    assert ("sentence order" in output) == (pairs is not None)


def test_transformers_loads_the_checkpoint(trained: Trained) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained.model)
    theirs = transformers.BertForPreTraining.from_pretrained(trained.model).eval()
    batch = tokenizer("Kalo ru [MASK] von.", "Stemi KA lomi.", return_tensors="pt")
    assert (batch["input_ids"] == tokenizer.mask_token_id).sum() == 1
    ours = BertForPreTraining.from_pretrained(trained.model).eval()
    with torch.no_grad():
        expected = theirs(**batch)
        found = ours(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])
    torch.testing.assert_close(found.logits, expected.prediction_logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.next_sentence_logits, expected.seq_relationship_logits, atol=1e-5, rtol=1e-5)


def test_plot(trained: Trained, tmp_path: Path) -> None:
    passed("pretrain", "plot", trained.run, "--out", tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_two_processes_say_it_once(trained: Trained, tmp_path: Path) -> None:
    """And train the same model as one."""
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    command = (*launch, "-m", "bert_fast.cli", "pretrain", "run", str(trained.config), "--set", f"out={tmp_path}/two")
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "6 steps on 2 x cpu" in done.stdout
    for line in ("parameters", "step 6/6", "checkpoint in", "loss in"):
        assert done.stdout.count(line) == 1
    one, two = (read_log(folder / "log.jsonl")[-1] for folder in (trained.run, tmp_path / "two"))
    assert two["mlm_loss"] == pytest.approx(one["mlm_loss"], rel=1e-4)


# ---- fill-mask -------------------------------------------------------------------------------------------------------


def best_tokens(folder: Path, text: str, top: int) -> list[list[tuple[float, str]]]:
    """What transformers finds for each mask."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        logits = transformers.BertForMaskedLM.from_pretrained(folder).eval()(**batch).logits
    rows = logits[batch["input_ids"] == tokenizer.mask_token_id].softmax(-1).topk(top)
    return [
        [(value, tokenizer.convert_ids_to_tokens(index)) for value, index in zip(*row, strict=True)]
        for row in zip(rows.values.tolist(), rows.indices.tolist(), strict=True)
    ]


@pytest.mark.parametrize("text", ["Kalo ru [MASK] von.", "[MASK] mi [MASK][MASK]"])
def test_fill_mask(trained: Trained, text: str) -> None:
    output = passed("fill-mask", trained.model, text, "--top", 3)
    expected = best_tokens(trained.model, text, 3)
    found = re.findall(r"^ *(0\.\d{4}) +(\S+) *$", output, re.MULTILINE)
    assert [token for _, token in found] == [token for rows in expected for _, token in rows]
    assert [float(value) for value, _ in found] == pytest.approx(
        [value for rows in expected for value, _ in rows], abs=1e-4
    )
    filled = fill_mask.filled(text, [rows[0][1] for rows in expected])
    assert output.splitlines()[-1] == filled
    assert "[MASK]" not in filled
    assert ("[MASK] 2" in output) == (len(expected) > 1)


def test_fill_mask_of_a_file(trained: Trained, tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("Ka [MASK].\n\n[MASK] lo.\n", encoding="utf-8")
    output = passed("fill-mask", trained.model, "--file", file, "--top", 1)
    assert output.count("probability") == 2
    file.write_text("Ka [MASK].\nKa [mask].\n", encoding="utf-8")
    message = refused("fill-mask", trained.model, "--file", file)
    assert f"{file}:2 has no [MASK]: 'Ka [mask].'" in message


@pytest.mark.parametrize(
    ("text", "tokens", "expected"),
    [
        ("A [MASK].", ["cat"], "A cat."),
        ("A dog [MASK] runs", ["##s"], "A dogs runs"),
        ("[MASK][MASK] [MASK]", ["##a", "b", "##"], "ab ##"),
    ],
)
def test_filled(text: str, tokens: list[str], expected: str) -> None:
    assert fill_mask.filled(text, tokens) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no mask",), "TEXT has no [MASK]: 'no mask'"),
        (("",), "TEXT has no [MASK]: ''"),
        (("[MASK]" * 31,), "TEXT has 33 tokens; the model takes 32 at most"),
        ((), "either TEXT or --file is needed"),
        (("[MASK]", "--file", "{texts}"), "either TEXT or --file is needed"),
        (("--file", "{latin}"), "not UTF-8 at byte 1"),
        (("--file", "{empty}"), "holds no text"),
        (("[MASK]", "--top", "0"), "0 is not in the range"),
    ],
)
def test_fill_mask_refuses(trained: Trained, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    files = {"texts": trained.folder / "texts.txt", "latin": tmp_path / "latin.txt", "empty": tmp_path / "empty.txt"}
    files["latin"].write_bytes("bÄ [MASK]".encode("latin-1"))
    files["empty"].write_bytes(b" \n")
    assert message in refused("fill-mask", trained.model, *(argument.format(**files) for argument in arguments))


# ---- other models ----------------------------------------------------------------------------------------------------


@pytest.fixture
def make_model(trained: Trained, tmp_path: Path) -> Callable[..., Path]:
    """Saves a small model of transformers as `kind`, with the run's tokenizer or without one."""
    transformers = pytest.importorskip("transformers")

    def make(kind: str, *, has_tokenizer: bool = True, **sizes: int) -> Path:
        own = vocabulary.load(trained.corpus / "vocabulary")
        config = {"vocab_size": own.size, "max_position_embeddings": 32, "hidden_size": 6, "intermediate_size": 7}
        config |= {"num_hidden_layers": 1, "num_attention_heads": 2, **sizes}
        getattr(transformers, kind)(transformers.BertConfig(**config)).save_pretrained(tmp_path / "model")
        if has_tokenizer:
            own.save(tmp_path / "model")
        return tmp_path / "model"

    return make


@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_eval_without_next_sentence_head(
    trained: Trained, make_model: Callable[..., Path], tmp_path: Path, has_tokenizer: bool
) -> None:
    model, file = make_model("BertForMaskedLM", has_tokenizer=has_tokenizer), tmp_path / "figures.json"
    output = passed("pretrain", "eval", model, "--corpus", trained.corpus, "--length", 32, "--json", file)
    assert "no next-sentence head; next sentence is left out" in output
    assert "perplexity" in output
    assert json.loads(file.read_text(encoding="utf-8"))["nsp_accuracy"] is None


def test_models_that_are_refused(trained: Trained, make_model: Callable[..., Path]) -> None:
    folder = make_model("BertModel")
    corpus = ("--corpus", trained.corpus, "--length", 32)
    assert "cls.predictions.transform.dense.weight" in refused("pretrain", "eval", folder, *corpus)
    assert "no masked-LM head (" in refused("fill-mask", folder, "[MASK]")
    (folder / "model.safetensors").write_bytes(b"torn")
    assert f"{folder} cannot be used" in refused("fill-mask", folder, "[MASK]")
    (folder / "model.safetensors").unlink()
    assert "holds neither model.safetensors nor" in refused("pretrain", "eval", folder, *corpus)
    make_model("BertForMaskedLM", vocab_size=31)
    assert "its model has only 31" in refused("fill-mask", folder, "[MASK]")
    assert "its model has only 31" in refused("pretrain", "eval", folder, *corpus)
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").unlink()
    assert "no folder with tokenizer.json or vocab.txt" in refused("fill-mask", folder, "[MASK]")
    assert "has 31 tokens and the corpus" in refused("pretrain", "eval", folder, *corpus)


def test_eval_refuses_another_vocabulary(trained: Trained, make_model: Callable[..., Path]) -> None:
    """Of the same size, with the same special tokens."""
    folder = make_model("BertForMaskedLM")
    tokens = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    tokens[-2:] = tokens[:-3:-1]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    message = refused("pretrain", "eval", folder, "--corpus", trained.corpus, "--length", 32)
    assert "has another vocabulary" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--length", 33), "--length is 33; "),
        (("--length", 32, "--tokens-per-pack", 31), "--tokens-per-pack is 31; it must be at least --length, 32"),
        (("--packs", 0), "0 is not in the range"),
        (("--part", "dev"), "'dev'"),
        (("--corpus", "no/such"), "no/such"),
        (("--corpus", "{folder}"), "manifest.json does not exist"),
    ],
)
def test_eval_refuses(trained: Trained, options: tuple[object, ...], message: str) -> None:
    options = tuple(trained.folder if option == "{folder}" else option for option in options)
    assert message in refused("pretrain", "eval", trained.model, "--corpus", trained.corpus, *options)


def test_eval_of_a_part_without_text(trained: Trained, tmp_path: Path) -> None:
    options = ("--vocabulary", trained.corpus / "vocabulary", "--held-out", 0, "--workers", 0)
    passed("pretrain", "prepare", trained.folder / "texts.txt", "--out", tmp_path / "corpus", *options)
    message = refused("pretrain", "eval", trained.model, "--corpus", tmp_path / "corpus", "--length", 32)
    assert "no text in its part held_out; --part train" in message


@pytest.mark.parametrize(("loss", "perplexity"), [(0.0, 1.0), (800.0, math.inf), (math.nan, math.nan)])
def test_figures_of_any_loss(tmp_path: Path, loss: float, perplexity: float) -> None:
    from bert_fast.pretraining.log import Evaluation

    found = work.figures(Evaluation(3, loss, 0.0, None, 7, 1.0))
    assert found["perplexity"] == pytest.approx(perplexity, nan_ok=True)
    work.write_json(tmp_path / "figures.json", found)
    read = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert float(read["perplexity"]) == pytest.approx(perplexity, nan_ok=True)


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_set_and_resume(trained: Trained, tmp_path: Path) -> None:
    out = ("--set", f"out={tmp_path}/run", "--set", "log.every=1")
    told = passed("pretrain", "run", trained.config, *out, "--set", "schedule.steps=2")
    assert re.findall(r"^step (\d)/2 ", told, re.MULTILINE) == ["1", "2"]
    message = refused("pretrain", "run", trained.config, *out)
    assert f"out is {tmp_path}/run, which holds checkpoints; --resume" in message
    other = ("--set", "model.num_hidden_layers=3")
    message = refused("pretrain", "run", trained.config, *out, "--resume", *other)
    assert "another model.num_hidden_layers" in message
    told = passed("pretrain", "run", trained.config, *out, "--resume", "--set", "schedule.steps=4")
    assert f"resume  from {tmp_path}/run/checkpoints/step-00000002\n" in told
    assert re.findall(r"^step (\d)/4 ", told, re.MULTILINE) == ["3", "4"]


def test_interrupted_run(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = loop.Run._step, []

    def step(self: loop.Run, *arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        real(self, *arguments)

    monkeypatch.setattr(loop.Run, "_step", step)
    out = ("--set", f"out={tmp_path}/run")
    status, output = call("pretrain", "run", trained.config, *out)
    assert status == 130
    command = f"bert-fast pretrain run {trained.config} --set out={tmp_path}/run --resume"
    last = f"stopped; {command} goes on from {tmp_path}/run/checkpoints/step-00000004"
    assert output.splitlines()[-1] == last
    passed("pretrain", "run", trained.config, *out, "--resume")
    # Two more steps make the same model as six at once.
    files = [folder / "checkpoints/step-00000006/model.safetensors" for folder in (tmp_path / "run", trained.run)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_run_without_a_picture(trained: Trained) -> None:
    """The log of a run that is over may be gone; its model is there."""
    log = trained.run / "log.jsonl"
    content = log.read_bytes()
    log.unlink()
    try:
        told = passed("pretrain", "run", trained.config, "--resume")
    finally:
        log.write_bytes(content)
    assert f"checkpoint in {trained.model}" in told
    assert "no picture of the loss" in told


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("schedule.steps=many",), 'schedule.steps is "many"; it must be an integer of at least 1'),
        (("masking.rate=1.5",), "masking.rate is 1.5; it must be a number in (0, 1]"),
        (("model.hiden_size=32",), "model.hiden_size is unknown; did you mean model.hidden_size?"),
        (("model.num_attention_heads=3",), "it must divide model.hidden_size, 32"),
        (("steps",), "the override is 'steps'; it must be section.key=value"),
        (("data.corpus=no/such",), "no/such/manifest.json does not exist"),
        (("model.init=no/such",), "no/such holds neither model.safetensors nor"),
        (("data.corpus={folder}",), "{folder}/manifest.json does not exist"),
        (("batch.tokens_per_pack=300",), "batch.tokens_per_pack is 300; it must divide"),
    ],
)
def test_run_refuses(trained: Trained, tmp_path: Path, overrides: tuple[str, ...], message: str) -> None:
    names = {"folder": trained.folder.as_posix()}
    options = [part for override in overrides for part in ("--set", override.format(**names))]
    output = refused("pretrain", "run", trained.config, "--set", f"out={tmp_path}/run", *options)
    assert message.format(**names) in output
    assert not (tmp_path / "run").exists()


def test_other_processes_are_silent(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    status, output = call("pretrain", "run", trained.config, "--set", "schedule.steps=0", "--set", f"out={tmp_path}/x")
    assert (status, output) == (2, "")


def test_help_config_is_a_configuration(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(passed("pretrain", "run", "--help-config"), encoding="utf-8")
    assert configuration.load(file).schedule.steps == 100_000


@pytest.mark.parametrize(
    ("log", "out", "message"),
    [
        (None, "loss.png", "log.jsonl"),
        ("", "loss.png", "has no steps"),
        ("torn\n{}\n", "loss.png", "line 1 is b'torn'"),
        ("", "loss.pdf", "a name that ends with .png is needed"),
    ],
)
def test_plot_refuses(tmp_path: Path, log: str | None, out: str, message: str) -> None:
    if log is not None:
        (tmp_path / "log.jsonl").write_text(log, encoding="utf-8")
    assert message in refused("pretrain", "plot", tmp_path, "--out", tmp_path / out)


# ---- preparations ----------------------------------------------------------------------------------------------------


@pytest.fixture
def prepare(trained: Trained, tmp_path: Path) -> Callable[..., Result]:
    """bert-fast pretrain prepare with the run's vocabulary, into tmp_path/corpus."""

    def call_it(*arguments: object) -> Result:
        options = ("--vocabulary", trained.corpus / "vocabulary", "--out", tmp_path / "corpus", "--workers", 0)
        return call("pretrain", "prepare", *options, *arguments)

    return call_it


def test_problems_are_skipped_and_listed(prepare: Callable[..., Result], tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    good = '{"body": "Ka lo mi. Ru."}\n'
    file.write_text(good + "".join(f"broken {i}\n" for i in range(23)) + good, encoding="utf-8")
    empty = tmp_path / "empty.txt"
    empty.write_bytes(b"\n")
    status, output = prepare(file, empty, "--field", "body", "--held-out", 0)
    assert status == 0, output
    assert "24 problems, which were skipped:" in output
    assert [f"{file}:{line}: no JSON" in output for line in (2, 21, 22)] == [True, True, False]
    assert "and 4 more" in output
    assert Corpus.open(tmp_path / "corpus").total_documents == 2
    status, output = prepare(file, empty, "--field", "body", "--held-out", 0)
    assert (status, "24 problems" in output) == (0, True)


@pytest.mark.parametrize("how", [("--vocabulary", "{vocabulary}"), ("--train-vocabulary", "300")])
def test_problems_are_refused(trained: Trained, tmp_path: Path, how: tuple[str, str]) -> None:
    file = tmp_path / "texts.txt"
    file.write_bytes(b"Ka lo.\n\nMi \xff ru.\n")
    option, value = how
    options = ("--workers", 0, "--on-problem", "refuse", option, value.format(vocabulary=trained.corpus / "vocabulary"))
    message = refused("pretrain", "prepare", file, "--out", tmp_path / "corpus", *options)
    assert f"{file}:3: not UTF-8 at byte 3" in message


@pytest.mark.parametrize(
    ("name", "content"), [("a.txt", b"\n \n"), ("a.jsonl", b'{"title": "Ka"}\n'), ("a.txt.gz", b"no gzip")]
)
def test_no_text(prepare: Callable[..., Result], tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    status, output = prepare(tmp_path / name)
    assert status == 1
    assert "the corpus has no text" in output
    assert str(tmp_path / name) in output
    assert not (tmp_path / "corpus").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "either SOURCES or --dataset is needed"),
        (("{texts}", "--dataset", "x"), "either SOURCES or --dataset is needed"),
        (("{texts}", "--split", "train"), "--dataset-config and --split need --dataset"),
        (("{texts}",), "either --vocabulary or --train-vocabulary is needed"),
        (("{texts}", "--vocabulary", "{corpus}/vocabulary", "--train-vocabulary", "9"), "either --vocabulary or"),
        (("{texts}", "--vocabulary", "{corpus}/vocabulary", "--cased"), "need --train-vocabulary"),
        (("{texts}", "--vocabulary", "{corpus}"), "no folder with tokenizer.json or vocab.txt"),
        (("{texts}", "--vocabulary", "no/such"), "no/such"),
        (("{texts}", "--train-vocabulary", "9"), "size is 9; "),
        (("no/such.txt", "--train-vocabulary", "99"), "no/such.txt does not exist"),
        (("{corpus}/manifest.json", "--train-vocabulary", "99"), "has no known suffix"),
        (("{texts}", "--train-vocabulary", "99", "--held-out", "1"), "1.0 is not in the range"),
        (("{texts}", "--train-vocabulary", "99", "--out", "{folder}"), "and no preparation; a new or empty folder"),
        (
            ("{texts}", "--train-vocabulary", "300", "--out", "{corpus}"),
            "held_out=0.15, and held_out is 0.005",
        ),
    ],
)
def test_prepare_refuses(trained: Trained, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    names = {"texts": trained.folder / "texts.txt", "corpus": trained.corpus, "folder": trained.folder}
    given = [argument.format(**names) for argument in arguments]
    assert message in refused("pretrain", "prepare", "--workers", 0, "--out", tmp_path / "corpus", *given)


def test_interrupted_preparation_keeps_its_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = write_texts(tmp_path / "texts.txt", 101)
    document = texts.read_text(encoding="utf-8")
    texts.write_text(document * (2_100_000 // len(document) + 1), encoding="utf-8")  # three chunks of a megabyte
    arguments = ("pretrain", "prepare", texts, "--out", tmp_path / "corpus", "--workers", 0, "--shard-mb", 1)
    how = ("--train-vocabulary", 300, "--cased", "--vocabulary-mb", 1)
    real = chunks.ChunkWriter.__call__

    def write(self: chunks.ChunkWriter, chunk: chunks.Chunk) -> dict[str, Any]:
        if chunk.number == 1:
            raise KeyboardInterrupt
        return real(self, chunk)

    with monkeypatch.context() as patch:
        patch.setattr(chunks.ChunkWriter, "__call__", write)
        status, output = call(*arguments, *how)
    assert status == 130
    assert output.splitlines()[-1] == "stopped; the same command goes on from here"
    with monkeypatch.context() as patch:
        patch.delattr(vocabulary, "train")
        passed(*arguments, *how)
    assert "Ka" in vocabulary.load(tmp_path / "corpus" / "vocabulary").tokenizer.get_vocab()
    assert "was begun with other" in refused(*arguments, "--train-vocabulary", 300)


def test_a_vocabulary_is_trained_on_all_files_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "MEGABYTE", 1000)
    files = [write_texts(tmp_path / f"{seed}.txt", 61, seed) for seed in range(3)]
    files[1].write_text("Ka.\n", encoding="utf-8")
    texts = preparing.open_files([str(file) for file in files], "text")
    every = [list(stream) for stream in texts.streams(refuse)]
    assert list(texts.sample(100, refuse)) == [document for documents in every for document in documents]
    found = list(texts.sample(6, refuse))
    sizes = [sum(len(line) for line in document) for document in found]
    middle = found.index(["Ka."])
    assert found[:middle] == every[0][:middle]
    assert found[middle + 1 :] == every[2][: len(found) - middle - 1]
    longest = max(sizes)
    assert 2000 <= sum(sizes[:middle]) < 2000 + longest
    assert 6000 <= sum(sizes) < 6000 + longest


def test_data_set(prepare: Callable[..., Result], trained: Trained, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "rows").mkdir()
    documents = (trained.folder / "texts.txt").read_text(encoding="utf-8").strip().split("\n\n")
    rows = "".join(json.dumps({"body": document}) + "\n" for document in documents)
    (tmp_path / "rows" / "train.jsonl").write_text(rows, encoding="utf-8")
    status, output = prepare("--dataset", tmp_path / "rows", "--field", "body", "--held-out", 0.15)
    assert status == 0, output
    for part in PARTS:
        found, expected = (Corpus.open(folder, part) for folder in (tmp_path / "corpus", trained.corpus))
        assert found.total_tokens == expected.total_tokens
    status, output = prepare("--dataset", tmp_path / "rows", "--field", "title")
    assert (status, "--field is 'title'" in output) == (2, True)
    status, output = prepare("--dataset", tmp_path / "rows", "--field", "body", "--split", "dev")
    assert (status, "dev" in output) == (2, True)


# ---- every command ---------------------------------------------------------------------------------------------------

COMMANDS = (
    ("pretrain",),
    ("pretrain", "prepare"),
    ("pretrain", "run"),
    ("pretrain", "eval"),
    ("pretrain", "plot"),
    ("fill-mask",),
)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_has_an_example(command: tuple[str, ...]) -> None:
    output = passed(*command, "--help")
    assert f"  bert-fast {' '.join(command)} " in output
    assert len(output.splitlines()) > 8


@pytest.fixture
def without_extra(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def hide(package: str) -> None:
        monkeypatch.setattr(command_options, "find_spec", lambda name: None if name == package else find_spec(name))

    return hide


@pytest.mark.parametrize(
    ("package", "arguments"),
    [
        ("pyarrow", ("prepare", "a.txt", "--out", "x", "--train-vocabulary", "99")),
        ("datasets", ("prepare", "--dataset", "a", "--out", "x", "--train-vocabulary", "99")),
        ("accelerate", ("run", "{config}")),
        ("pydantic", ("run", "--help-config")),
        ("accelerate", ("eval", "{model}", "--corpus", "{corpus}")),
        ("matplotlib", ("plot", "{run}")),
    ],
)
def test_missing_extra(
    trained: Trained, without_extra: Callable[[str], None], package: str, arguments: tuple[str, ...]
) -> None:
    without_extra(package)
    names = {"config": trained.config, "model": trained.model, "corpus": trained.corpus, "run": trained.run}
    message = refused("pretrain", *(argument.format(**names) for argument in arguments))
    assert message.strip() == f"{package} missing; pip install 'bert-fast[pretrain]'"
