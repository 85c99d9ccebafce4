import re
import runpy
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
KERNEL = runpy.run_path(str(ROOT / "hf_cwd/kernels/build.py"))  # by its path: importing hf_cwd needs torch
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "hf_cwd/__init__.py").read_text(), re.MULTILINE)[1]


class BuildKernel(build_ext):
    """The C kernel, built as it would be on first use. It is optional: without a compiler the rest is installed."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            KERNEL["build"](target, KERNEL["compiler"]())
        except KERNEL["BuildError"] as error:
            raise CompileError(f"{error}. It is built on first use, if it can be then") from None

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_name(KERNEL["name"]()))


setup(
    name="hf_cwd",
    version=VERSION,
    description="Cautious Weight Decay for the Hugging Face Trainer: --optim cwd_adamw | cwd_lion | cwd_muon | cwd_sgd",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    author="The hf_cwd maintainers",
    license="Apache-2.0",
    keywords=["optimizer", "weight decay", "cautious weight decay", "AdamW", "Lion", "Muon", "transformers", "PyTorch"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: C",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    project_urls={"Paper": "https://arxiv.org/abs/2510.12402"},
    python_requires=">=3.11",
    packages=find_packages(include=["hf_cwd", "hf_cwd.*"]),
    package_data={
        "hf_cwd": ["inherited/*.py", "py.typed"],
        "hf_cwd.kernels": ["*.c", "*.h"],
        "hf_cwd.report": ["*.css"],
    },
    ext_modules=[Extension("hf_cwd.kernels.cwd", ["hf_cwd/kernels/cwd.c"], optional=True)],
    cmdclass={"build_ext": BuildKernel},
    install_requires=["torch>=2.11", "transformers>=5.2", "accelerate>=1.1", "xxhash>=3"],
    extras_require={
        "deepspeed": ["deepspeed>=0.19"],
        "dev": ["pre-commit"],
        "report": ["matplotlib"],
        "scripts": ["datasets", "evaluate", "matplotlib", "peft", "pillow", "tokenizers", "trl"],
        "test": [
            "deepspeed",
            "expecttest",
            "gguf",
            "mypy",
            "numpy",
            "optuna",
            "pytest",
            "pytest-xdist",
            "ruff",
            "scikit-learn",
            "triton; platform_system == 'Linux'",
        ],
    },
    entry_points={"console_scripts": ["hf-cwd = hf_cwd.cli:main"]},
)
