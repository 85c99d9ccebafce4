"""Numbers of the parts of a model: of each rule and each parameter group, which ``cwd_log=groups`` has logged."""

from collections.abc import Iterable, Mapping, Sequence

from hf_cwd.report.measures import CWD, OF_STEPS, RULES, part_of
from hf_cwd.report.series import Series


def of_part(logged: Mapping[str, Series], part: str) -> dict[str, Series]:
    """The series of one part, by their measures; of all parameters for an empty `part`."""
    start = f"{CWD}{part}/" if part else CWD
    return {key.removeprefix(start): s for key, s in logged.items() if key.startswith(start) and part_of(key) == part}


def parts(keys: Iterable[str]) -> list[str]:
    """The parts that keys name: rules first, then parameter groups by their numbers."""
    found = {part for part in map(part_of, keys) if part}
    return sorted(found, key=lambda part: (part not in RULES, len(part), part))


def measures(keys: Sequence[str]) -> list[str]:
    """What was logged of any part, in the order of the page."""
    found = dict.fromkeys(key.rsplit("/", 1)[-1] for key in keys if part_of(key))
    return sorted(found, key=lambda name: list(OF_STEPS).index(name) if name in OF_STEPS else len(OF_STEPS))


def without_repetitions(logged: Mapping[str, Series]) -> dict[str, Series]:
    """`logged` without parts that are another one over again.

    A rule with all parameters is the whole, and a parameter group with all of a rule's is the rule.
    """
    kept = dict(logged)
    whole = of_part(logged, "")
    seen = [{key: series for key, series in whole.items() if key in OF_STEPS}]
    for part in parts(logged):
        own = of_part(logged, part)
        if any(own == {key: one.get(key) for key in own} for one in seen):
            for key in own:
                del kept[f"{CWD}{part}/{key}"]
        else:
            seen.append(own)
    return kept
