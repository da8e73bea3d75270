"""The rounds of one run of a comparison."""

from dataclasses import dataclass

from bora_fl.report import read_rows
from bora_fl.simulations.compare.intervals import spread
from bora_fl.simulations.compare.plan import CompareRun


@dataclass(frozen=True)
class Row:
    """One round of one run; bytes and seconds add up from the first round on.

    Attributes:
        scenario: Name of the scenario.
        method: Adapter method.
        strategy: Name of the strategy.
        seed: Run seed.
        round: From 1; 0 is what training starts from.
        accuracy: Of the server's model on the central test set; None without one, in rounds without evaluation, and for
            strategies whose result lies with the clients.
        loss: Likewise.
        train_loss: Mean over clients of the loss while training.
        client_accuracy: Mean over clients, by examples, on what each held out, after the merge.
        client_accuracy_min: The worst client's.
        client_accuracy_sd: Standard deviation over clients.
        merge_error: ‖what clients receive next - mean of their products‖ / ‖mean of their products‖.
        rank: Of the adapter, mean over layers.
        bytes_up: All clients to the server.
        bytes_down: The server to all clients, evaluation left out.
        seconds: Wall clock.
        server_seconds: Of merging.
        clients: Replies that were merged.
        rejected: Rejected replies.
        epsilon: The largest ε that a client reports: what its ledger holds it to; None without privacy.
        epsilon_median: The clients' median.
        epsilon_unit: Whose presence is hidden: record or client.
        perplexity: Of a language model, where `loss` is measured.
        exact_match: Share of the generated responses that are the reference, word by word.
        rouge_l: Of the generated responses, mean.
        effective_rank: How many directions the adapter's update uses, mean over layers, in rounds with evaluation.
    """

    scenario: str
    method: str
    strategy: str
    seed: int
    round: int
    accuracy: float | None
    loss: float | None
    train_loss: float | None
    client_accuracy: float | None
    client_accuracy_min: float | None
    client_accuracy_sd: float | None
    merge_error: float | None
    rank: float | None
    bytes_up: int
    bytes_down: int
    seconds: float
    server_seconds: float
    clients: int
    rejected: int
    epsilon: float | None = None
    epsilon_median: float | None = None
    epsilon_unit: str = ""
    perplexity: float | None = None
    exact_match: float | None = None
    rouge_l: float | None = None
    effective_rank: float | None = None


def rows_of(run: CompareRun) -> list[Row]:
    """The rounds of one run, from its ``metrics.jsonl``."""
    up = down = 0
    seconds = server_seconds = 0.0
    rows = []
    for found in read_rows(run.folder / "metrics.jsonl"):
        central = found["evaluated"] == "central" and not run.variant.personal
        clients = [m["eval-accuracy"] for m in found["per_client"].values() if m.get("eval-examples")]
        up, down = up + found["bytes_up"], down + found["bytes_down"]
        seconds, server_seconds = seconds + found["seconds"], server_seconds + found["server_seconds"]
        spent = found.get("epsilon") or {}
        written = found.get("generation") or {}
        rows.append(
            Row(
                run.scenario,
                run.variant.method,
                run.variant.strategy,
                run.seed,
                found["round"],
                accuracy=found["accuracy"] if central else None,
                loss=found["loss"] if central else None,
                train_loss=found["train_loss"],
                client_accuracy=found["client_accuracy"],
                client_accuracy_min=found["client_accuracy_min"],
                client_accuracy_sd=spread(clients) if clients else None,
                merge_error=found["strategy"].get("merge_error") if "rank" in found["strategy"] else None,
                rank=found["strategy"].get("rank"),
                bytes_up=up,
                bytes_down=down,
                seconds=seconds,
                server_seconds=server_seconds,
                clients=found["clients"],
                rejected=found["rejected"],
                epsilon=spent.get("largest"),
                epsilon_median=spent.get("median"),
                epsilon_unit=spent.get("unit", ""),
                perplexity=found.get("perplexity") if central else None,
                exact_match=written.get("exact_match"),
                rouge_l=written.get("rouge_l"),
                effective_rank=found.get("effective_rank"),
            )
        )
    return rows
