"""The scopes of logged numbers: each rule and each parameter group, logged with ``cwd_log=groups``."""

from collections.abc import Iterable, Mapping, Sequence

from hf_cwd.report.measures import CWD, OF_STEPS, RULES, scope_of
from hf_cwd.report.series import Series


def of_scope(logged: Mapping[str, Series], scope: str) -> dict[str, Series]:
    """The series of one scope, by measure; an empty `scope` means all parameters."""
    start = f"{CWD}{scope}/" if scope else CWD
    return {key.removeprefix(start): s for key, s in logged.items() if key.startswith(start) and scope_of(key) == scope}


def scopes(keys: Iterable[str]) -> list[str]:
    """The scopes of some keys: rules first, then parameter groups by number."""
    unique = {scope for scope in map(scope_of, keys) if scope}
    return sorted(unique, key=lambda scope: (scope not in RULES, len(scope), scope))


def measures(keys: Sequence[str]) -> list[str]:
    """The names of the measures that were logged for any scope, in the order of the page."""
    names = dict.fromkeys(key.rsplit("/", 1)[-1] for key in keys if scope_of(key))
    return sorted(names, key=lambda name: list(OF_STEPS).index(name) if name in OF_STEPS else len(OF_STEPS))


def without_repetitions(logged: Mapping[str, Series]) -> dict[str, Series]:
    """Removes scopes with the same series as another one.

    For example, a rule that has all parameters, or a group that has all parameters of a rule.
    """
    kept = dict(logged)
    whole = of_scope(logged, "")
    seen = [{key: series for key, series in whole.items() if key in OF_STEPS}]
    for scope in scopes(logged):
        own = of_scope(logged, scope)
        if any(own == {key: one.get(key) for key in own} for one in seen):
            for key in own:
                del kept[f"{CWD}{scope}/{key}"]
        else:
            seen.append(own)
    return kept
