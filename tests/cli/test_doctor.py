"""``hf-cwd doctor``: the command in a whole environment and in a broken one, and each thing it must notice."""

import dataclasses
import json
import os
import subprocess
import sys
import sysconfig

import pytest
import torch
import transformers

from hf_cwd import decay, kernels
from hf_cwd.cli import doctor, enable, self_check
from hf_cwd.rules import RULES, Rule
from hf_cwd.trainer import names


def run(folder, *flags, **environment):
    """The command in a process of its own, started in ``folder``, where it must write nothing."""
    folder.mkdir()
    return subprocess.run(
        [sys.executable, "-c", "import sys; from hf_cwd.cli import main; sys.exit(main())", "doctor", *flags],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip


def test_a_whole_environment(tmp_path):
    done = run(tmp_path / "here", HF_TOKEN="secret", ACCELERATE_MIXED_PRECISION="no")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    for line in (
        "  ACCELERATE_MIXED_PRECISION: no",
        f"  python: {sys.version.split()[0]}, {sys.executable}",
        f"  transformers: {transformers.__version__}",
        "  auto on cpu: hf_cwd.kernels.c",
        f"  gloo: {'yes' if torch.distributed.is_gloo_available() else 'no'}",
        "  --optim cwd_muon: registered, rule muon",
    ):
        assert line in lines
    assert f"  torch: {torch.__version__}, built for " in done.stdout
    assert "threads, OMP_NUM_THREADS 1\n" in done.stdout
    assert f"auto on cpu: {'; '.join(f'{rule} ok' for rule in RULES)}\n" in done.stdout
    assert lines[-2:] == ["Problems:", "  none"]
    assert "secret" not in done.stdout
    assert list((tmp_path / "here").iterdir()) == []


BROKEN = {
    "transformers": "raise RuntimeError('made for\\n another torch')",
    "accelerate": "__version__ = '0.9'",
    "deepspeed": "import sys; sys.exit('no compiler')",
    "peft": "import a_missing_part",
    "evaluate": "print('hello'); __version__ = '7.7'",
    "trl": "raise ModuleNotFoundError(name='trl')",
}


def test_broken_packages_are_reported_and_the_rest_still_is(tmp_path):
    for name, text in BROKEN.items():
        (tmp_path / "stubs" / name).mkdir(parents=True)
        (tmp_path / "stubs" / name / "__init__.py").write_text(text)
    paths = os.pathsep.join(filter(None, [str(tmp_path / "stubs"), os.environ.get("PYTHONPATH")]))
    done = run(tmp_path / "here", "--json", PYTHONPATH=paths)
    assert done.returncode == 1, done.stdout + done.stderr
    report = json.loads(done.stdout)
    versions = report["Versions"]
    assert versions["transformers"] == "broken: RuntimeError: made for another torch"
    assert versions["accelerate"] == "0.9, not supported: hf_cwd needs accelerate>=1.1"
    assert versions["deepspeed"] == "broken: SystemExit: no compiler"
    assert versions["peft"] == "broken: ModuleNotFoundError: No module named 'a_missing_part'"
    assert (versions["evaluate"], versions["trl"]) == ("7.7", "not installed")
    assert report["Optimizers"] == {"error": "RuntimeError: made for another torch"}
    assert report["Self-check"]["auto on cpu"] == "; ".join(f"{rule} ok" for rule in RULES)
    assert report["Problems"] == [  # hf_cwd trains without the others
        "transformers broken: RuntimeError: made for another torch; try: pip install -U 'transformers>=5.2'",
        "accelerate 0.9, not supported: hf_cwd needs accelerate>=1.1; try: pip install -U 'accelerate>=1.1'",
        "Optimizers: RuntimeError: made for another torch",
    ]


def test_a_broken_torch_is_reported(tmp_path):
    (tmp_path / "stubs/torch").mkdir(parents=True)
    (tmp_path / "stubs/torch/__init__.py").write_text("raise ImportError('libcudart.so.12: cannot open')")
    paths = os.pathsep.join(filter(None, [str(tmp_path / "stubs"), os.environ.get("PYTHONPATH")]))
    done = run(tmp_path / "here", "--json", PYTHONPATH=paths)
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["Versions"]["torch"] == "broken: ImportError: libcudart.so.12: cannot open"
    assert report["Versions"]["python"].startswith(sys.version.split()[0])
    assert report["Self-check"] == {"error": "ImportError: libcudart.so.12: cannot open"}
    assert report["Problems"][0].startswith("torch broken: ImportError: libcudart.so.12: cannot open; try: pip install")


def checked():
    problems = []
    return self_check.self_check(problems)["auto on cpu"].split("; "), problems


def test_plain_decay_fails_the_check_of_every_rule(monkeypatch):
    monkeypatch.setattr(decay, "cautious_mask", lambda direction, param, *, mask: torch.ones_like(param))
    _, problems = checked()
    assert len({problem.split()[0] for problem in problems}) == len(RULES)
    assert "adamw does not step as defined, eager kernel on cpu: off by 0.25" in problems


@pytest.mark.parametrize("wrong", [2.0, float("nan")])
def test_a_wrong_direction_fails_the_check_of_its_rule(algorithm, wrong, monkeypatch):
    rule = RULES[algorithm]
    stage = "direction" if rule.matrix is None else "matrix"
    right = getattr(rule, stage)
    replaced = dataclasses.replace(rule, **{stage: lambda *args, **options: right(*args, **options) * wrong})
    monkeypatch.setitem(RULES, algorithm, replaced)
    lines, problems = checked()
    (failed,) = [line for line in lines if not line.endswith(" ok")]
    assert failed.startswith(f"{algorithm} FAILED, off by ")
    assert {problem.split(",")[0] for problem in problems} == {f"{algorithm} does not step as defined"}


def test_a_rule_of_the_user_s_is_held_to_its_own_direction(monkeypatch):
    def cubes(grad, *, step):
        return grad**3

    monkeypatch.setitem(RULES, "cubes", Rule("cubes", cubes, state_keys=lambda group: (), hyperparameters={}))
    assert checked() == ([f"{rule} ok" for rule in RULES], [])
    monkeypatch.setattr(decay, "cautious_mask", lambda direction, param, *, mask: torch.ones_like(param))
    assert "cubes does not step as defined, auto kernel on cpu: off by 0.25" in checked()[1]


def test_a_kernel_that_cannot_run_says_why_and_is_not_checked(monkeypatch):
    def select(name, device):
        if name in ("c", "triton"):
            raise ImportError("no compiler")
        return kernels.KERNELS["eager"]

    monkeypatch.setattr(kernels, "select", select)
    problems = []
    assert self_check.kernel_table(problems)["c on cpu"] == "not usable: ImportError: no compiler"
    assert self_check.self_check(problems).keys() == {"auto on cpu", "eager on cpu"}
    assert problems == []


def test_names_that_transformers_does_not_know():
    problems = []
    names.unregister()
    try:
        report = doctor.optimizers(problems)
    finally:
        names.register()
    assert report["--optim cwd_lion"] == "LookupError: not registered"
    assert problems == [f"--optim {name}: LookupError: not registered" for name in names.names()]
    handlers = sys.modules["transformers.trainer_optimizer"]._OPTIMIZER_HANDLERS
    ours = handlers.pop(transformers.training_args.OptimizerNames("cwd_lion"))
    try:
        assert doctor.optimizers([])["--optim cwd_lion"] == "LookupError: its handler is not hf_cwd's"
    finally:
        handlers[transformers.training_args.OptimizerNames("cwd_lion")] = ours


def test_variables_that_make_us_refuse(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    problems = []
    assert "does not support --deepspeed" in doctor.optimizers(problems)["--optim cwd_adamw"]
    assert len(problems) == len(RULES)
    assert doctor.environment([])["ACCELERATE_USE_DEEPSPEED"] == "true"


def test_whether_hf_cwd_is_enabled(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert doctor.optimizers([])["hf-cwd enable"] == "not active"
    startup = tmp_path / f"{enable.MODULE}.pth"
    startup.touch()
    assert doctor.optimizers([])["hf-cwd enable"] == f"active, by {startup}"


def test_a_directory_that_pip_knows_nothing_of(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])  # where no package's metadata is
    problems = []
    report = doctor.versions(problems)
    assert report["hf_cwd"].endswith("not installed by pip: which versions of others it supports is not known")
    assert report["torch"].startswith(torch.__version__)
    assert problems == []
