"""The house rules that a machine can check, and every example in the documentation."""

import ast
import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import hf_cwd
from hf_cwd.rules import RULES
from hf_cwd.trainer import registration

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hf_cwd"
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = ["hf_cwd", *sorted(m.name for m in pkgutil.walk_packages(hf_cwd.__path__, "hf_cwd."))]

# Who may import whom: a part imports only parts that stand before it, or its own.
ORDER = [
    *("log", "decay", "newton_schulz", "rules", "kernels", "distributed", "optim", "routing", "estimate"),
    *("checkpoint", "trainer", "report", "launcher", "cli"),
]
OUTSIDE = {"transformers", "accelerate", "datasets", "evaluate"}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part in ("__init__", "__main__", "startup"):
        return
    for name in imported(path):
        package, _, rest = name.partition(".")
        if package == "hf_cwd" and rest.split(".")[0] in ORDER:
            assert ORDER.index(rest.split(".")[0]) <= ORDER.index(part), name
        assert package not in OUTSIDE or part in ("estimate", "trainer", "cli"), name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_distributed_communicates(path):
    calls = re.findall(r"\b(all_\w+|barrier|broadcast\w*|i?send|i?recv|reduce_scatter\w*|gather)\(", path.read_text())
    assert "distributed" in path.parts or not set(calls)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    module = importlib.import_module(name)
    assert module.__doc__
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("name", hf_cwd.__all__)
def test_public_names_are_documented(name):
    assert getattr(hf_cwd, name).__doc__


def test_the_readme_s_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    rules = dict(RULES)
    try:
        for block in blocks:
            exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
        (name,) = RULES.keys() - rules.keys()
        x = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
        x.grad = torch.ones(2)
        hf_cwd.CWDOptimizer([x], 0.5, algorithm=name, weight_decay=0.5).step()
        assert x.tolist() == [0.25, -1.5], "the rule of the README decays cautiously"
    finally:
        registration.unregister()
        for name in RULES.keys() - rules.keys():
            del RULES[name]
        registration.register()
