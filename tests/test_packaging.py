"""Names, imports and layers: what `import bert_fast` gives, needs and leaves alone."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

import bert_fast
from bert_fast import checkpoint, encoder, functional, heads, masking, nn, tasks
from bert_fast.swap import core

ROOT = Path(__file__).resolve().parents[1]

OPTIONAL = (
    "accelerate",
    "click",
    "datasets",
    "faiss",
    "matplotlib",
    "pyarrow",
    "pydantic",
    "pytrec_eval",
    "ray",
    "rich",
    "scipy",
    "sentence_transformers",
    "seqeval",
    "sklearn",
    "tensorboard",
    "transformers",
    "triton",
    "usearch",
)

# Who may import whom when it is imported: only what stands further up in this list.
LAYERS = (
    {"_C", "collator", "config", "kernels", "lines"},
    {"guard", "ops", "reference"},
    {"functional"},
    {"masking"},
    {"nn", "graphs"},
    {"checkpoint", "engine"},
    {"encoder"},
    {"heads"},
    {"swap"},
    {"pretraining", "tasks"},
    {"cli"},
)


def run(code: str, cwd: Path) -> str:
    """What a fresh interpreter prints; `python -c` puts cwd on sys.path first, as `python -m pytest` does."""
    variables = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=cwd,
        env=variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module",
    [bert_fast, functional, masking, nn, heads, encoder, checkpoint, sys.modules["bert_fast.swap"], tasks],
    ids=lambda module: module.__name__,
)
def test_all(module: ModuleType) -> None:
    names = module.__all__
    assert len(set(names)) == len(names)
    assert [name for name in names if not hasattr(module, name)] == []
    star: dict[str, object] = {}
    exec(f"from {module.__name__} import *", star)
    assert star.keys() - {"__builtins__"} == set(names)


def test_public_names() -> None:
    public = {name for name in vars(bert_fast) if not name.startswith("_")}
    parts = {name for name in public if isinstance(getattr(bert_fast, name), ModuleType)}
    assert public - parts | {"__version__"} == set(bert_fast.__all__) - parts
    assert set(bert_fast.__all__) & parts == {"functional", "masking", "nn"}


def test_swap_is_the_function() -> None:
    # The package bert_fast.swap hides behind the function of that name.
    assert bert_fast.swap is core.swap
    assert bert_fast.restore is core.restore


def test_version() -> None:
    assert bert_fast.__version__ == importlib.metadata.version("bert-fast")


# ---- what an import needs --------------------------------------------------------------------------------------------

USE = """
config = bert_fast.BertConfig(vocab_size=11, hidden_size=6, num_hidden_layers=1, num_attention_heads=2,
                              intermediate_size=7, max_position_embeddings=5)
model = bert_fast.BertForMaskedLM(config).eval()
ids = torch.tensor([[1, 2, 3], [4, 5, 0]])
output = model(ids, ids != 0, labels=ids)
output.loss.backward()
assert output.logits.shape == (6, 11)
"""


def test_import_without_options(tmp_path: Path) -> None:
    code = f"""
import sys
names = {OPTIONAL!r}
for name in names:
    sys.modules[name] = None  # importing it raises ImportError
import torch
import bert_fast
import bert_fast.tasks.classify
{USE}
"""
    run(code, cwd=tmp_path)


def test_import_takes_no_options(tmp_path: Path) -> None:
    code = f"""
import sys
import torch
before = set(sys.modules)
import bert_fast
import bert_fast.tasks.classify
{USE}
print(sorted({{name.partition(".")[0] for name in set(sys.modules) - before}} & set({OPTIONAL!r})))
"""
    assert run(code, cwd=tmp_path) == "[]\n"


def test_import_asks_no_device(tmp_path: Path) -> None:
    kernels = sorted(f"bert_fast.kernels.{file.stem}" for file in (ROOT / "kernels").glob("*.py"))
    assert "bert_fast.kernels.attention" in kernels
    code = f"""
import importlib
import torch

def ask(*args, **kwargs):
    raise AssertionError("an import asks for a device")

for name in ("_lazy_init", "init", "is_available", "device_count", "current_device", "get_device_properties",
             "get_device_capability"):
    assert hasattr(torch.cuda, name), name
    setattr(torch.cuda, name, ask)
import bert_fast
from bert_fast import reference
from bert_fast.swap import core
for name in {kernels if find_spec("triton") else []!r}:
    importlib.import_module(name)
assert not torch.cuda.is_initialized()
"""
    run(code, cwd=tmp_path)


def test_kernels_folder_is_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "bert_fast" / "kernels").resolve() == ROOT / "kernels"


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
def test_transformers_from_the_root() -> None:
    # Our folder `kernels` is on sys.path, first, where transformers looks for a package of that name.
    code = """
import sys
from importlib.util import find_spec
from pathlib import Path
assert Path(sys.path[0]).resolve() == Path.cwd()
assert str(Path.cwd() / "kernels") in list(find_spec("kernels").submodule_search_locations)
import torch
import transformers
config = transformers.BertConfig(vocab_size=11, hidden_size=6, num_hidden_layers=1, num_attention_heads=2,
                                 intermediate_size=7, max_position_embeddings=5)
model = transformers.BertModel(config).eval()
ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
expected = model(ids).last_hidden_state
import bert_fast
found = bert_fast.swap(model)(ids).last_hidden_state
assert (found - expected).abs().max() < 1e-5
"""
    run(code, cwd=ROOT)


# ---- layers ----------------------------------------------------------------------------------------------------------


def package_files() -> list[Path]:
    files = [*(ROOT / "kernels").glob("*.py"), *(ROOT / "bert_fast").rglob("*.py")]
    return [file for file in files if file.relative_to(ROOT).parts[:2] != ("bert_fast", "kernels")]


def package_name(file: Path) -> list[str]:
    """The parts of the module's package: ["bert_fast", "swap"] for bert_fast/swap/core.py."""
    parts = list(file.relative_to(ROOT).parent.parts)
    return ["bert_fast", *parts] if parts[0] == "kernels" else parts


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def nodes(tree: ast.AST, has_functions: bool) -> Iterator[ast.AST]:
    """All nodes that run, with or without those that run when a function is called."""
    for node in ast.iter_child_nodes(tree):
        is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if is_for_types(node) or (is_function and not has_functions):
            continue
        yield node
        yield from nodes(node, has_functions)


def imports(file: Path, has_functions: bool = True) -> set[str]:
    """The absolute names of the modules, or of the things in them, that a file of the package imports."""
    found = set()
    for node in nodes(ast.parse(file.read_text(encoding="utf-8")), has_functions):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = package_name(file) if file.is_relative_to(ROOT / "bert_fast") or node.level else []
            start = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*start, *([node.module] if node.module else [])])
            found |= {f"{source}.{alias.name}" for alias in node.names}
    return found


def tops(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def own(names: set[str]) -> set[str]:
    """The parts of bert_fast among the names: "swap" for bert_fast.swap.core.swap."""
    return {name.split(".")[1] for name in names if name.startswith("bert_fast.")}


def layer_of(part: str) -> int:
    return next(index for index, parts in enumerate(LAYERS) if part in parts)


def part_of(file: Path) -> str:
    return [*package_name(file), file.stem][1]


def test_imports_are_found() -> None:
    # The tests below would pass on empty sets.
    assert "bert_fast.nn.embed" in imports(ROOT / "bert_fast" / "encoder.py")
    assert "bert_fast.reference" in imports(ROOT / "bert_fast" / "swap" / "bert_shaped.py")
    assert "bert_fast.kernels._launch.Launch" in imports(ROOT / "kernels" / "gelu.py")
    assert "transformers.modeling_outputs.BaseModelOutputWithPoolingAndCrossAttentions" in imports(
        ROOT / "bert_fast" / "swap" / "bert_shaped.py"
    )
    assert not any("transformers" in name for name in imports(ROOT / "bert_fast" / "swap" / "bert_shaped.py", False))
    assert len(package_files()) > 15


def test_public_face_imports_itself_alone() -> None:
    assert tops(imports(ROOT / "bert_fast" / "__init__.py")) == {"bert_fast"}


@pytest.mark.parametrize(
    "file",
    [file for file in package_files() if file != ROOT / "bert_fast" / "__init__.py"],
    ids=lambda file: str(file.relative_to(ROOT)),
)
def test_layers(file: Path) -> None:
    part = part_of(file)
    for other in own(imports(file, has_functions=False)) - {part}:
        assert layer_of(other) < layer_of(part), f"{part} imports {other}"


@pytest.mark.parametrize("file", package_files(), ids=lambda file: str(file.relative_to(ROOT)))
def test_never_imported(file: Path) -> None:
    names = tops(imports(file))
    assert not names & {"benchmarks", "kernels", "tests", "conftest", "pytest"}
    if part_of(file) not in ("swap", "pretraining", "tasks", "cli"):
        assert not names & {"accelerate", "click", "rich", "sentence_transformers", "transformers"}
    if part_of(file) != "kernels":
        assert "triton" not in names


@pytest.mark.parametrize("file", sorted((ROOT / "kernels").glob("*.py")), ids=lambda file: file.name)
def test_kernels_stand_alone(file: Path) -> None:
    assert own(imports(file)) <= {"kernels"}
    assert tops(imports(file)) - {"bert_fast", "torch", "triton"} <= sys.stdlib_module_names


@pytest.mark.parametrize(("name", "allowed"), [("config", set()), ("reference", {"config"})])
def test_oracle_shares_nothing(name: str, allowed: set[str]) -> None:
    found = imports(ROOT / "bert_fast" / f"{name}.py")
    assert own(found) <= allowed
    assert tops(found) - {"bert_fast", "torch"} <= sys.stdlib_module_names


def test_nobody_imports_kernels() -> None:
    folders = (file for name in ("benchmarks", "tests") for file in (ROOT / name).rglob("*.py"))
    for file in [*package_files(), *folders, ROOT / "setup.py"]:
        assert "kernels" not in tops(imports(file)), file


# ---- what is installed -----------------------------------------------------------------------------------------------


def setup_arguments() -> dict[str, ast.expr]:
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    found = next(call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "setup")
    return {str(keyword.arg): keyword.value for keyword in found.keywords}


def test_all_packages_are_installed() -> None:
    listed = ast.literal_eval(setup_arguments()["packages"])
    folders = {file.parent for file in package_files()} - {ROOT / "kernels"} | {ROOT / "bert_fast" / "kernels"}
    assert sorted(listed) == sorted(".".join(folder.relative_to(ROOT).parts) for folder in folders)


def test_all_sources_are_compiled() -> None:
    (extension,) = (node for node in ast.walk(setup_arguments()["ext_modules"]) if isinstance(node, ast.Call))
    lists = {keyword.arg: keyword.value for keyword in extension.keywords}
    listed = [name for key in ("sources", "depends") for name in ast.literal_eval(lists[key])]
    assert sorted(listed) == sorted(
        str(file.relative_to(ROOT)) for file in (ROOT / "csrc").rglob("*.*") if file.is_file()
    )
