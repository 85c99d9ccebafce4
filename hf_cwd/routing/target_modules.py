"""The modules to which Muon is restricted, as the Trainer's ``--optim_target_modules`` names them."""

import json
import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from hf_cwd.routing.classify import Classification, Place, as_named

OUTSIDE = "not in target_modules"


class TargetModules:
    """Parses ``target_modules`` as transformers does for its own optimizers."""

    def __init__(self, wanted: str | Sequence[str]) -> None:
        if isinstance(wanted, str) and wanted.lstrip().startswith("["):
            wanted = _from_json(wanted)
        self._all_linear = isinstance(wanted, str) and wanted.replace("_", "-") == "all-linear"
        self._whole = isinstance(wanted, str)
        entries = [wanted] if self._whole else wanted
        if (
            not isinstance(entries, list | tuple | set)
            or not entries
            or not all(isinstance(e, str) and e for e in entries)
        ):
            raise ValueError(
                f"target_modules {wanted!r} names no modules: give a regular expression, a list of names or all-linear"
            )
        self._entries = list(entries)
        self._used: dict[str, bool] = dict.fromkeys(self._entries, False)
        self._refused: dict[str, str] = {}
        for entry in self._entries:
            try:
                re.compile(entry)
            except re.error as error:
                raise ValueError(f"target_modules {entry!r} is not a regular expression: {error}") from None

    def restrict(self, parameter: Classification, p: Tensor, places: list[Place]) -> Classification:
        """Treats parameters outside of the named modules as no matrices, and unknown ones inside as matrices."""
        entries = [entry for entry in self._entries if any(self._names(entry, place) for place in places)]
        if parameter.is_matrix is None:
            parameter = as_named(p) if entries else Classification(False, f"{OUTSIDE} ({parameter.reason})")
        for entry in entries:
            if parameter.is_matrix:
                self._used[entry] = True
            else:
                self._refused.setdefault(entry, f"{places[0].parameter} is: {parameter.reason}")
        if parameter.is_matrix and not entries:
            return Classification(False, OUTSIDE)
        return parameter

    def _names(self, entry: str, place: Place) -> bool:
        if self._all_linear:
            return isinstance(place.module, nn.Linear) or type(place.module).__name__ == "Conv1D"
        for name in (place.path, place.parameter):
            if re.fullmatch(entry, name) or (not self._whole and entry in name):
                return True
        return False

    def check(self, matrices: str) -> None:
        """Raises ValueError for an entry that names no matrix."""
        for entry, used in self._used.items():
            if not used:
                why = self._refused.get(entry, "no module has such a name")
                raise ValueError(f"target_modules {entry!r} names no matrix that {matrices} could take: {why}")


def _from_json(text: str) -> Any:
    """Parses a JSON list. A regular expression that begins with a bracket is returned as text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        # Names of modules have no quotes, and no commas outside of a quantifier: text with them is meant as a list.
        if re.search("[\"',]", re.sub(r"\{\d*,\d*\}", "", text)):
            raise ValueError(
                f"target_modules {text!r} begins like a JSON list, but is not valid JSON: {error}. Write it as "
                """'["q_proj", "v_proj"]', in quotes that keep the shell from reading it"""
            ) from None
        return text
