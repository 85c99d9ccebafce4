"""Token accuracy as an `evaluate` metric: a local module, because `evaluate.load("accuracy")` needs the hub."""

# One import a line: `evaluate` reads these lines to check the module's dependencies.
import datasets
import evaluate


class TokenAccuracy(evaluate.Metric):
    """The share of predicted tokens that equal the reference; references of -100 are left out."""

    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description=__doc__, citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        counted = [(p, r) for p, r in zip(predictions, references, strict=True) if r != -100]
        return {"token_accuracy": sum(p == r for p, r in counted) / len(counted) if counted else float("nan")}
