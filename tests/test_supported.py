"""README's table of what is supported says what the code serves."""

from __future__ import annotations

import re
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from models import one_thread, transformers  # noqa: F401
from test_cli import Run, run  # noqa: F401

from bert_fast.swap import core, supported
from bert_fast.swap.family import Family
from bert_fast.swap.samples import is_of_transformers, model_classes
from bert_fast.swap.supported import BEGIN, END, MarkersError, markdown, section_of

ROOT = Path(__file__).resolve().parents[1]

BY_NAME = {family.name: family for family in core.FAMILIES}


def pinned(package: str) -> str:
    found = re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    return found[1]


@pytest.mark.skipif(
    version("transformers") != pinned("transformers"), reason="README names the classes of another transformers"
)
def test_readme() -> None:
    section = section_of((ROOT / "README.md").read_text(encoding="utf-8"))
    assert section == markdown(), "README.md is behind the code: bert-fast info --markdown --into README.md"


@pytest.mark.parametrize("family", [x for x in core.FAMILIES if is_of_transformers(x)], ids=lambda x: x.name)
def test_every_head_is_known(family: Family) -> None:
    """A class that transformers adds would read hidden places that nobody has computed."""
    assert {cls.__name__ for cls in model_classes(family)} - {family.encoder} <= set(family.kept_rows)


def test_what_is_derived() -> None:
    found = {name: supported.supported(BY_NAME[name]) for name in ("ELECTRA", "ModernBERT", "MPNet")}
    assert "narrow embeddings" in found["ELECTRA"].features
    assert {"rotary positions", "attention windows"} <= set(found["ModernBERT"].features)
    assert "relative position bias" in found["MPNet"].features
    assert found["ELECTRA"].takes_any_mask
    assert "PreTraining" in found["ELECTRA"].heads
    for each in found.values():
        assert each.products == ("float32", "bfloat16", "int8")


def test_table_follows_the_families(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family that loses a head, or the engine, loses it in the table."""
    bert, distilbert = BY_NAME["BERT"], BY_NAME["DistilBERT"]
    heads = {name: rows for name, rows in distilbert.kept_rows.items() if not name.endswith("MaskedLM")}

    def stack(model: Any) -> Any:
        result = distilbert.stack(model)
        if result.wanted == "int8":
            result.layers = []
            result.look_through()
        return result

    monkeypatch.setattr(supported, "FAMILIES", (bert, replace(distilbert, kept_rows=heads, stack=stack)))
    *introduction, _, _, _, first, second = markdown().splitlines()
    words = " ".join(introduction)
    assert "MaskedLM" not in words
    assert "the four heads `…ForMultipleChoice`, " in words
    assert words.endswith("in float32 or bfloat16.")
    assert "| BERT | `BertModel` | the four, MaskedLM, " in first
    assert "on CPUs int8 too" in first
    assert second.startswith("| DistilBERT | `DistilBertModel` | the four |")
    assert "int8" not in second


def test_command(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(supported, "FAMILIES", (BY_NAME["DistilBERT"],))
    printed = run("info", "--markdown")
    assert printed.status == 0, printed.err
    assert printed.out == markdown() + "\n"
    file = tmp_path / "page.md"
    file.write_text(f"above\n{BEGIN}\nold\n{END}\nbelow\n", encoding="utf-8")
    assert run("info", "--markdown", "--into", str(file)).status == 0
    assert file.read_text(encoding="utf-8") == f"above\n{BEGIN}\n{markdown()}\n{END}\nbelow\n"


@pytest.mark.parametrize("text", ["", f"{BEGIN}\n", f"{END}\n{BEGIN}\n", f"{BEGIN}\n{BEGIN}\n{END}\n"])
def test_no_place(run: Run, tmp_path: Path, text: str) -> None:  # noqa: F811
    file = tmp_path / "page.md"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(MarkersError, match="needed"):
        section_of(text)
    result = run("info", "--markdown", "--into", str(file))
    assert result.status == 2
    assert "are needed" in result.only_line
    assert file.read_text(encoding="utf-8") == text


def test_into_needs_markdown(run: Run) -> None:  # noqa: F811
    result = run("info", "--into", str(ROOT / "README.md"))
    assert result.status == 2
    assert "--markdown" in result.only_line
