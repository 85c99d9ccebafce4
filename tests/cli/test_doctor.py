"""``hf-cwd doctor``: the command in a whole environment and in a broken one, and each thing it must notice."""

import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
import sysconfig
import time

import pytest
import torch
import transformers
from torch.utils import cpp_extension
from torch.utils.file_baton import FileBaton

from hf_cwd import decay, kernels
from hf_cwd.cli import doctor, enable, self_check
from hf_cwd.distributed import deepspeed_zero
from hf_cwd.rules import RULES, Rule
from hf_cwd.trainer import registration


def run(folder, *flags, **environment):
    """The command in a process of its own, started in ``folder``, where it must write nothing."""
    folder.mkdir()
    return subprocess.run(
        [sys.executable, "-c", "import sys; from hf_cwd.cli import main; sys.exit(main())", "doctor", *flags],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_whole_environment(tmp_path):
    operations = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "operations")}
    done = run(tmp_path / "here", HF_TOKEN="secret", ACCELERATE_MIXED_PRECISION="no", **operations)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    for line in (
        "  ACCELERATE_MIXED_PRECISION: no",
        f"  python: {sys.version.split()[0]}, {sys.executable}",
        f"  transformers: {transformers.__version__}",
        "  auto on cpu: hf_cwd.kernels.c",
        f"  gloo: {'yes' if torch.distributed.is_gloo_available() else 'no'}",
        "  --optim cwd_muon: registered, rule muon",
        f"  compiled operations: {tmp_path}/operations",
        "  deepspeed_shm_comm: will be compiled at the first start, which takes about a minute",
    ):
        assert line in lines
    assert f"  torch: {torch.__version__}, built for " in done.stdout
    assert "threads, OMP_NUM_THREADS 1\n" in done.stdout
    assert f"auto on cpu: {'; '.join(f'{rule} ok' for rule in RULES)}\n" in done.stdout
    assert lines[-2:] == ["Problems:", "  none"]
    assert "secret" not in done.stdout
    assert list((tmp_path / "here").iterdir()) == []
    assert not (tmp_path / "operations").exists()


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
    assert report["DeepSpeed"] == {"deepspeed": f"broken: SystemExit: no compiler; tested: {deepspeed_zero.TESTED}"}
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
    registration.unregister()
    try:
        report = doctor.optimizers(problems)
    finally:
        registration.register()
    assert report["--optim cwd_lion"] == "LookupError: not registered"
    assert problems == [f"--optim {name}: LookupError: not registered" for name in registration.names()]
    handlers = sys.modules["transformers.trainer_optimizer"]._OPTIMIZER_HANDLERS
    ours = handlers.pop(transformers.training_args.OptimizerNames("cwd_lion"))
    try:
        assert doctor.optimizers([])["--optim cwd_lion"] == "LookupError: its handler is not hf_cwd's"
    finally:
        handlers[transformers.training_args.OptimizerNames("cwd_lion")] = ours


def test_variables_that_make_us_refuse(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    problems = []
    assert "needs whole matrices" in doctor.optimizers(problems)["--optim cwd_muon"]
    assert len(problems) == len(RULES)
    assert doctor.environment([])["ACCELERATE_USE_FSDP"] == "true"


@pytest.fixture
def operations(tmp_path, monkeypatch):
    """The folder where DeepSpeed would compile what its ranks communicate with."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    folder = tmp_path / "extensions" / doctor.OPERATION
    folder.mkdir(parents=True)
    return folder


def test_deepspeed_and_what_it_has_compiled(operations):
    problems = []
    assert doctor.deepspeed(problems) == {
        "deepspeed": f"{importlib.metadata.version('deepspeed')}, tested",
        "compiled operations": str(operations.parent),
        "compiler and ninja": "found",
        "deepspeed_shm_comm": "will be compiled at the first start, which takes about a minute",
    }
    (operations / "deepspeed_shm_comm.so").touch()
    assert doctor.deepspeed(problems)["deepspeed_shm_comm"] == "compiled"
    assert problems == []


def test_where_deepspeed_compiles(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    told = doctor.deepspeed([])["compiled operations"]
    assert list(tmp_path.iterdir()) == []
    assert cpp_extension._get_build_directory(doctor.OPERATION, verbose=False) == f"{told}/{doctor.OPERATION}"


def test_a_lock_that_nobody_holds(operations):
    (operations / "deepspeed_shm_comm.so").touch()
    lock = operations / "lock"
    assert FileBaton(str(lock)).try_acquire()
    problems = []
    assert doctor.deepspeed(problems)["deepspeed_shm_comm"].startswith("being compiled by another process since ")
    assert problems == []
    os.utime(lock, (time.time() - 16 * 60,) * 2)
    assert doctor.deepspeed(problems)["deepspeed_shm_comm"] == "locked since 16 minutes"
    (problem,) = problems
    assert f"has left {lock}, and every start of DeepSpeed waits" in problem
    assert not FileBaton(str(lock)).try_acquire()  # which waits, then, until the file is gone


@pytest.mark.parametrize(
    ("there", "missing", "fix"),
    [
        ([], "a C++ compiler (no-such-compiler) and ninja", "apt install g++, pip install ninja"),
        (["ninja"], "a C++ compiler (no-such-compiler)", "apt install g++"),
        (["no-such-compiler"], "ninja", "pip install ninja"),
    ],
)
def test_tools_that_deepspeed_lacks(there, missing, fix, operations, tmp_path, monkeypatch):
    for name in there:
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", str(tmp_path))
    problems = []
    assert doctor.deepspeed(problems)["compiler and ninja"] == f"missing: {missing}"
    (problem,) = problems
    assert problem.endswith(f"DeepSpeed must compile its communication, and {missing} is missing; try: {fix}")


def test_with_an_accelerator_deepspeed_compiles_nothing_at_its_start(operations, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setenv("PATH", "")
    (operations / "lock").touch()
    os.utime(operations / "lock", (0, 0))
    problems = []
    report = doctor.deepspeed(problems)
    assert report["compiler and ninja"] == report["deepspeed_shm_comm"] == "not needed with an accelerator"
    assert problems == []


def test_deepspeed_that_is_absent_or_untried(operations, monkeypatch):
    problems = []
    monkeypatch.setattr(deepspeed_zero, "TESTED", "0.1.2 to 0.3.4")
    assert doctor.deepspeed(problems)["deepspeed"].endswith(", not tried with hf_cwd: tests run with 0.1.2 to 0.3.4")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setenv("PATH", "")
    assert doctor.deepspeed(problems) == {"deepspeed": "not installed; tested: 0.1.2 to 0.3.4"}
    assert problems == []


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
    assert report["hf_cwd"].endswith("not installed by pip: which versions of other packages it supports is not known")
    assert report["torch"].startswith(torch.__version__)
    assert problems == []
