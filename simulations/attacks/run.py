"""One federation under attack, as a run of a grid."""

from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel

from bora_fl.config import Scalar, parse
from bora_fl.data import load_dataset, test_data
from bora_fl.evaluate import evaluate
from bora_fl.models import load_base, load_tokenizer, settled
from bora_fl.paths import delete
from bora_fl.report import read_rows
from bora_fl.simulations import grid
from bora_fl.simulations.attacks.clients import ATTACKS, attacked, triggered
from bora_fl.simulations.engine import simulate


@dataclass(frozen=True)
class AttackRun(grid.Run):
    """An attack, a defence, a seed.

    Its result: ``accuracy`` on the test set, ``backdoor`` (share of the test examples of other classes that the trigger
    turns into the target class; None where it means nothing), ``rejected`` replies.
    """

    attack: str
    defence: str
    seed: int
    clients: int
    attackers: int
    config: dict[str, Scalar]
    root: Path

    @property
    def name(self) -> str:
        """Attack, defence, seed."""
        return f"{self.attack}-{self.defence}-{self.seed}"

    @property
    def identity(self) -> dict[str, object]:
        """Everything but the folder."""
        own = {"attack": self.attack, "seed": self.seed, "clients": self.clients, "attackers": self.attackers}
        return own | {"config": self.config}

    def work(self) -> grid.Result:
        """Run the federation; checkpoints and the adapter go."""
        config = self.config | {"run.seed": self.seed, "run.output-dir": str(self.folder)}
        app = attacked(ATTACKS[self.attack], frozenset(range(self.attackers)))
        rows = read_rows(simulate(config, self.clients, app=app) / "metrics.jsonl")
        backdoor = _backdoor_success(config, self.folder) if self.attack in ("none", "backdoor") else None
        for name in ("checkpoints", "adapter"):
            delete(self.folder / name)
        rejected = sum(int(str(row["rejected"])) for row in rows)
        return {"accuracy": rows[-1]["accuracy"], "backdoor": backdoor, "rejected": rejected}

    def line(self, result: grid.Result) -> str:
        """The accuracy."""
        return f"{result['accuracy']:.3f}"

    def __str__(self) -> str:
        return f"{self.attack} against {self.defence}, seed {self.seed}"


def _backdoor_success(config: dict[str, Scalar], folder: Path) -> float:
    settings = settled(parse(config))
    test = test_data(settings.data, settings.model, load_tokenizer(settings.model))
    assert test is not None
    base = load_base(settings.model, load_dataset(settings.data).label_names, settings.run.seed)
    model = PeftModel.from_pretrained(base, str(folder / "adapter"))
    return evaluate(model, triggered(test), settings.train.evaluation_batch_size).accuracy
