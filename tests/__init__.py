"""Tests, which find the rooms of scripts/ (common, bench, dev) as the scripts themselves do."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
