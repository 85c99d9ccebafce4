"""The examples of README.md, as a reader pastes them."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEREDOC = re.compile(r"(\S.*) <<'EOF'\n(.*?)^EOF$", re.DOTALL | re.MULTILINE)


def blocks(section: str) -> list[str]:
    """The section's blocks of bash."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (body,) = re.findall(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    return re.findall(r"^```bash\n(.*?)^```", body, re.DOTALL | re.MULTILINE)


def commands(section: str) -> list[list[str]]:
    """The section's commands, each as its words; comments and heredocs are left out."""
    lines = "\n".join(HEREDOC.sub("", block) for block in blocks(section)).replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def command(section: str, *, having: str) -> list[str]:
    """The one command of the section that has this word."""
    (found,) = (words for words in commands(section) if having in words)
    return found


def heredoc(section: str) -> tuple[list[str], str]:
    """The command of the section that reads a program, and the program."""
    (found,) = (match.groups() for block in blocks(section) for match in HEREDOC.finditer(block))
    return shlex.split(found[0]), found[1]
