"""The README.md of a finished adapter: what the run was, how well it ended, and how to load it."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

from bora_fl.config import Settings, extensions, extras
from bora_fl.server.versions import versions

_LOAD = """\
import bora_fl

model, tokenizer = bora_fl.load("adapter")  # this folder, or the run's
"""
_CLASSIFY = """\
inputs = tokenizer(["a text"], truncation=True, max_length={max_length}, return_tensors="pt")
print(model.config.id2label[int(model(**inputs).logits.argmax())])
"""
_LABELS = """\
inputs = tokenizer(["a text"], truncation=True, max_length={max_length}, return_tensors="pt")
chances = model(**inputs).logits[0].sigmoid()
print([model.config.id2label[index] for index in range(len(chances)) if chances[index] > 0.5])
"""
_TAG = """\
words = ["a", "text"]
inputs = tokenizer(words, is_split_into_words=True, truncation=True, max_length={max_length}, return_tensors="pt")
print([model.config.id2label[int(index)] for index in model(**inputs).logits[0].argmax(-1)], inputs.word_ids())
"""
_GENERATE = """\
inputs = tokenizer("a prompt", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0], skip_special_tokens=True))
"""
_VALUE = """\
inputs = tokenizer(["a text"], truncation=True, max_length={max_length}, return_tensors="pt")
print(float(model(**inputs).logits))
"""
_USES = {
    "classification": _CLASSIFY,
    "multi-label": _LABELS,
    "token-classification": _TAG,
    "regression": _VALUE,
    "causal-lm": _GENERATE,
}
_MEASURES = {
    "multi-label": "Accuracy: F1 of a text's labels, mean over the texts.",
    "token-classification": "Accuracy: share of the words whose label is right.",
    "regression": "Loss: mean squared error. Accuracy: R², or 0 where it is negative.",
}
_MERGED = """\
from transformers import pipeline

pipe = pipeline("{pipeline}", "merged"{trust})
print(pipe("a text"))
"""


def model_card(
    settings: Settings,
    rows: Sequence[Mapping[str, Any]],
    label_names: Sequence[str] | None,
    pooling: str | None,
    test_examples: int = 0,
    merged_last: bool = False,
) -> str:
    """Write the card.

    Args:
        settings: The run's.
        rows: The rows of its ``metrics.jsonl``, at least one.
        label_names: Names of the logits; None for a language model.
        pooling: What the head reads, where that is not what transformers' own class does.
        test_examples: Examples of the central test set.
        merged_last: Whether clients measured the last round's result, and not what that round began with.
    """
    kind = settings.model.kind.pipeline
    sections = [
        _front_matter(settings, kind),
        f"# {settings.adapter.method} adapter for {_base(settings)}\n\n"
        "Trained by a federation with bora_fl ([BoRA](https://arxiv.org/abs/2508.06953)): clients sent what they had "
        "trained, never their records.",
        _table(settings, rows, label_names, pooling, test_examples),
        _metrics(rows, test_examples, merged_last, settings.model.task),
        _loading(settings, kind, pooling),
        "## Versions\n\n" + ", ".join(f"{name} {version}" for name, version in versions().items()),
    ]
    return "\n\n".join(sections) + "\n"


def _is_hub_id(settings: Settings) -> bool:
    name = settings.model.name
    return (
        not extensions.reference("models", name)
        and name not in extras.MODELS
        and not Path(name).expanduser().exists()
        and not name.startswith((".", "/", "~"))
    )


def _base(settings: Settings) -> str:
    """The base model's name; of a local folder its last part, since a path says nothing elsewhere."""
    name = settings.model.name
    return name if name in extras.MODELS or _is_hub_id(settings) else Path(name).name


def _front_matter(settings: Settings, kind: str) -> str:
    lines = ["---", "library_name: peft", f"pipeline_tag: {kind}", "tags: [bora, federated-learning]"]
    if _is_hub_id(settings):
        lines.append(f"base_model: {json.dumps(settings.model.name)}")
    return "\n".join([*lines, "---"])


def _table(
    settings: Settings,
    rows: Sequence[Mapping[str, Any]],
    label_names: Sequence[str] | None,
    pooling: str | None,
    test_examples: int,
) -> str:
    model, adapter, strategy, data = settings.model, settings.adapter, settings.strategy, settings.data
    source = f", from the package {extras.MODELS[model.name][2]}" if model.name in extras.MODELS else ""
    source += f", revision {model.revision}" if model.revision else ""
    blocks = f", {adapter.num_blocks} blocks" if adapter.method == "bora" else ""
    how = "data of each site" if data.partition == "local" else f"{data.partition} partition"
    facts = {
        "task": model.task,
        "base model": f"`{_base(settings)}`{source}",
        "head reads": f"{pooling} of the token states" if pooling else "",
        "labels": ", ".join(f"`{name}`" for name in label_names or ()),
        "adapter": f"{adapter.method}, rank {adapter.rank}{blocks}, alpha {adapter.alpha:g}, "
        f"on {adapter.target_modules}",
        "clients": f"{max(row['clients'] for row in rows[1:] or rows)} in a round, {how}",
        "examples": _examples(rows, test_examples),
        "strategy": f"{strategy.name}, residual {strategy.residual}",
        "rounds": str(rows[-1]["round"]),
        "privacy": _privacy(settings, rows),
        "seed": str(settings.run.seed),
    }
    lines = [f"| {name} | {_cell(value)} |" for name, value in facts.items() if value]
    return "\n".join(["| | |", "|---|---|", *lines])


def _examples(rows: Sequence[Mapping[str, Any]], test_examples: int) -> str:
    """How many there are, as far as clients said so."""
    reported = [told for row in rows for told in row["per_client"].items()]
    sizes = list({client: int(told["num-examples"]) for client, told in reported if told.get("num-examples")}.values())
    parts = [f"{sum(sizes)} to train on, {min(sizes)} to {max(sizes)} a client"] if sizes else []
    return "; ".join(parts + ([f"{test_examples} in the central test set"] if test_examples else []))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _privacy(settings: Settings, rows: Sequence[Mapping[str, Any]]) -> str:
    privacy = settings.privacy
    masked = "; updates were masked by SecAgg+" if privacy.secure_aggregation else ""
    if privacy.mode == "none":
        return f"no differential privacy{masked}"
    spent = next((row["epsilon"] for row in reversed(rows) if row.get("epsilon")), None)
    if spent is None:
        return f"{privacy.mode}: budget epsilon = {privacy.epsilon:g} at delta = {privacy.delta:g}{masked}"
    return (
        f"{privacy.mode}: epsilon = {spent['largest']:.4g} per {spent['unit']} spent at delta = {privacy.delta:g} "
        f"(budget {privacy.epsilon:g}){masked}"
    )


def _metrics(rows: Sequence[Mapping[str, Any]], test_examples: int, merged_last: bool, task: str) -> str:
    lines = ["## Metrics", "", "| round | loss | accuracy | measured on |", "|---|---|---|---|"]
    shown = [row for row in rows if row["round"] == 0 and row.get("loss") is not None][:1]
    shown += [row for row in rows[-1:] if row["round"] != 0]
    moment = "after the last merge" if merged_last else "before the round's training"
    where = {"central": "central test set", "clients": f"clients' held-out parts, {moment}"}
    intervals = False
    for row in shown:
        loss, accuracy = ("-" if row.get(key) is None else f"{row[key]:.4f}" for key in ("loss", "accuracy"))
        central = row.get("evaluated") == "central" and test_examples and row.get("accuracy") is not None
        if central and task == "classification":
            accuracy += " ({:.3f} to {:.3f})".format(*wilson(row["accuracy"], test_examples))
            intervals = True
        lines.append(f"| {row['round']} | {loss} | {accuracy} | {where.get(row.get('evaluated') or '', '-')} |")
    notes = ["Round 0 is what training started from."] if shown and shown[0]["round"] == 0 else []
    notes += [_MEASURES[task]] if task in _MEASURES else []
    notes += [f"F1 of the entities: {rows[-1]['f1']:.4f}."] if rows[-1].get("f1") is not None else []
    notes += ["In brackets: Wilson's 95 % interval, of the test set's size alone."] if intervals else []
    if (kept := rows[-1].get("kept")) is not None:
        notes.append(f"The adapter is that of round {kept}, which had the least held-out loss.")
    return "\n".join([*lines, *(["", " ".join(notes)] if notes else [])])


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share that was seen in `count` independent trials."""
    z2 = NormalDist().inv_cdf(0.975) ** 2
    middle, half = share + z2 / (2 * count), math.sqrt(z2 * (share * (1 - share) + z2 / (4 * count)) / count)
    return (middle - half) / (1 + z2 / count), (middle + half) / (1 + z2 / count)


def _loading(settings: Settings, kind: str, pooling: str | None) -> str:
    use = _USES[settings.model.task]
    with_ours = _LOAD + use.format(max_length=settings.model.max_length)
    trust = ", trust_remote_code=True" if pooling else ""
    return (
        f"## Loading\n\nWith bora_fl:\n\n```python\n{with_ours}```\n\n"
        "Without it, after `bora-fl export RUN merged` (`--as lora` for programs that take LoRA adapters):\n\n"
        f"```python\n{_MERGED.format(pipeline=kind, trust=trust)}```"
    )
