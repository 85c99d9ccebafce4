import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "hf_cwd/__init__.py").read_text(), re.MULTILINE)[1]

setup(
    name="hf_cwd",
    version=VERSION,
    description="Cautious Weight Decay for the Hugging Face Trainer: --optim cwd_adamw | cwd_lion | cwd_muon",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["hf_cwd", "hf_cwd.*"]),
    install_requires=["torch>=2.11", "transformers>=5.2", "accelerate>=1.1"],
    extras_require={
        "scripts": ["datasets", "evaluate", "matplotlib", "peft", "pillow", "tokenizers", "trl"],
        "test": ["deepspeed", "gguf", "numpy", "pytest", "ruff", "scikit-learn"],
    },
    entry_points={"console_scripts": ["hf-cwd = hf_cwd.cli:main"]},
)
