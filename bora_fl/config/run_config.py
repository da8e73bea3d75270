"""From a flat run config, or ``key=value`` pairs, to `Settings`; each error names key, value and remedy."""

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bora_fl.config.groups import ConfigError, Scalar
from bora_fl.config.settings import Settings


def parse(run_config: Mapping[str, Scalar]) -> Settings:
    """Check a flat run config and give it types.

    Args:
        run_config: Flower's ``context.run_config``: ``group.key`` to bool, int, float or str; missing keys default.

    Returns:
        The frozen settings.

    Raises:
        ConfigError: For an unknown key, a value of the wrong type or out of range, or settings that exclude each other.
    """
    groups: dict[str, dict[str, Scalar]] = {}
    known = Settings().flat()
    problems = []
    for key, value in run_config.items():
        if key not in known:
            problems.append(f"{key} = {value!r}: no such setting; {suggest(key)}")
            continue
        group, name = key.split(".", 1)
        groups.setdefault(group, {})[name] = value
    if problems:
        raise ConfigError("\n".join(problems))
    try:
        return Settings.model_validate(groups)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(item) for item in error.errors())) from None


def read_config(folder: Path) -> dict[str, Scalar]:
    """The run config in a run's output folder, as it was written; it may be of another version.

    Raises:
        ConfigError: If it is not there, or is no run config.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(f"run.output-dir = '{folder}': there is no config.json; name the folder of a run")
    try:
        found = json.loads(path.read_text(encoding="utf8"))
        lacking = [key for key in ("model.name", "data.name", "strategy.name") if key not in found]
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged ({error}); restore it from a backup, or name another run") from None
    if lacking or not isinstance(found, dict):
        raise ConfigError(f"{path} is damaged, it has no {', '.join(lacking)}; restore it, or name another run")
    return found


def overrides(pairs: list[str] | None, base: Mapping[str, Scalar] | None = None) -> dict[str, Scalar]:
    """Parse a command's ``key=value`` pairs into what the settings expect.

    Args:
        pairs: Each ``key=value``.
        base: The run config that they change; what a value must go together with may stand there.

    Raises:
        ConfigError: For a pair without ``=``, an unknown key, or settings that exclude each other.
    """
    known = Settings().flat()
    result: dict[str, Scalar] = {}
    for pair in pairs or []:
        key, sign, text = pair.partition("=")
        key, text = key.strip(), text.strip().strip("\"'")
        if not sign:
            raise ConfigError(f"--run-config {pair!r}: write key=value")
        default = known.get(key, "")
        if isinstance(default, bool):
            if text.lower() not in {"true", "false"}:
                raise ConfigError(f"{key} = {text!r}: write true or false")
            result[key] = text.lower() == "true"
        elif isinstance(default, int | float):
            try:
                result[key] = float(text) if isinstance(default, float) else int(text)
            except ValueError:
                result[key] = text
        else:
            result[key] = text
    parse({**(base or {}), **result})
    return result


def describe(word: str = "") -> list[tuple[str, Scalar, str]]:
    """Every key with its default and meaning: a group's if `word` is one, else those in which `word` occurs.

    A word that occurs in none, but is what other tools call a setting, finds that setting.
    """
    default = Settings()
    rows = [(key, value, _description(key)) for key, value in default.flat().items()]
    if word in Settings.model_fields:
        return [row for row in rows if row[0].startswith(f"{word}.")]
    found = [row for row in rows if word.lower() in f"{row[0]} {row[2]}".lower()]
    return found or [row for row in rows if row[0] in meaning(word).replace(",", "").split()]


def meaning(name: str) -> str:
    """The setting, or option, that other tools and papers call `name`; empty if it is not known."""
    return _FOREIGN.get(name.rpartition(".")[2].lower().replace("_", "-"), "")


def suggest(key: str) -> str:
    """The remedy for a key that does not exist, by what it means elsewhere or by how it is spelt."""
    if meant := meaning(key):
        return f"use {meant}"
    near = difflib.get_close_matches(key, Settings().flat(), n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else "`bora-fl config` lists the keys"


def _explain(item: Any) -> str:
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])
    key = ".".join(str(part) for part in item["loc"])
    message = item["msg"][0].lower() + item["msg"][1:]
    return f"{key} = {item['input']!r}: {message} ({_description(key)})"


def _description(key: str) -> str:
    group, name = key.split(".", 1)
    fields = type(getattr(Settings(), group)).model_fields
    return str(fields[name.replace("-", "_")].description)


# What other tools and papers call a setting.
_FOREIGN = {
    **dict.fromkeys(("lr", "eta", "client-lr", "local-lr"), "train.learning-rate"),
    **dict.fromkeys(("epochs", "num-train-epochs", "num-epochs"), "train.local-epochs, with train.local-steps = 0"),
    **dict.fromkeys(("steps", "max-steps"), "train.local-steps"),
    **dict.fromkeys(("fedprox", "mu", "prox"), "train.proximal-mu"),
    **dict.fromkeys(("bs", "per-device-train-batch-size"), "train.batch-size"),
    **dict.fromkeys(("gradient-accumulation-steps", "grad-accum"), "train.accumulation"),
    **dict.fromkeys(("wd", "l2"), "train.weight-decay"),
    **dict.fromkeys(("fp16", "bf16", "amp"), "train.precision"),
    **dict.fromkeys(("gradient-checkpointing",), "train.checkpointing"),
    **dict.fromkeys(("scheduler", "lr-scheduler-type"), "train.schedule"),
    **dict.fromkeys(("warmup-steps", "warmup-ratio"), "train.warmup-rounds, with train.schedule-by = step"),
    **dict.fromkeys(("r", "lora-r", "lora-rank"), "adapter.rank"),
    **dict.fromkeys(("b", "blocks"), "adapter.num-blocks"),
    **dict.fromkeys(("lora-alpha",), "adapter.alpha"),
    **dict.fromkeys(("lora-dropout",), "adapter.dropout"),
    **dict.fromkeys(("peft", "peft-type"), "adapter.method"),
    **dict.fromkeys(("base-model", "model-name-or-path", "backbone"), "model.name"),
    **dict.fromkeys(("max-seq-length", "seq-len"), "model.max-length"),
    **dict.fromkeys(("dataset", "dataset-name"), "data.name"),
    **dict.fromkeys(("dirichlet", "dirichlet-alpha", "non-iid"), "data.partition and data.alpha"),
    **dict.fromkeys(("clients", "num-clients", "num-supernodes"), "--simulate N for the number of clients"),
    **dict.fromkeys(("rounds", "num-server-rounds", "communication-rounds"), "run.num-rounds"),
    **dict.fromkeys(("aggregation", "aggregator", "algorithm"), "strategy.name"),
    **dict.fromkeys(("fraction-fit", "participation", "client-fraction"), "strategy.fraction-train"),
    **dict.fromkeys(("min-available-clients", "min-available-nodes"), "strategy.min-nodes"),
    **dict.fromkeys(("min-fit-clients", "min-train-nodes"), "strategy.min-replies"),
    **dict.fromkeys(("server-lr",), "strategy.server-learning-rate"),
    **dict.fromkeys(("fedopt", "fedadam", "fedyogi", "fedavgm"), "strategy.server-optimizer"),
    **dict.fromkeys(("krum", "median", "trimmed-mean"), "strategy.robust"),
    **dict.fromkeys(("dp", "dp-sgd"), "privacy.mode"),
    **dict.fromkeys(("noise", "sigma"), "privacy.noise-multiplier"),
    **dict.fromkeys(("clip", "clipping-norm"), "privacy.clip-norm"),
    **dict.fromkeys(("secagg",), "privacy.secure-aggregation"),
}
