"""Base models: find any Hugging Face model by its name, load it with the pooling that the settings ask for."""

import copy
import json
import logging
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock

from bora_fl.config import ConfigError, ModelSettings, Settings, extensions, extras
from bora_fl.models.number_head import exact_head
from bora_fl.paths import atomically, cache_folder, damaged, write_digests
from bora_fl.seeds import derive

log = logging.getLogger(__name__)

# Encoders whose token states are of one length and width in every layer, so that a head can read them all.
LAYERED = frozenset(
    ("albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "modernbert", "mpnet", "roberta")
) | {"xlm-roberta"}
DIGESTS = "SHA256SUMS"
_lock = threading.Lock()


@cache
def resolve(name: str) -> str:
    """Turn a model name into what ``from_pretrained`` takes: a hub id or a local folder.

    Raises:
        ConfigError: For an unknown embedded model, one whose package is not installed, or an extension that cannot be
            imported.
    """
    if extensions.reference("models", name):
        return str(extensions.load("models", name, "model.name =")())
    if not name.startswith("embedded:"):
        return name
    path = extras.require_model(name)
    return str(_from_gguf(path)) if path.suffix == ".gguf" else str(path)


def _from_gguf(path: Path) -> Path:
    """Dequantize a GGUF model once into a folder of safetensors.

    Raises:
        ConfigError: If what was converted earlier is damaged.
    """
    folder = cache_folder() / "models" / path.stem
    if (folder / "config.json").is_file():
        if spoiled := damaged(folder / DIGESTS, _files(folder)):
            raise ConfigError(
                f"model.name: {', '.join(spoiled)} in {folder} is not as it was written; delete the folder with "
                f"`rm -r {folder}`, and the model is converted again"
            )
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # one process converts, others wait
        if not (folder / "config.json").is_file():
            log.info("converting %s to %s (once)", path.name, folder)
            model = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            model.hf_quantizer = None  # the weights are plain float32 by now; with it save_pretrained refuses
            with atomically(folder) as part:
                model.save_pretrained(part)
                AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name).save_pretrained(part)
                write_digests(part / DIGESTS, _files(part))
    return folder


def _files(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]


def load_tokenizer(settings: ModelSettings) -> Any:
    """The model's tokenizer, with a padding token."""
    from transformers import AutoTokenizer

    source, revision = resolve(settings.name), settings.revision or None
    tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    if settings.task == "token-classification" and getattr(tokenizer, "add_prefix_space", None) is False:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, add_prefix_space=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(settings: ModelSettings, label_names: list[str] | None, seed: int) -> Any:
    """Load the frozen base model on the CPU.

    Args:
        settings: Name, revision, task, dtype and pooling.
        label_names: Names of the logits, as `RawData.logit_names` has them.
        seed: Run seed: a new classification head is the same in every process.

    Raises:
        ConfigError: If there is no such model, with the loader's own words, or it is no language model.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    options: dict[str, Any] = {"dtype": getattr(torch, settings.dtype), "revision": settings.revision or None}
    if settings.attention != "auto":
        options["attn_implementation"] = settings.attention
    if settings.quantization != "none":
        options["quantization_config"] = _quantization(settings)
    source = resolve(settings.name)
    with _lock, torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "head"))
        try:
            if settings.task == "causal-lm":
                require_language_model(settings)
                kind = auto_class(settings)
                model, report = kind.from_pretrained(source, output_loading_info=True, **options)
                _refuse_missing(settings, report)
            else:
                names = label_names or []
                options |= {"num_labels": len(names), "id2label": dict(enumerate(names))}
                options["label2id"] = {name: index for index, name in enumerate(names)}
                options |= {"problem_type": settings.kind.problem} if settings.kind.problem else {}
                kind = _classifier(settings)
                if settings.quantization != "none":
                    options["quantization_config"].llm_int8_skip_modules = _outside_the_body(kind, source, settings)
                verbosity = transformers_logging.get_verbosity()
                transformers_logging.set_verbosity_error()  # a new head is what is wanted, not a mishap to warn of
                try:
                    model = kind.from_pretrained(source, **options)
                finally:
                    transformers_logging.set_verbosity(verbosity)
            if settings.kind.number:
                exact_head(model)
            _settle_padding(model, settings)
        except ConfigError:
            raise
        except ImportError as error:
            raise ConfigError(
                f"model.attention = {settings.attention!r}: {' '.join(str(error).split())}; set model.attention to auto"
            ) from error
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"model.name = {settings.name!r}: cannot be loaded as {settings.task} "
                f"({' '.join(str(error).split())}); give a hub id, a local folder, or one of "
                + ", ".join(extras.MODELS)
            ) from error
    for module in model.modules():
        # On CPUs with bf16 instructions, evaluating would repack a Linear4bit and round its scales, for training too.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model.config.use_cache = False
    return model


def _settle_padding(model: Any, settings: ModelSettings) -> None:
    """Let the model's config name the token that batches are filled up with.

    A decoder with a classification head reads its last token that is another one. Tokenizer and config need not agree.
    """
    pad, ends = (getattr(model.config, name, None) for name in ("pad_token_id", "eos_token_id"))  # Funnel has neither
    if pad is None:
        pad = ends[0] if isinstance(ends, list) else ends
    if settings.kind.head:
        with suppress(OSError, ValueError):  # a folder may be without a tokenizer; whoever needs one is told
            tokenizer = load_tokenizer(settings)
            pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = pad


def without_dropout(model: Any) -> None:
    """Turn dropout off in a model's body, for good; its head keeps what it has, and its config what is saved."""
    configs: dict[int, Any] = {}  # copies, by the config that they are of
    for module in getattr(model, model.base_model_prefix, model).modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        _zero_numbers(module)  # decoders have numbers in its place, such as attention_dropout
        config = getattr(module, "config", None)
        if config is not None and module is not model:  # Falcon's layers read theirs in each pass
            if id(config) not in configs:
                configs[id(config)] = copy.deepcopy(config)
                _zero_numbers(configs[id(config)])
            module.config = configs[id(config)]


def _zero_numbers(of: Any) -> None:
    """Set to 0 whatever number has dropout in its name."""
    for name, value in list(vars(of).items()):
        if "drop" in name and isinstance(value, float):
            setattr(of, name, 0.0)


def _quantization(settings: ModelSettings) -> Any:
    """transformers' config of bitsandbytes for ``model.quantization``.

    QLoRA (Dettmers et al., 2023, arXiv:2305.14314): 4-bit NormalFloat, its block scales quantized again.
    """
    from transformers import BitsAndBytesConfig

    if settings.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, settings.dtype),
    )


def _outside_the_body(kind: Any, source: str, settings: ModelSettings) -> list[str]:
    """A classifier's modules beside its body, which are trained and so not quantized."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source, revision=settings.revision or None)
    with torch.device("meta"):
        model = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
    return [name for name, _ in model.named_children() if name != model.base_model_prefix]


def require_language_model(settings: ModelSettings) -> None:
    """Refuse, by its config alone, a model that cannot be trained as a causal language model.

    Raises:
        ConfigError: For an encoder, whose tokens see those that they are to predict, or a model without a head.
        OSError: If there is no such model.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING, MODEL_MAPPING

    config: Any = AutoConfig.from_pretrained(resolve(settings.name), revision=settings.revision or None)
    causal = getattr(config, "is_decoder", False) or getattr(config, "causal", False) or config.is_encoder_decoder
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not causal:
        raise ConfigError(
            f"model.name = {settings.name!r} with model.task = 'causal-lm': {config.model_type} is an encoder, each "
            "token sees the ones after it, which it is to predict; set model.task to classification, or use a decoder"
        )
    bare = MODEL_MAPPING.get(type(config), None)
    saved_as = list(config.architectures or ())
    if bare is not None and saved_as == [bare.__name__] and not config.tie_word_embeddings:
        raise ConfigError(
            f"model.name = {settings.name!r} with model.task = 'causal-lm': it was saved as {saved_as[0]}, without the "
            "head that predicts tokens; use a model that was saved as a causal-lm"
        )


def require_whole(settings: ModelSettings) -> None:
    """Refuse, by the names in its files, a causal language model that lacks tensors; read none of them.

    Files that are not on this machine are not fetched, and what cannot be loaded without memory is not judged:
    `load_base` tells of both.

    Raises:
        ConfigError: If tensors are missing.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    source, verbosity = resolve(settings.name), transformers_logging.get_verbosity()
    options: dict[str, Any] = {"revision": settings.revision or None, "device_map": "meta", "local_files_only": True}
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        with _lock, torch.random.fork_rng(devices=[]):
            _, report = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **options)
    except (ImportError, NotImplementedError, OSError, RuntimeError, ValueError):
        return
    finally:
        transformers_logging.set_verbosity(verbosity)
    _refuse_missing(settings, report)


def _refuse_missing(settings: ModelSettings, report: Any) -> None:
    if missing := sorted(report["missing_keys"]):
        raise ConfigError(
            f"model.name = {settings.name!r}: its files lack {', '.join(missing[:3])} ({len(missing)} "
            f"{'tensor' if len(missing) == 1 else 'tensors'}), which would be drawn at random; use a model that was "
            "saved as a causal-lm"
        )


def auto_class(settings: ModelSettings) -> Any:
    """transformers' class that loads a model for its task."""
    import transformers

    return getattr(transformers, settings.kind.model)


def _classifier(settings: ModelSettings) -> Any:
    """What loads a classifier: transformers' class for it, or that class with a pooling."""
    from transformers import AutoConfig
    from transformers.modeling_layers import GenericForSequenceClassification
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    from bora_fl.models.pooling import pooled_class

    asked, plain = settings.pooling, auto_class(settings)
    if not settings.kind.pooled:
        return plain
    pooling = trained_pooling(settings) if asked == "auto" else asked
    if pooling is None:
        return plain
    config = AutoConfig.from_pretrained(resolve(settings.name), revision=settings.revision or None)
    own = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    if own is None or (issubclass(own, GenericForSequenceClassification) and pooling == "last"):
        return plain
    if issubclass(own, GenericForSequenceClassification):
        if asked == "auto":
            return plain
        raise ConfigError(
            f"model.pooling = {asked!r}: {settings.name!r} is a decoder, where only the last token has seen the whole "
            "text; set model.pooling to last or auto"
        )
    return pooled_class(own, pooling)


def settled(settings: Settings) -> Settings:
    """The settings with `model.pooling = auto` as the whole run decides it, the same at the server and at every site.

    A head that is solved from sums gains from what the lower layers know (docs/head.md), so on a sentence encoder it
    reads every layer. Noise on the sums, or masks of few bits, cost more the wider the sums are: there `auto` stays
    what the model was trained for.

    Raises:
        ConfigError: See `trained_pooling`.
    """
    model, privacy = settings.model, settings.privacy
    plain = privacy.mode == "none" and not privacy.secure_aggregation
    if model.pooling != "auto" or not model.kind.pooled or not settings.solves_head or not plain:
        return settings
    if not _reads_layers(model.name, model.revision):
        return settings
    return settings.model_copy(update={"model": model.model_copy(update={"pooling": "layers"})})


@cache
def _reads_layers(name: str, revision: str) -> bool:
    """Whether a model is a sentence encoder with states of one shape in every layer."""
    from transformers import AutoConfig

    settings = ModelSettings(name=name, revision=revision)
    if trained_pooling(settings) not in ("mean", "cls"):
        return False
    return AutoConfig.from_pretrained(resolve(name), revision=revision or None).model_type in LAYERED


def trained_pooling(settings: ModelSettings) -> Literal["mean", "cls", "last"] | None:
    """The pooling that a sentence encoder was trained with, as its folder or hub repository states it.

    Returns:
        None if the model is no sentence encoder, or one with another pooling than these.

    Raises:
        ConfigError: If the hub cannot be asked: two processes might else read different features.
    """
    modules = _read_json(settings, "modules.json") or []
    paths = [str(module["path"]) for module in modules if str(module["type"]).endswith("Pooling")]
    stated = (_read_json(settings, f"{paths[0]}/config.json") or {}) if paths else {}
    modes = [key for key, on in stated.items() if key.startswith("pooling_mode_") and on is True]
    modes = modes or [f"pooling_mode_{stated.get('pooling_mode')}"]
    known: dict[str, Literal["mean", "cls", "last"]] = {"mean": "mean", "mean_tokens": "mean", "cls": "cls"}
    known |= {"cls_token": "cls", "lasttoken": "last"}
    return known.get(modes[0].removeprefix("pooling_mode_")) if len(modes) == 1 else None


def _read_json(settings: ModelSettings, name: str) -> Any:
    """A JSON file beside the model's weights, or None if there is none."""
    from transformers.utils import cached_file

    try:
        path = cached_file(
            resolve(settings.name),
            name,
            revision=settings.revision or None,
            _raise_exceptions_for_missing_entries=False,
        )
    except OSError as error:
        if settings.name.startswith(("/", ".", "~")):
            raise ConfigError(
                f"model.name = {settings.name!r}: there is no such folder; name one, or a hub id"
            ) from error
        raise ConfigError(
            f"model.pooling = 'auto': whether {settings.name!r} is a sentence encoder cannot be looked up ({error}); "
            "set model.pooling to mean, cls or last, or model.name to a local folder"
        ) from error
    return None if path is None else json.loads(Path(path).read_text())
