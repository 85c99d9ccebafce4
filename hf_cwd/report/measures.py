"""Descriptions of the logged numbers: title, unit, format, and scope (a rule, a parameter group, or all)."""

from collections.abc import Iterable
from typing import NamedTuple

from hf_cwd.report.numbers import COUNT, LOSS, PERCENT, PLAIN, SHARE, NumberFormat

CWD = "cwd/"
STEP = "cwd/step"  # the step of an entry's cwd/ values, if it differs from the entry's own step
FRACTION = "cwd/decayed_fraction"
SPEEDS = ("_per_second", "_runtime")
RULES = {"adamw": "AdamW", "lion": "Lion", "muon": "Muon", "sgd": "SGD"}


class Measure(NamedTuple):
    """A number that the Trainer logs.

    Attributes:
        about: one line that explains it.
        noisy: whether charts smooth it.
        spans: whether its axis may be logarithmic.
        scaled: whether the learning rate is a factor of it. It may then end at 0, and its axis shows two decades only.
        final: what tables show: the mean over the "run" or over its last "tenth", or the "last" value.
    """

    title: str
    unit: str
    format: NumberFormat = PLAIN
    about: str = ""
    noisy: bool = True
    spans: bool = True
    scaled: bool = False
    final: str = "tenth"


KNOWN = {
    "loss": Measure("Training loss", "loss", LOSS, "Thin: as logged. Thick: smoothed."),
    "grad_norm": Measure("Gradient norm", "L2 norm", about="Of all gradients, before clipping."),
    "learning_rate": Measure(
        "Learning rate", "learning rate", about="Of the first parameter group.", noisy=False, spans=False
    ),
    "num_input_tokens_seen": Measure("Input tokens seen", "tokens", noisy=False, spans=False),
    "cwd/skipped_steps": Measure(
        "Skipped steps",
        "steps so far",
        COUNT,
        "Steps left out because gradients were not finite.",
        noisy=False,
        spans=False,
        final="last",
    ),
}
# Logged as cwd/<name> for all parameters, with cwd_log=groups also for each rule and each parameter group.
OF_STEPS = {
    "decayed_fraction": Measure(
        "Decayed fraction",
        "elements decayed",
        PERCENT,
        "Share of the elements with a weight decay that a logged step decays. Plain decay decays all of them.",
        final="run",
    ),
    "effective_decay": Measure(
        "Effective decay",
        "of the norm, a step",
        SHARE,
        "Share of the weights' norm that one step's decay takes. Plain decay takes learning rate times weight decay.",
        noisy=False,
        scaled=True,
        final="run",
    ),
    "update_to_weight": Measure(
        "Update-to-weight ratio",
        "norm of update / norm of weights",
        PLAIN,
        "How far one step moves the weights: the update with its learning rate, without decay.",
        noisy=False,
        scaled=True,
        final="run",
    ),
    "update_rms": Measure(
        "Update RMS", "root mean square", PLAIN, "Size of an element of the update, before the learning rate."
    ),
    "weight_rms": Measure("Weight RMS", "root mean square", PLAIN, "Size of an element of the weights.", noisy=False),
    "orthogonality_error": Measure(
        "Orthogonality error",
        "RMS of (singular value)² - 1",
        PLAIN,
        "Of one orthogonalised update, another matrix each time. 0 if all singular values are 1, which a few steps of "
        "Newton-Schulz do not reach.",
        final="run",
    ),
}


def scope_of(key: str) -> str:
    """The rule or parameter group of a key; empty if the key covers all parameters.

    >>> scope_of("cwd/muon/update_rms"), scope_of("cwd/update_rms"), scope_of("loss")
    ('muon', '', '')
    """
    names = key.split("/")
    return names[1] if key.startswith(CWD) and len(names) == 3 else ""


def in_order(keys: Iterable[str]) -> list[str]:
    """The keys under cwd/ for all parameters, except the step's number. Those of this package come first."""
    ours = [CWD + name for name in OF_STEPS]
    logged = [key for key in keys if key.startswith(CWD) and not scope_of(key) and key != STEP]
    return [key for key in ours if key in logged] + [key for key in logged if key not in ours]


def measure_of(key: str) -> Measure:
    """The measure of the values under `key`. For an unknown key it is derived from the name.

    >>> measure_of("cwd/muon/update_rms").title, measure_of("eval_token_accuracy").title, measure_of("my_metric").title
    ('Update RMS', 'Evaluation token accuracy', 'My metric')
    """
    last = key.rsplit("/", 1)[-1]
    if key in KNOWN:
        return KNOWN[key]
    if key.startswith(CWD) and last in OF_STEPS:
        return OF_STEPS[last]
    number_format = LOSS if key.endswith("_loss") else PERCENT if key.endswith(("_fraction", "accuracy")) else PLAIN
    for prefix, name in (("eval_", "Evaluation "), (CWD, "CWD: ")):
        if key.startswith(prefix) and len(key) > len(prefix):
            words = key.removeprefix(prefix).replace("_", " ")
            return Measure(name + words, words, number_format, noisy=prefix == CWD)
    rate = "learning_rate" in key or "decay" in key
    words = key.replace("_", " ")
    return Measure(words[:1].upper() + words[1:], words or "value", number_format, noisy=not rate, spans=not rate)


def is_evaluation(key: str) -> bool:
    """Whether `key` is a result of an evaluation, not its duration."""
    return key.startswith("eval_") and not key.endswith(SPEEDS) and key != "eval_model_preparation_time"


def scope_in_words(scope: str) -> str:
    """
    >>> scope_in_words("muon"), scope_in_words("group_1")
    ('Muon', 'Parameter group 1')
    """
    return RULES.get(scope) or scope.replace("group_", "Parameter group ")
