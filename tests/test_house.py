"""The house rules that a machine can check, the package's metadata, and every example and name in the documentation."""

import ast
import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

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


def test_the_package_imports_no_scripts_and_neither_imports_tests():
    rooms = {"tests", "scripts", "common", "bench", "dev"}
    for folder, others in (("hf_cwd", rooms), ("scripts", {"tests", "scripts"})):
        files = sorted((ROOT / folder).rglob("*.py"))
        assert len(files) > 20
        for path in files:
            assert others.isdisjoint(name.partition(".")[0] for name in imported(path)), path


def module_file(name):
    """The file of a module or package of the project; None of any other."""
    path = ROOT / ("scripts" if name.split(".")[0] in ("common", "bench", "dev") else "") / name.replace(".", "/")
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def defined(file):
    """The names at the top of a module, also those below an if or a try, and those that it computes by __getattr__."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names | (set(hf_cwd.__all__) if file == PACKAGE / "__init__.py" else set())


@pytest.mark.parametrize("folder", ["hf_cwd", "scripts", "tests"])
def test_what_is_imported_exists(folder):
    """Also what a function imports, or a module that only a process of several ranks runs."""
    missing, in_rooms = [], {path.stem for path in (ROOT / "scripts").glob("*/*.py")}
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module in in_rooms:
                missing.append(f"{path}: {node.module} is in a room of scripts/")
            elif isinstance(node, ast.ImportFrom) and (file := module_file(node.module)) is not None:
                names = {alias.name for alias in node.names if module_file(f"{node.module}.{alias.name}") is None}
                missing += [f"{path}: {node.module} has no {name}" for name in names - defined(file)]
    assert missing == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_distributed_communicates(path):
    collectives = r"\b(all_\w+|barrier|broadcast\w*|i?send|i?recv|reduce_scatter\w*|(?<!\bstep\.)gather)\("
    calls = re.findall(collectives, path.read_text())  # step.gather is the exchange's operation, not torch's
    assert "distributed" in path.parts or not calls


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    module = importlib.import_module(name)
    assert module.__doc__
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("name", hf_cwd.__all__)
def test_public_names_are_documented(name):
    assert getattr(hf_cwd, name).__doc__


# --- Types ---


def test_the_public_names_have_types():
    """mypy on what pyproject.toml lists; tests/public_api.py has mistakes in it that have to be found."""
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_public_name_is_type_checked():
    assert {f"hf_cwd.{name}" for name in hf_cwd.__all__} <= set(imported(ROOT / "tests/public_api.py"))


def test_a_type_checker_finds_names_where_python_does():
    blocks = [node for node in ast.parse((PACKAGE / "__init__.py").read_text()).body if isinstance(node, ast.If)]
    (imports,) = [block.body for block in blocks if ast.unparse(block.test) == "TYPE_CHECKING"]
    homes = {alias.name: node.module for node in imports for alias in node.names}
    assert homes == {name: getattr(hf_cwd, name).__module__ for name in hf_cwd.__all__}


# --- Metadata ---


@pytest.fixture
def distribution(monkeypatch):
    """What setup.py says."""
    pytest.importorskip("setuptools")
    from distutils.core import run_setup  # setuptools brings it where Python has none

    monkeypatch.chdir(ROOT)
    return run_setup("setup.py", stop_after="init")


def test_type_checkers_are_told_that_there_are_types(distribution):
    assert "py.typed" in distribution.package_data["hf_cwd"]
    assert (PACKAGE / "py.typed").is_file()


def test_every_dependency_is_pinned_once(distribution):
    lists = [distribution.install_requires, *distribution.extras_require.values()]
    needed = {re.match(r"[\w-]+", requirement)[0] for requirements in lists for requirement in requirements}
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert sorted(pin.partition("==")[0] for pin in pins) == sorted(needed)


def test_the_citation_is_of_this_version_and_names_the_paper(distribution):
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (hf_cwd.__version__, distribution.get_license())
    assert citation["authors"] == [{"name": distribution.get_author()}]
    (paper,) = citation["references"]
    assert paper["url"] == distribution.metadata.project_urls["Paper"]
    assert paper["url"].rpartition("/")[2] in hf_cwd.__doc__


def test_hooks_run_what_is_there_and_fetch_nothing():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [repository["repo"] for repository in config["repos"]] == ["local"]
    hooks = config["repos"][0]["hooks"]
    assert {hook["language"] for hook in hooks} == {"system"}
    for hook in hooks:
        scripts = re.findall(r"scripts/[\w./-]+", hook["entry"])
        assert scripts
        assert all((ROOT / script).is_file() for script in scripts), hook["id"]


# --- Documentation ---

PAGES = ("CONTRIBUTING.md", "docs/architecture.md")
TOP = ("hf_cwd/", "tests/", "scripts/", "configs/", "docs/")


def names_in(path):
    """What a Python file defines: ``function``, ``Class``, ``Class.method`` and ``CONSTANT``."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
            yield from (f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef))
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))


@pytest.mark.parametrize("page", PAGES)
def test_the_files_and_names_on_a_page_exist(page):
    """A page names a file by its path, and what is in it as ``path::name``."""
    named = [text for text in re.findall(r"`([^`\s]+)`", (ROOT / page).read_text()) if text.startswith(TOP)]
    assert named
    for text in named:
        path, _, name = text.partition("::")
        if "<" not in path:  # the file that the reader is going to write
            assert (ROOT / path).exists(), text
            assert not name or name in names_in(ROOT / path), text


def test_the_architecture_page_has_every_room_and_their_order():
    text = (ROOT / "docs/architecture.md").read_text()
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert set(re.findall(r"^\| `hf_cwd/(\w+)/` \|", text, re.MULTILINE)) == rooms
    order = re.search(r"^ {4}log, (?:.+\n)+", text, re.MULTILINE)[0]
    assert re.findall(r"\w+", order) == ORDER
    assert len(text.splitlines()) <= 120


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
