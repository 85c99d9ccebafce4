"""``hf-cwd enable`` in a virtual environment of its own: what then runs there has never heard of hf_cwd."""

import os
import sysconfig
from pathlib import Path

import pytest
import torch

from hf_cwd.rules import RULES
from tests.support.launching import IMPORTS, ROOT, Environment, finish, start, write_material

COMMAND = ("-c", "import sys; from hf_cwd.cli import main; sys.exit(main())")
NAMES = "from transformers.training_args import OptimizerNames; print([name.value for name in OptimizerNames])"
SMALL_TRAINING_ARGS = "import enum; OptimizerNames = enum.Enum('OptimizerNames', {'ADAMW_TORCH': 'adamw_torch'})"
OURS = {f"cwd_{rule}" for rule in RULES}
FILES = ["_hf_cwd_startup.pth", "_hf_cwd_startup.py"]


def files(environment: Environment) -> list[str]:
    """What `enable` wrote, and what Python compiled of it."""
    found = [path for path in environment.site_packages.rglob("*startup*") if ROOT not in path.resolve().parents]
    return sorted(str(path.relative_to(environment.site_packages)) for path in found)


@pytest.fixture(scope="module")
def enabled(tmp_path_factory):
    environment = Environment(tmp_path_factory.mktemp("environment"))
    environment.launch(*COMMAND, "enable")
    return environment


def test_enable_and_disable(tmp_path):
    """Both can be repeated, and a start of Python imports one small module, whatever its options."""
    environment = Environment(tmp_path)
    before = environment.modules()
    first = environment.launch(*COMMAND, "enable").stdout
    assert files(environment) == FILES
    for name in FILES:
        assert f"wrote {environment.site_packages / name}\n" in first
    assert f"Every script run by {environment.python} now has --optim cwd_adamw, cwd_lion" in first
    (environment.site_packages / FILES[1]).write_text("# an older version\n")
    environment.launch(*COMMAND, "enable")
    copied = (environment.site_packages / FILES[1]).read_text()
    assert copied == (ROOT / "hf_cwd/startup.py").read_text()

    assert environment.modules() - before == {"_hf_cwd_startup"}
    assert "_hf_cwd_startup" not in environment.modules("-S")
    assert "_hf_cwd_startup" in environment.modules("-I")
    assert not before & {"torch", "transformers", "hf_cwd"}
    (compiled,) = set(files(environment)) - set(FILES)

    last = environment.launch(*COMMAND, "disable").stdout
    assert files(environment) == []
    for name in (*FILES, compiled):
        assert f"removed {environment.site_packages / name}\n" in last
    assert environment.modules() == before
    assert "there was nothing to remove" in environment.launch(*COMMAND, "disable").stdout


def test_scripts_run_as_they_are(enabled, tmp_path):
    """The `trl` command parses --optim, then has `accelerate launch` start a script, which does so again and trains."""
    write_material(tmp_path)
    trl = [Path(sysconfig.get_path("scripts")) / "trl", "sft", "--optim", "cwd_adamw", "--output_dir", tmp_path / "sft"]
    trl += ["--model_name_or_path", tmp_path / "model", "--dataset_name", tmp_path / "data", "--use_cpu"]
    trl += ["--bf16", "false", "--max_steps", 2, "--weight_decay", 0.1, "--max_length", 32, "--report_to", "none"]
    result = enabled.launch(*trl, HF_HOME=str(tmp_path / "home"))
    assert "[hf_cwd] cwd_adamw lr=" in result.stderr
    saved = torch.load(tmp_path / "sft/checkpoint-2/optimizer.pt", weights_only=True)
    assert {group["algorithm"] for group in saved["param_groups"]} == {"adamw"}


def test_an_import_of_hf_cwd_and_enable_do_not_meet(enabled):
    """Each name is registered once, whichever of the two finders comes first."""
    handlers = "from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS as h; print([str(k.value) for k in h])"
    orders = ["import hf_cwd, transformers.trainer_optimizer", "import transformers.trainer_optimizer, hf_cwd"]
    started = [enabled.start("-c", "\n".join([order, NAMES, handlers])) for order in orders]
    for process in started:
        result = finish(process)
        assert (result.returncode, result.stderr) == (0, "")
        for names in result.stdout.splitlines():
            assert sorted(name for name in eval(names) if name.startswith("cwd_")) == sorted(OURS)


def test_modules_may_be_imported_by_several_threads(enabled):
    result = enabled.launch(IMPORTS, "transformers", "accelerate", "transformers.trainer", "torch")
    assert set(eval(result.stdout)) >= OURS


def test_without_hf_cwd_everything_else_works(enabled, tmp_path):
    """Uninstalled is silent; what was left behind, or fails to import, is one line that says what to do.

    A transformers that takes no seconds to import is enough for the last two.
    """
    (tmp_path / "leftover/hf_cwd/trainer").mkdir(parents=True)
    (tmp_path / "broken/hf_cwd").mkdir(parents=True)
    (tmp_path / "broken/hf_cwd/__init__.py").write_text("import a_package_that_is_gone")
    for case in ("leftover", "broken"):
        (tmp_path / case / "transformers").mkdir()
        (tmp_path / case / "transformers/__init__.py").touch()
        (tmp_path / case / "transformers/training_args.py").write_text(SMALL_TRAINING_ARGS)
    reasons = {
        "uninstalled": "",
        "leftover": "(ModuleNotFoundError: No module named 'hf_cwd.trainer.registration')",
        "broken": "(ModuleNotFoundError: No module named 'a_package_that_is_gone')",
    }
    target = os.readlink(enabled.package)
    enabled.package.unlink()
    try:
        started = {case: enabled.start("-c", NAMES, PYTHONPATH=str(tmp_path / case)) for case in reasons}
        results = {case: finish(process) for case, process in started.items()}
    finally:
        enabled.package.symlink_to(target)
    for case, reason in reasons.items():
        result = results[case]
        assert (result.returncode, "adamw_torch" in eval(result.stdout)) == (0, True), result.stderr
        assert not OURS & set(eval(result.stdout))
        lines = result.stderr.splitlines()
        assert len(lines) == bool(reason), result.stderr
        for line in lines:
            assert line.startswith(f"hf_cwd cannot be imported {reason}, so --optim cwd_* is not known.")
            assert f"run `hf-cwd disable`, or delete {enabled.site_packages / FILES[1]} and the .pth" in line


def test_a_start_with_half_of_it_is_silent(enabled):
    module = enabled.site_packages / FILES[1]
    module.rename(module.with_suffix(".away"))
    try:
        result = enabled.launch("-c", "print('started')")
    finally:
        module.with_suffix(".away").rename(module)
    assert (result.stdout, result.stderr) == ("started\n", "")


def test_what_cannot_be_enabled_is_refused(tmp_path):
    """A directory that may not be written to, or not all of it, and an environment that has no hf_cwd."""
    environment = Environment(tmp_path)
    # Root may write anywhere, until it drops the capability to.
    drop = "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])"
    root = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override"] if os.geteuid() == 0 else []
    environment.site_packages.chmod(0o555)
    try:
        command = [*root, environment.python, *COMMAND, "enable"]
        read_only = finish(start("-c", drop, *command, cwd=tmp_path))
    finally:
        environment.site_packages.chmod(0o755)
    assert read_only.returncode == 2
    assert read_only.stderr.startswith(f"hf-cwd enable: error: cannot enable hf_cwd in {environment.site_packages}: ")
    assert "Permission denied" in read_only.stderr
    assert "use a virtual environment, or start scripts with `python -m hf_cwd script.py`" in read_only.stderr
    assert files(environment) == []

    (environment.site_packages / FILES[0]).mkdir()
    in_the_way = finish(environment.start(*COMMAND, "enable"))
    assert in_the_way.returncode == 2
    assert "Is a directory" in in_the_way.stderr
    assert files(environment) == FILES, "no draft is left"
    (environment.site_packages / FILES[0]).rmdir()
    (environment.site_packages / FILES[1]).unlink()

    environment.package.unlink()
    result = finish(environment.start(*COMMAND, "enable", PYTHONPATH=str(ROOT)))
    assert result.returncode == 2
    assert f"hf-cwd enable: error: hf_cwd is not installed in {tmp_path}: install it" in result.stderr
    assert files(environment) == []
