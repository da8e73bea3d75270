"""What a model can be trained for, and what goes with it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

TaskName = Literal["classification", "multi-label", "token-classification", "regression", "causal-lm"]

MOST_NUMBER = 1e18
"""The largest number that a model can be trained to predict: the square of its error has to be finite in float32."""


@dataclass(frozen=True)
class Task:
    """A kind of training.

    Attributes:
        model: transformers' class that loads the model.
        peft: PEFT's name of the kind.
        pipeline: transformers' pipeline for the trained model, and the hub's name of the kind.
        head: Whether the logits come from a linear head that is trained with the adapter.
        pooled: Whether that head reads one vector of a text, not one of each token.
        problem: transformers' name of what the logits are, where that is not one class of several.
    """

    model: str
    peft: str
    pipeline: str
    head: bool = True
    pooled: bool = True
    problem: str = ""

    @property
    def several(self) -> bool:
        """Whether a text may have several classes, or none."""
        return self.problem == "multi_label_classification"

    @property
    def number(self) -> bool:
        """Whether the only logit is a number to be predicted."""
        return self.problem == "regression"


TASKS: Mapping[TaskName, Task] = {
    "classification": Task("AutoModelForSequenceClassification", "SEQ_CLS", "text-classification"),
    "multi-label": Task(
        "AutoModelForSequenceClassification", "SEQ_CLS", "text-classification", problem="multi_label_classification"
    ),
    "token-classification": Task("AutoModelForTokenClassification", "TOKEN_CLS", "token-classification", pooled=False),
    "regression": Task("AutoModelForSequenceClassification", "SEQ_CLS", "text-classification", problem="regression"),
    "causal-lm": Task("AutoModelForCausalLM", "CAUSAL_LM", "text-generation", head=False, pooled=False),
}
