"""A training run: killed anywhere it goes on as if nothing had been, refuses what does not belong to it, and learns."""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("pydantic")
pytest.importorskip("rich")

import bert_fast
from bert_fast.pretraining import checkpoints, loop, machine, prepare, vocabulary
from bert_fast.pretraining.batches import PretrainingBatch
from bert_fast.pretraining.checkpoints import CheckpointError
from bert_fast.pretraining.config import ConfigError, RunConfig, from_dict
from bert_fast.pretraining.loop import Progress, Run
from bert_fast.pretraining.shards import Corpus
from bert_fast.pretraining.tally import Tally

SECONDS = 60

# What a line of the log says that is not time.
FIGURES = [
    *("kind", "step", "loss", "mlm_loss", "nsp_loss", "mlm_accuracy", "nsp_accuracy", "learning_rate"),
    *("grad_norm", "tokens", "sequences", "progress"),
]

# Steps of the run that is killed, and where: before and behind the change of phases, and between lines of the log.
STEPS, EVERY = 9, 3
PACKS = 3

TOPICS = [[f"{c}{v}{d}{w}" for d in "rst" for w in "ou"] for c, v in ("ba", "fe", "gi", "ka", "le", "mi", "pa", "ze")]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- corpora and configurations --------------------------------------------------------------------------------------


def texts(seed: int, documents: int = 90) -> list[list[str]]:
    """Documents of one topic each, whose words follow one another in a fixed order, from any of them on."""
    draws = np.random.default_rng(seed)
    found = []
    for _ in range(documents):
        words = TOPICS[draws.integers(len(TOPICS))]
        lines = []
        for _ in range(draws.integers(3, 12)):
            start, length = draws.integers(len(words)), draws.integers(3, 12)
            lines.append(" ".join(words[(start + i) % len(words)] for i in range(length)))
        found.append(lines)
    return found


def make_corpus(folder: Path, seed: int = 0, held_out: float = 0.2, documents: int = 90) -> Path:
    found = texts(seed, documents)
    prepare.prepare(
        folder,
        sources=[{"text": "\n".join(lines)} for lines in found],
        vocabulary=vocabulary.train(texts(0), size=131),
        sentences="lines",
        held_out=held_out,
        shard_bytes=5000,
        workers=0,
        on_problem=lambda problem: pytest.fail(str(problem)),
    )
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("data") / "corpus")


def config_of(out: Path, corpus: Path, **sections: Any) -> RunConfig:
    """Dropout, several packs a step, a masking rate and a learning rate that change, two lengths, two duplicates."""
    values: dict[str, Any] = {
        "out": str(out),
        "data": {"corpus": str(corpus), "duplicates": 2},
        "masking": {"rate": [0.3, 0.1], "unit": "word"},
        "model": {
            "hidden_size": 34,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 51,
            "max_position_embeddings": 37,
        },
        "optimizer": {"learning_rate": 3e-3},
        "schedule": {"steps": STEPS},
        "phases": [{"length": 29, "share": 0.5}, {"length": 37, "share": 0.5}],
        "batch": {"tokens_per_step": PACKS * 211, "tokens_per_pack": 211},
        "log": {"every": 2, "tensorboard": False},
        "eval": {"every": 4, "packs": 3},
        "checkpoint": {"every": EVERY, "keep": 2},
    }
    for name, section in sections.items():
        values[name] = {**values[name], **section} if isinstance(values.get(name), dict) else section
    return from_dict(values)


# Without phases, duplicates and checkpoints in between.
SIMPLE: dict[str, Any] = {
    "data": {"duplicates": 0},
    "masking": {"rate": 0.15, "unit": "token"},
    "phases": [{"length": 37}],
    "log": {"every": 1},
    "eval": {"every": 0},
    "checkpoint": {"every": 0},
}


def simple(out: Path, corpus: Path, **sections: dict[str, Any]) -> RunConfig:
    data = {**SIMPLE["data"], "corpus": str(corpus), **sections.pop("data", {})}
    return config_of(out, corpus, **{**SIMPLE, **sections, "data": data})


def figures(out: Path, *kinds: str) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    wanted = kinds or ("step", "evaluation")
    return [{name: entry.get(name) for name in FIGURES} for entry in entries if entry["kind"] in wanted]


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def names(out: Path) -> list[str]:
    return sorted(entry.name for entry in (out / "checkpoints").iterdir())


# ---- killed runs -----------------------------------------------------------------------------------------------------


def kill_at(call: int, function: Callable[..., Any], before: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """The function, at whose call with this number, from 1 on, the process ends."""
    numbers = itertools.count(1)

    def replaced(*arguments: Any, **options: Any) -> Any:
        if next(numbers) == call:
            if before is not None:
                before(*arguments, **options)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)

    return replaced


def half_of_it(content: Any, file: Path) -> None:
    torch.save(content, file)
    os.truncate(file, file.stat().st_size // 2)


def in_the_first_step() -> None:
    Tally.add = kill_at(2, Tally.add)  # type: ignore[method-assign]


def in_a_step() -> None:
    """Step 8, after the first of its packs."""
    Tally.add = kill_at(7 * PACKS + 1, Tally.add)  # type: ignore[method-assign]


def in_a_later_phase() -> None:
    """Step 6, which is the first of the second phase."""
    Tally.add = kill_at(5 * PACKS + 2, Tally.add)  # type: ignore[method-assign]


def in_a_file() -> None:
    """Of the second checkpoint."""
    replaced = SimpleNamespace(**{**vars(torch), "save": kill_at(2, torch.save, half_of_it)})
    vars(checkpoints)["torch"] = replaced


def before_the_renaming() -> None:
    Path.rename = kill_at(2, Path.rename)  # type: ignore[method-assign]


def in_the_removal() -> None:
    """Of the first checkpoint, when the third is there."""

    def but_one_file(folder: Path, **_: Any) -> None:
        next(folder.iterdir()).unlink()

    # Of each checkpoint one call makes room for it.
    vars(checkpoints)["shutil"] = SimpleNamespace(rmtree=kill_at(4, shutil.rmtree, but_one_file))


def trained(config: RunConfig, change: Callable[[], None] | None) -> None:
    torch.set_num_threads(1)
    if change is not None:
        change()
    loop.run(config, resume=True)


def start_method() -> Any:
    """Of processes; forkserver's have what they need imported already."""
    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    if sys.platform == "linux":
        context.set_forkserver_preload(["accelerate", "bert_fast.pretraining.loop"])
    return context


def train(config: RunConfig, change: Callable[[], None] | None = None) -> int:
    """Trains in a process of its own; its exit code."""
    process = start_method().Process(target=trained, args=(config, change))
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        pytest.fail(f"no end within {SECONDS} seconds")
    return int(process.exitcode)


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert train(config_of(out, corpus)) == 0
    return out


@pytest.mark.parametrize(
    ("change", "left", "workers"),
    [
        (in_the_first_step, None, 0),
        (in_a_step, ["step-00000003", "step-00000006"], 1),
        (in_a_later_phase, ["step-00000003"], 0),
        (in_a_file, [".step-00000006.part", "step-00000003"], 0),
        (before_the_renaming, [".step-00000006.part", "step-00000003"], 1),
        (in_the_removal, [".step-00000003.part", "step-00000006", "step-00000009"], 0),
    ],
)
def test_killed(
    change: Callable[[], None], left: list[str] | None, workers: int, undisturbed: Path, corpus: Path, tmp_path: Path
) -> None:
    """The log and the weights are those of a run that nobody disturbed, and no folder is ever there in part."""
    out = tmp_path / "run"
    config = config_of(out, corpus, data={"corpus": str(corpus), "duplicates": 2, "workers": workers})
    assert train(config, change) == -signal.SIGKILL
    assert (names(out) if (out / "checkpoints").exists() else None) == left
    for folder in checkpoints.find(out / "checkpoints"):
        assert checkpoints.load_state(folder)["step"] == checkpoints.step_of(folder)
    assert train(config) == 0
    assert names(out) == names(undisturbed) == ["step-00000006", "step-00000009"]
    assert figures(out) == figures(undisturbed)
    for name in names(out):
        assert weights(out / "checkpoints" / name) == weights(undisturbed / "checkpoints" / name)


def test_the_log_is_of_every_step(undisturbed: Path) -> None:
    """The tests above would pass on an empty one."""
    assert [entry["step"] for entry in figures(undisturbed, "step")] == [2, 4, 6, 8, 9]
    assert [entry["step"] for entry in figures(undisturbed, "evaluation")] == [4, 8, 9]
    losses = [entry["mlm_loss"] for entry in figures(undisturbed, "step")]
    assert all(math.isfinite(loss) for loss in losses)
    assert len(set(losses)) == len(losses)
    state = checkpoints.load_state(undisturbed / "checkpoints" / "step-00000009")
    assert state["progress"]["phase_steps"] == [5, 4]


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_optimizers_go_on(name: str, corpus: Path, tmp_path: Path) -> None:
    """With their moments: a run in two parts, the second with a schedule that both have, is the run in one."""
    optimizer = {"name": name, "learning_rate": 3e-3}
    schedule = {"kind": "constant", "warmup": 0.0}
    for out, steps in (("whole", [6]), ("parts", [2, 3, 6])):
        for number in steps:
            config = simple(tmp_path / out, corpus, optimizer=optimizer, schedule={"steps": number, **schedule})
            found = loop.run(config, resume=True)
        assert found.progress.step == 6
    whole, parts = (tmp_path / out / "checkpoints" / "step-00000006" for out in ("whole", "parts"))
    assert weights(whole) == weights(parts)
    moments = [torch.load(folder / "optimizer.pt", weights_only=True)["state"] for folder in (whole, parts)]
    assert moments[0].keys() == moments[1].keys()
    for parameter, values in moments[0].items():
        assert all(torch.equal(value, moments[1][parameter][key]) for key, value in values.items())


# ---- what belongs to a run -------------------------------------------------------------------------------------------


@pytest.fixture
def finished(undisturbed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(undisturbed, tmp_path / "finished"))


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"optimizer": {"learning_rate": 1e-3}}, "optimizer.learning_rate"),
        ({"optimizer": {"name": "lamb"}}, "optimizer.name"),
        ({"model": {"hidden_dropout_prob": 0.0}}, "model.hidden_dropout_prob"),
        ({"model": {"num_hidden_layers": 3}}, "model.num_hidden_layers"),
        ({"data": {"duplicates": 3}}, "data.duplicates"),
        ({"masking": {"rate": 0.15}}, "masking.rate"),
        ({"train": {"seed": 1}}, "train.seed"),
        ({"batch": {"tokens_per_step": 211}}, "batch.tokens_per_step"),
        ({"phases": [{"length": 31, "share": 0.5}, {"length": 37, "share": 0.5}]}, "phases[0].length"),
    ],
)
def test_another_configuration(sections: dict[str, Any], key: str, finished: Path, corpus: Path) -> None:
    sections = {name: {"corpus": str(corpus), **x} if name == "data" else x for name, x in sections.items()}
    with pytest.raises(ConfigError) as caught:
        loop.run(config_of(finished, corpus, **sections), resume=True)
    assert key in str(caught.value)
    assert "step-00000009" in str(caught.value)
    assert names(finished) == ["step-00000006", "step-00000009"]


def test_another_corpus(finished: Path, corpus: Path, tmp_path: Path) -> None:
    other = make_corpus(tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match=r"data\.corpus is .*other, and .*step-00000009 comes of another corpus"):
        loop.run(config_of(finished, other), resume=True)
    moved = shutil.copytree(corpus, tmp_path / "moved")
    assert loop.run(config_of(finished, moved), resume=True).progress.step == STEPS


def test_checkpoints_are_not_written_over(finished: Path, corpus: Path) -> None:
    log = (finished / "log.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"out is .*finished, which holds checkpoints; --resume"):
        loop.run(config_of(finished, corpus))
    assert names(finished) == ["step-00000006", "step-00000009"]
    assert (finished / "log.jsonl").read_bytes() == log


def hold(out: Path, connection: Any) -> None:
    with machine.only_run(out):
        connection.send(None)
        connection.recv()


def test_one_run_at_a_time(corpus: Path, tmp_path: Path) -> None:
    """Into a folder; the second one touches nothing, and a process that dies lets go of it."""
    out = tmp_path / "run"
    config = simple(out, corpus, schedule={"steps": 1})
    context = start_method()
    here, there = context.Pipe()
    process = context.Process(target=hold, args=(out, there))
    process.start()
    assert here.poll(SECONDS)
    try:
        with pytest.raises(ConfigError, match=r"out is .*run, into which another process trains"):
            loop.run(config)
        assert [entry.name for entry in out.iterdir()] == [".lock"]
    finally:
        process.kill()
        process.join(SECONDS)
    assert loop.run(config).progress.step == 1


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 7)


def turn_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, turn_a_bit, empty, Path.unlink])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "optimizer.pt"])
def test_damaged_files(name: str, damage: Callable[[Path], None], finished: Path, corpus: Path) -> None:
    """Are named; without that checkpoint the run goes on from the one before."""
    last = finished / "checkpoints" / "step-00000009"
    damage(last / name)
    with pytest.raises(CheckpointError, match=rf"step-00000009/{name} is missing, or has changed"):
        loop.run(config_of(finished, corpus), resume=True)
    assert last.exists()


@pytest.mark.parametrize("content", [None, "", "[]", "{", '{"step": 9}'])
def test_damaged_state(content: str | None, finished: Path, undisturbed: Path, corpus: Path) -> None:
    last = finished / "checkpoints" / "step-00000009"
    (last / "state.json").unlink()
    if content is not None:
        (last / "state.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"step-00000009/state\.json is missing or damaged"):
        loop.run(config_of(finished, corpus), resume=True)
    shutil.rmtree(last)
    loop.run(config_of(finished, corpus), resume=True)
    assert figures(finished) == figures(undisturbed)
    assert weights(last) == weights(undisturbed / "checkpoints" / "step-00000009")


def test_keys_that_may_change(finished: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A longer schedule leads back to the first phase, to packs that were not read yet."""
    read: list[tuple[int, int]] = []
    original = Run._step

    def recorded(self: Run, packs: Any, progress: Progress, share: float) -> None:
        read.extend((progress.phase, pack.number) for pack in packs)
        original(self, packs, progress, share)

    monkeypatch.setattr(Run, "_step", recorded)
    sections: dict[str, Any] = {
        "schedule": {"steps": 22, "kind": "cosine"},
        "log": {"every": 5},
        "eval": {"every": 0, "packs": 1},
        "checkpoint": {"every": 0, "keep": 1},
    }
    result = loop.run(config_of(finished, corpus, **sections), resume=True)
    assert result.progress.step == 22
    assert result.progress.phase_steps == (5 + 2, 4 + 11)
    assert read == [*((0, n) for n in range(15, 21)), *((1, n) for n in range(12, 45))]
    assert [entry["step"] for entry in figures(finished, "step")] == [2, 4, 6, 8, 9, 10, 15, 20, 22]
    assert names(finished) == ["step-00000022"]
    over = loop.run(config_of(finished, corpus, **sections), resume=True)
    assert over.progress[:3] == result.progress[:3]
    assert over.folder == result.folder
    assert over.evaluation is None


def test_weights_that_are_not_numbers(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Are not saved, and push out no checkpoint with good ones."""
    original = Run._step

    def broken(self: Run, packs: Any, progress: Progress, share: float) -> None:
        original(self, packs, progress, share)
        if progress.step == 3:
            self.objective.model.nsp.bias.data[1] = math.nan

    monkeypatch.setattr(Run, "_step", broken)
    with pytest.raises(CheckpointError, match=r"after step 4 model\.nsp\.bias holds numbers that are not finite"):
        loop.run(simple(tmp_path / "run", corpus, checkpoint={"every": 2, "keep": 1}))
    assert names(tmp_path / "run") == ["step-00000002"]


def test_refused_at_the_start(corpus: Path, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"train\.precision is \"fp16\", which needs a GPU"):
            loop.run(simple(tmp_path / "run", corpus, train={"precision": "fp16"}))
    lone = make_corpus(tmp_path / "lone", documents=1, held_out=0.0)
    with pytest.raises(ConfigError, match=r'has one document in its part "train"; data\.instances "nsp" needs two'):
        loop.run(simple(tmp_path / "run", lone))
    assert loop.run(simple(tmp_path / "run", lone, data={"instances": "sop"})).evaluation is None


# ---- time as the budget ----------------------------------------------------------------------------------------------


def test_minutes(corpus: Path, tmp_path: Path) -> None:
    """Progress and learning rate come to their ends when the time does."""
    found = loop.run(simple(tmp_path / "run", corpus, schedule={"steps": None, "minutes": 6 / 60}))
    entries = figures(tmp_path / "run", "step")
    assert 6 <= found.progress.elapsed < 12
    assert found.progress.step == len(entries) > 20
    assert entries[-1]["progress"] == 1
    assert entries[-1]["learning_rate"] < 0.1 * max(entry["learning_rate"] for entry in entries)
    assert found.folder.is_dir()


class Clock:
    """A second passes whenever somebody looks at it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        self.now += 1
        return self.now


def test_time_goes_on(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a run that is gone on with, too; what lay between its parts does not count."""
    clock = Clock()
    monkeypatch.setattr(loop, "time", clock)

    def run(**options: Any) -> loop.Result:
        config = simple(tmp_path / "run", corpus, schedule={"steps": None, "minutes": 0.5}, checkpoint={"every": 7})
        return loop.run(config, **options)

    original = Run._step

    def fails(self: Run, packs: Any, progress: Progress, share: float) -> None:
        if progress.step == 9:
            raise KeyboardInterrupt
        original(self, packs, progress, share)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_step", fails)
        with pytest.raises(KeyboardInterrupt):
            run()
    before = checkpoints.load_state(tmp_path / "run" / "checkpoints" / "step-00000007")["progress"]["elapsed"]
    assert before == 7.0
    clock.now += 10_000
    found = run(resume=True)
    shares = [entry["progress"] for entry in figures(tmp_path / "run", "step")]
    assert shares == sorted(shares)
    assert shares[6:8] == pytest.approx([7 / 30, 8 / 30], abs=2 / 30)
    assert 30 <= found.progress.elapsed <= 35


def test_an_evaluation_ends_the_time(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then nothing of the last steps is lost."""
    clock = Clock()
    monkeypatch.setattr(loop, "time", clock)
    original = Run._evaluate

    def slow(self: Run, *arguments: Any) -> Any:
        clock.now += 100
        return original(self, *arguments)

    monkeypatch.setattr(Run, "_evaluate", slow)
    config = simple(
        tmp_path / "run", corpus, schedule={"steps": None, "minutes": 1}, eval={"every": 5}, log={"every": 3}
    )
    found = loop.run(config)
    assert found.progress.step == 5
    assert checkpoints.load_state(found.folder)["step"] == 5
    assert [entry["step"] for entry in figures(tmp_path / "run", "step")] == [3, 5]
    assert [entry["step"] for entry in figures(tmp_path / "run", "evaluation")] == [5]


# ---- checkpoints elsewhere -------------------------------------------------------------------------------------------


def test_in_transformers(undisturbed: Path) -> None:
    """The same logits on a padded batch, from text that its tokenizer has read."""
    transformers = pytest.importorskip("transformers")
    folder = undisturbed / "checkpoints" / "step-00000009"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = transformers.BertForPreTraining.from_pretrained(folder).eval()
    ours = bert_fast.BertForPreTraining.from_pretrained(folder).eval()
    first, second = texts(2, 2)
    batch = tokenizer([first[0], " ".join(first[:2])], [second[0], "Baro?"], padding=True, return_tensors="pt")
    assert (batch["attention_mask"] == 0).any()
    assert tokenizer.unk_token_id != tokenizer.pad_token_id == ours.config.pad_token_id
    with torch.no_grad():
        expected = theirs(**batch)
        found = ours(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])
    is_token = batch["attention_mask"].bool()
    assert (found.logits - expected.prediction_logits)[is_token].abs().max() < 1e-5
    assert (found.next_sentence_logits - expected.seq_relationship_logits).abs().max() < 1e-5


def test_started_from_a_checkpoint(undisturbed: Path, corpus: Path, tmp_path: Path) -> None:
    """Without a learning rate its weights stay; gone on with, the checkpoint it came of may be gone."""
    start = Path(shutil.copytree(undisturbed / "checkpoints" / "step-00000009", tmp_path / "start"))
    sections: dict[str, Any] = {"model": {"init": str(start)}, "optimizer": {"learning_rate": 1e-30}}
    found = loop.run(simple(tmp_path / "run", corpus, **sections))
    assert weights(found.folder) == weights(start)
    shutil.rmtree(start)
    with pytest.raises(ConfigError, match=r"model\.init is .*start, which cannot be started from"):
        loop.run(simple(tmp_path / "new", corpus, **sections))
    again = loop.run(simple(tmp_path / "run", corpus, **sections), resume=True)
    assert again.progress.step == found.progress.step


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"num_hidden_layers": 1}, "model.num_hidden_layers is 1; model.init, .*, has 2"),
        ({"num_attention_heads": 17}, "model.num_attention_heads is 17; model.init, .*, has 2"),
        ({"hidden_act": "gelu_new"}, "model.hidden_act is gelu_new; model.init, .*, has gelu"),
        ({"intermediate_size": 53}, "model.init is .*, which cannot be started from: .* has shape"),
    ],
)
def test_started_from_another_model(
    model: dict[str, Any], message: str, undisturbed: Path, corpus: Path, tmp_path: Path
) -> None:
    init = str(undisturbed / "checkpoints" / "step-00000009")
    with pytest.raises(ConfigError, match=message):
        loop.run(simple(tmp_path / "run", corpus, model={"init": init, **model}))


def test_started_from_another_vocabulary(undisturbed: Path, corpus: Path, tmp_path: Path) -> None:
    """Of the same size."""
    folder = Path(shutil.copytree(undisturbed / "checkpoints" / "step-00000009", tmp_path / "start"))
    (folder / "tokenizer.json").unlink()
    words = (folder / "vocab.txt").read_text().splitlines()
    words[-2:] = words[:-3:-1]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    with pytest.raises(ConfigError, match=r"whose vocabulary is not the corpus'"):
        loop.run(simple(tmp_path / "run", corpus, model={"init": str(folder)}))


# ---- learning --------------------------------------------------------------------------------------------------------


def unigram_entropy(corpus: Path) -> float:
    """Nats a token, of what may be masked."""
    tokens = np.concatenate([shard.tokens for shard in Corpus.open(corpus).shards])
    counts = np.array(list(Counter(tokens.tolist()).values()))
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())


LONG: dict[str, Any] = {
    "schedule": {"steps": 260},
    "model": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "optimizer": {"learning_rate": 4e-3},
    "batch": {"tokens_per_step": 1024, "tokens_per_pack": 1024},
    "log": {"every": 20},
    "eval": {"packs": 100},
}


@pytest.fixture(scope="module")
def learned(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> loop.Result:
    torch.set_num_threads(1)
    return loop.run(simple(tmp_path_factory.mktemp("runs") / "learned", corpus, **LONG))


def test_it_learns(learned: loop.Result, corpus: Path) -> None:
    """Of which topic a sentence is, and so which words it may have and what it follows."""
    evaluation = learned.evaluation
    assert evaluation is not None
    assert evaluation.nsp_accuracy is not None
    assert evaluation.mlm_loss < 0.6 * unigram_entropy(corpus)
    assert evaluation.mlm_accuracy > 0.1
    assert evaluation.nsp_accuracy > 0.85
    losses = [entry["mlm_loss"] for entry in figures(learned.folder.parents[1], "step")]
    assert losses[-1] < 0.5 * losses[0]


def test_evaluations_of_a_checkpoint_are_the_same(learned: loop.Result, corpus: Path, tmp_path: Path) -> None:
    """Whatever seed, packs and masks the run has that it is evaluated in."""
    out = tmp_path / "run"
    sections = {
        **LONG,
        "schedule": {"steps": 1},
        "optimizer": {"learning_rate": 1e-30},
        "train": {"seed": 3},
        "masking": {"rate": 0.4},
        "model": {**LONG["model"], "init": str(learned.folder)},
    }
    found = loop.run(simple(out, corpus, **sections)).evaluation
    assert found is not None
    assert learned.evaluation is not None
    for name in ("mlm_loss", "mlm_accuracy", "nsp_accuracy", "tokens"):
        assert getattr(found, name) == getattr(learned.evaluation, name), name


def test_activation_checkpointing(corpus: Path, tmp_path: Path) -> None:
    """Changes nothing, dropout included."""
    found = [
        loop.run(simple(tmp_path / f"{is_on}", corpus, train={"activation_checkpointing": is_on}))
        for is_on in (False, True)
    ]
    assert weights(found[0].folder) == weights(found[1].folder)
    assert figures(tmp_path / "True") == figures(tmp_path / "False")


def test_bfloat16(corpus: Path, tmp_path: Path) -> None:
    """Products alone: near the losses in float32, and not the same; weights stay in float32."""
    losses = {}
    for precision in ("fp32", "bf16"):
        found = loop.run(simple(tmp_path / precision, corpus, train={"precision": precision}))
        losses[precision] = torch.tensor([entry["mlm_loss"] for entry in figures(tmp_path / precision, "step")])
        model = bert_fast.BertForPreTraining.from_pretrained(found.folder)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    difference = (losses["bf16"] - losses["fp32"]).abs().max()
    assert 0 < difference < 0.05


@pytest.mark.parametrize("instances", ["sop", "full"])
def test_other_instances(instances: str, corpus: Path, tmp_path: Path) -> None:
    found = loop.run(simple(tmp_path / "run", corpus, data={"instances": instances}))
    assert found.evaluation is not None
    assert (found.evaluation.nsp_accuracy is None) == (instances == "full")
    assert all((entry["nsp_loss"] is None) == (instances == "full") for entry in figures(tmp_path / "run", "step"))


def test_masks_follow_the_schedule(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first rate to the last."""
    shares = []
    original = Tally.count

    def recorded(self: Tally, batch: PretrainingBatch) -> None:
        shares.append(batch.predicted / batch.packed.total_tokens)
        original(self, batch)

    monkeypatch.setattr(Tally, "count", recorded)
    loop.run(simple(tmp_path / "run", corpus, masking={"rate": [0.6, 0.1]}))
    assert shares[:PACKS] == pytest.approx([0.6] * PACKS, abs=0.15)
    assert shares[-PACKS:] == pytest.approx([0.16] * PACKS, abs=0.08)
