"""What a model can be trained for, and what goes with it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

TaskName = Literal["classification", "multi-label", "token-classification", "causal-lm"]


@dataclass(frozen=True)
class Task:
    """A kind of training.

    Attributes:
        model: transformers' class that loads the model.
        peft: PEFT's name of the kind.
        pipeline: transformers' pipeline for the trained model, and the hub's name of the kind.
        classes: Whether the logits are of classes, from a linear head that is trained with the adapter.
        pooled: Whether that head reads one vector of a text, not one of each token.
        several: Whether a text may have several classes, or none.
    """

    model: str
    peft: str
    pipeline: str
    classes: bool = True
    pooled: bool = True
    several: bool = False


TASKS: Mapping[TaskName, Task] = {
    "classification": Task("AutoModelForSequenceClassification", "SEQ_CLS", "text-classification"),
    "multi-label": Task("AutoModelForSequenceClassification", "SEQ_CLS", "text-classification", several=True),
    "token-classification": Task("AutoModelForTokenClassification", "TOKEN_CLS", "token-classification", pooled=False),
    "causal-lm": Task("AutoModelForCausalLM", "CAUSAL_LM", "text-generation", classes=False, pooled=False),
}
