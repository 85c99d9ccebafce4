"""What the logged numbers are: in words, in which unit, and over which part of the model."""

from collections.abc import Iterable
from typing import NamedTuple

from hf_cwd.report.numbers import COUNT, LOSS, PERCENT, PLAIN, SHARE, Kind

CWD = "cwd/"
STEP = "cwd/step"  # the step that the other cwd/ values of an entry are of, where it is not the entry's own
FRACTION = "cwd/decayed_fraction"
SPEEDS = ("_per_second", "_runtime")
RULES = {"adamw": "AdamW", "lion": "Lion", "muon": "Muon", "sgd": "SGD"}


class Measure(NamedTuple):
    """One kind of number that the Trainer logs.

    `about` is a line on what it means. `noisy` values are smoothed in charts. `spans` are those whose axis may be
    logarithmic; what is `scaled` by the learning rate ends at 0 where that does, and has an axis of two decades only.
    `final`: a table has the mean over the "run" or over its last "tenth", or the "last" value.
    """

    title: str
    unit: str
    kind: Kind = PLAIN
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
        "Skipped steps", "steps so far", COUNT, "Steps left out because gradients were not finite.",
        noisy=False, spans=False, final="last",
    ),
}  # fmt: skip
# Under cwd/ for all parameters; with cwd_log=groups also for each rule and each parameter group.
OF_STEPS = {
    "decayed_fraction": Measure(
        "Decayed fraction", "elements decayed", PERCENT,
        "Share of the elements with a weight decay that a logged step decays. Plain decay decays all of them.",
        final="run",
    ),
    "effective_decay": Measure(
        "Effective decay", "of the norm, a step", SHARE,
        "Share of the weights' norm that one step's decay takes. Plain decay takes learning rate times weight decay.",
        noisy=False, scaled=True, final="run",
    ),
    "update_to_weight": Measure(
        "Update-to-weight ratio", "norm of update / norm of weights", PLAIN,
        "How far one step moves the weights: the update with its learning rate, without decay.",
        noisy=False, scaled=True, final="run",
    ),
    "update_rms": Measure(
        "Update RMS", "root mean square", PLAIN, "Size of an element of the update, before the learning rate.",
    ),
    "weight_rms": Measure(
        "Weight RMS", "root mean square", PLAIN, "Size of an element of the weights.", noisy=False,
    ),
    "orthogonality_error": Measure(
        "Orthogonality error", "RMS of (singular value)² - 1", PLAIN,
        "Of one orthogonalised update, another matrix each time. 0 if all singular values are 1, which a few steps of "
        "Newton-Schulz do not reach.", final="run",
    ),
}  # fmt: skip


def part_of(key: str) -> str:
    """The rule or parameter group that a key is of; empty where it is of all.

    >>> part_of("cwd/muon/update_rms"), part_of("cwd/update_rms"), part_of("loss")
    ('muon', '', '')
    """
    names = key.split("/")
    return names[1] if key.startswith(CWD) and len(names) == 3 else ""


def in_order(keys: Iterable[str]) -> list[str]:
    """Those under cwd/ and of all parameters, but for the number of the step; known ones first."""
    known = [CWD + name for name in OF_STEPS]
    own = [key for key in keys if key.startswith(CWD) and not part_of(key) and key != STEP]
    return [key for key in known if key in own] + [key for key in own if key not in known]


def measure_of(key: str) -> Measure:
    """What the values under `key` are; for a key that nobody knows, what its name says.

    >>> measure_of("cwd/muon/update_rms").title, measure_of("eval_token_accuracy").title, measure_of("my_metric").title
    ('Update RMS', 'Evaluation token accuracy', 'My metric')
    """
    last = key.rsplit("/", 1)[-1]
    if key in KNOWN:
        return KNOWN[key]
    if key.startswith(CWD) and last in OF_STEPS:
        return OF_STEPS[last]
    kind = LOSS if key.endswith("_loss") else PERCENT if key.endswith(("_fraction", "accuracy")) else PLAIN
    for prefix, name in (("eval_", "Evaluation "), (CWD, "CWD: ")):
        if key.startswith(prefix) and len(key) > len(prefix):
            words = key.removeprefix(prefix).replace("_", " ")
            return Measure(name + words, words, kind, noisy=prefix == CWD)
    rate = "learning_rate" in key or "decay" in key
    words = key.replace("_", " ")
    return Measure(words[:1].upper() + words[1:], words or "value", kind, noisy=not rate, spans=not rate)


def is_evaluation(key: str) -> bool:
    """Whether `key` is a figure of an evaluation, not of how long it took."""
    return key.startswith("eval_") and not key.endswith(SPEEDS) and key != "eval_model_preparation_time"


def part_in_words(part: str) -> str:
    """
    >>> part_in_words("muon"), part_in_words("group_1")
    ('Muon', 'Parameter group 1')
    """
    return RULES.get(part) or part.replace("group_", "Parameter group ")
