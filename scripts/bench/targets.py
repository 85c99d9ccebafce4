"""The goals of hf_cwd's kernels, and whether a run of bench/step.py shows that they hold."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from bench.candidates import ELEMENTWISE, MATRIX
from bench.stats import Interval, median_interval, paired, verdict

MEGABYTES = 16  # that a step may need above parameters, gradients and states
HOST = 1e-3  # seconds that a step of up to 300 tensors may take of its host
RATE = 0.9  # of the measured rate of a copy


class Ratio(NamedTuple):
    """Step time of a candidate over that of another one, at most; ``most`` and ``least`` bound the runs it is about."""

    candidate: str
    other: str
    limit: float
    device: str = "cpu"
    family: str = ELEMENTWISE
    least_aspect: float = 0.0
    largest_aspect: float = float("inf")


RATIOS = (
    Ratio("cwd_adamw", "torch_adamw_fused", 1.00),
    Ratio("cwd_adamw", "deepspeed_adam", 1.03),
    Ratio("cwd_lion", "torch_adamw_fused", 0.75),
    Ratio("cwd_lion", "deepspeed_lion", 1.03),
    Ratio("cwd_adamw", "cwd_adamw_off", 1.01),
    Ratio("cwd_lion", "cwd_lion_off", 1.01),
    *(
        Ratio(f"cwd_{rule}_logged", f"cwd_{rule}", 1.05, device=device)
        for rule in ("adamw", "lion")
        for device in ("cpu", "cuda")
    ),
    *(Ratio("cwd_muon_logged", "cwd_muon_bf16", 1.05, device=device, family=MATRIX) for device in ("cpu", "cuda")),
    Ratio("cwd_adamw_eager", "torch_adamw_fused", 3.00),
    Ratio("cwd_muon_bf16", "torch_muon", 1.02, family=MATRIX, largest_aspect=1.0),
    Ratio("cwd_muon_bf16", "torch_muon", 0.70, family=MATRIX, least_aspect=4.0),
    Ratio("cwd_muon_bf16", "torch_muon", 0.50, family=MATRIX, device="cuda"),
)
SMALL = ("cwd_adamw", "cwd_lion", "cwd_sgd", "cwd_adamw_eager")
AT_COPY_RATE = ("cwd_adamw", "cwd_lion")


class Goal(NamedTuple):
    """A goal beside what was measured; ``measured`` None: it was not."""

    text: str
    measured: Interval | None
    limit: float
    verdict: str

    def __str__(self) -> str:
        found = "not measured" if self.measured is None else str(self.measured)
        if self.measured is not None and self.measured.low == self.measured.high:
            found = f"{self.measured.median:.3g}"
        return f"{self.text} <= {self.limit:.3g}: {found}: {self.verdict}"


def goals(run: Mapping[str, Any]) -> list[Goal]:
    """Those that this run is about; ``run`` is one entry of bench/step.py's JSON."""
    found, trusted, rows = [], run["same"]["conclusive"], run["candidates"]
    for ratio in RATIOS:
        if (ratio.device, ratio.family) != (run["device"], run["family"]):
            continue
        if run["family"] == MATRIX and not (
            ratio.least_aspect <= run["least_aspect"] and run["largest_aspect"] <= ratio.largest_aspect
        ):
            continue
        text = f"{ratio.candidate} / {ratio.other}"
        measured = None
        if ratio.candidate in rows and ratio.other in rows:
            measured = paired(rows[ratio.candidate]["seconds"], rows[ratio.other]["seconds"])
        found.append(_goal(text, measured, ratio.limit, trusted))
    if run["family"] == MATRIX:
        return found
    for name in SMALL:
        extra = rows.get(name, {}).get("extra_bytes")
        measured = None if extra is None else Interval(*[extra / 1e6] * 3, 1.0, 3)
        found.append(_goal(f"{name} MB above parameters, gradients, states", measured, MEGABYTES, True))
    if run["device"] == "cuda":
        for name in AT_COPY_RATE:
            measured = None
            if name in rows and "copy" in rows:  # times for as many bytes
                factor = rows["copy"]["bytes"] / rows[name]["bytes"]
                measured = paired(rows[name]["seconds"], rows["copy"]["seconds"], factor)
            found.append(_goal(f"{name} / copy of as many bytes", measured, 1 / RATE, trusted))
            host = rows.get(name, {}).get("host_seconds")
            measured = median_interval([1e3 * value for value in host]) if host else None
            found.append(_goal(f"{name} ms of the host, {run['tensors']} tensors", measured, HOST * 1e3, True))
    return found


def _goal(text: str, measured: Interval | None, limit: float, trusted: bool) -> Goal:
    return Goal(text, measured, limit, "-" if measured is None else verdict(measured, limit, trusted))
