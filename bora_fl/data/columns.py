"""What a row is, judging by the columns: a text, words, a prompt with a response, messages, or a pair of responses."""

from collections.abc import Callable, Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from bora_fl.config import ConfigError, DataSettings
from bora_fl.data import messages
from bora_fl.data.labels import is_list

TEXTS = ("text", "sentence", "review", "content", "body", "document", "comment", "question", "title")
PROMPTS = ("instruction", "prompt", "question", "input", *TEXTS)
RESPONSES = ("response", "output", "answer", "completion")
CONTEXTS = ("input", "context")
SYSTEMS = ("system", "system_prompt")
WORDS = ("tokens", "words")
DIALOGS = ("messages", "conversations", "conversation", "dialog", "dialogue", "chat")
CHOSEN, REJECTED = ("chosen", "preferred"), ("rejected", "dispreferred")
IDS = (
    *("domain", "client", "client_id", "silo", "site", "hospital", "user", "user_id", "author", "source", "dataset"),
    *("task", "task_name", "task_type", "category", "topic", "subset", "language"),
)
TOOLS = "tools"
_ASKED = PROMPTS[:4]
_DIALOG = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_DEFAULT = DataSettings()


def text_names(settings: DataSettings) -> frozenset[str]:
    """Columns that hold text, by their usual names and by the settings, whatever their values look like."""
    usual_names = {*PROMPTS, *CONTEXTS, *RESPONSES, *CHOSEN, *REJECTED, *DIALOGS}
    spelt = {way for name in usual_names for way in (name, name.capitalize(), name.upper())}
    named = {settings.text_column, settings.response_column, settings.context_column, settings.rejected_column}
    return frozenset((spelt | named) - {"", settings.label_column})


def kinds(table: pa.Table, settings: DataSettings) -> dict[str, pa.DataType]:
    """What columns hold; messages where a text is JSON of them and the settings do not make it a text.

    Args:
        table: The data, or its first rows.
        settings: The group ``data``.

    Raises:
        ConfigError: If a column named after messages holds JSON, or Python, that is none.
    """
    found = {field.name: field.type for field in table.schema}
    if settings.format in ("text", "prompt") or (settings.format == "auto" and settings.label_column in found):
        return found
    return {
        name: _DIALOG if is_text(kind) and _is_json(name, table[name], settings.name) else kind
        for name, kind in found.items()
    }


def _is_json(name: str, values: pa.ChunkedArray, data: str) -> bool:
    """Whether the first text of a column is JSON of messages."""
    texts = (str(value) for value in values if value.is_valid)
    first = next((text for text in texts if text.strip()), "")
    if first.lstrip()[:1] not in ("[", "{"):
        return False
    if messages.from_json(first):
        return True
    if name.lower() in DIALOGS:
        raise ConfigError(
            f"data.name = {data!r}: column {name!r} has {first[:40]!r}, which is no JSON list of messages with role "
            "and content; write such lists, or set data.format to text or prompt if it is none"
        )
    return False


def resolved(settings: DataSettings, columns: Mapping[str, pa.DataType]) -> DataSettings:
    """The settings with ``data.format`` and its columns named; a column that is there by its given name stays.

    Args:
        settings: The group ``data``.
        columns: The data's columns and their types.

    Raises:
        ConfigError: If ``data.format`` is given and there are no columns for it.
    """
    for kind in _candidates(settings, columns) if settings.format == "auto" else (settings.format,):
        if found := _find(kind, settings, columns):
            _require_whole_dialogs(found, columns)
            if settings.context_column and kind != "prompt":
                raise ConfigError(
                    f"data.context-column = {settings.context_column!r} with data.format = {kind!r}: it goes with a "
                    "prompt and its response; leave it empty, or name data.response-column"
                )
            if settings.format == "auto" and kind == "text":
                _require_whole_rows(found, columns)
            return found
    if settings.format in ("auto", "text"):
        return _of(settings, "text", settings.text_column)  # whoever reads the column says that it is missing
    named = {"prompt": " and data.response-column", "preference": ", data.response-column and data.rejected-column"}
    raise ConfigError(
        f"data.format = {settings.format!r}: none of the columns {', '.join(columns)} fits; name it in "
        f"data.text-column{named.get(settings.format, '')}, or set data.format to auto"
    )


def _require_whole_dialogs(found: DataSettings, columns: Mapping[str, pa.DataType]) -> None:
    """Refuse conversations whose last turn is in a column of its own, since it is what is to be learned."""
    rest = [name for name, type_ in columns.items() if is_dialog(type_) and name != found.text_column]
    response = usual(RESPONSES, rest)
    if found.format == "messages" and response and found.text_column.lower() in PROMPTS:
        raise ConfigError(
            f"data.text-column = {found.text_column!r} with data.format = 'messages': {response!r} holds the messages "
            "that answer; join both in one column, such as messages"
        )


def _require_whole_rows(found: DataSettings, columns: Mapping[str, pa.DataType]) -> None:
    """Refuse to take a prompt, or a response, for the whole text because the other one is no text."""
    if found.text_column.lower() not in (*_ASKED, *RESPONSES) or found.label_column in columns:
        return
    others = [name for name, type_ in columns.items() if not is_text(type_) and not is_dialog(type_)]
    if other := usual((*RESPONSES, *CHOSEN, *REJECTED, *_ASKED), others):
        alone = found.text_column
        raise ConfigError(
            f"data.name = {found.name!r}: column {other!r} holds {columns[other]}, not text, and {alone!r} would be "
            f"trained without it; write {other!r} as text, or set data.format to text for {alone!r} alone"
        )


def left_out(found: DataSettings, names: Sequence[str]) -> str:
    """The column of system prompts that stands beside prompts and responses, which no setting takes; else empty.

    Args:
        found: From `resolved`.
        names: The data's columns.
    """
    named = (found.text_column, found.response_column, found.context_column)
    return usual(SYSTEMS, [name for name in names if name not in named]) if found.format == "prompt" else ""


def require_response(settings: DataSettings, found: DataSettings, names: Sequence[str]) -> None:
    """Refuse, for a language model, to take a prompt for the whole text because the rows have labels too.

    Args:
        settings: As the run config has them.
        found: From `resolved`.
        names: The data's columns.

    Raises:
        ConfigError: If there is a response that would be left out.
    """
    searched = settings.format == "auto" and settings.text_column == _DEFAULT.text_column
    response = usual(RESPONSES, [name for name in names if name != found.label_column])
    if searched and found.format == "text" and found.text_column.lower() in _ASKED and response:
        raise ConfigError(
            f"data.label-column = {settings.label_column!r} with model.task = 'causal-lm': the data has labels, and "
            f"{found.text_column!r} would be trained without {response!r}; leave data.label-column empty, or set "
            f"data.format to text for {found.text_column!r} alone"
        )


def _candidates(settings: DataSettings, columns: Mapping[str, pa.DataType]) -> tuple[str, ...]:
    """What rows may be, the likeliest first; what is named is not searched for."""
    if settings.rejected_column:
        return ("preference",)
    if settings.response_column:
        return ("prompt",)
    if settings.label_column not in columns and _find("preference", settings, columns):
        return ("preference",)
    named, labels = columns.get(settings.text_column), columns.get(settings.label_column)
    listed = labels is not None and is_list(labels)
    if listed and (usual(WORDS, _fitting(columns, is_words)) if named is None else is_words(named)):
        return ("words",)
    if named is not None and is_dialog(named):
        return ("messages",)
    if settings.text_column != _DEFAULT.text_column or settings.label_column in columns:
        return ("text",)
    return ("messages", "prompt", "text") if named is None else ("messages", "text")


def is_dialog(kind: pa.DataType) -> bool:
    """Whether a column holds messages: lists of ``role, content``, or of ``from, value``."""
    if not is_list(kind) or not pa.types.is_struct(kind.value_type):
        return False
    return messages.is_message([kind.value_type.field(index).name for index in range(kind.value_type.num_fields)])


def is_words(kind: pa.DataType) -> bool:
    """Whether a column holds lists of strings."""
    return is_list(kind) and is_text(kind.value_type)


def is_text(kind: pa.DataType) -> bool:
    """Whether a column holds strings."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def with_context(prompt: str, context: str | None) -> str:
    """A prompt followed by what it is about, if there is anything."""
    return f"{prompt}\n\n{context}" if context and context.strip() else prompt


def num_missing(values: pa.ChunkedArray) -> int:
    """How many values are null, or blank, as an empty cell of a CSV file is."""
    blank = pc.sum(pc.equal(pc.utf8_trim_whitespace(values), "")).as_py() if is_text(values.type) else 0
    return int(values.null_count + (blank or 0))


def usual(names: Sequence[str], fitting: Sequence[str]) -> str:
    """The first of the usual names that is among the fitting columns, whatever its case; else empty."""
    by_name = {name.lower(): name for name in reversed(fitting)}
    return next((by_name[name] for name in names if name in by_name), "")


def _find(kind: str, settings: DataSettings, columns: Mapping[str, pa.DataType]) -> DataSettings | None:
    texts = _fitting(columns, is_text)
    given = settings.text_column if settings.text_column != _DEFAULT.text_column else ""
    if kind == "preference":
        return _pairs(settings, columns, given)
    if kind == "words":
        words = [name for name in _fitting(columns, is_words) if name != settings.label_column]
        text = given or usual((_DEFAULT.text_column, *WORDS), words) or next(iter(words), "")
        return _of(settings, kind, text) if text else None
    if kind == "messages":
        dialogs = _fitting(columns, is_dialog)
        text = given or usual((_DEFAULT.text_column, *DIALOGS), dialogs) or next(iter(dialogs), "")
        return _of(settings, kind, text) if text else None
    given = settings.text_column if settings.text_column in columns else given
    if kind == "text":
        text = given or usual(TEXTS, texts) or (texts[0] if len(texts) == 1 else "")
        return _of(settings, kind, text) if text else None
    response = settings.response_column or usual(RESPONSES, texts)
    text = given or usual(PROMPTS, [name for name in texts if name != response]) or ""
    others = [name for name in texts if name not in (text, response)]
    context = settings.context_column or ("" if given else usual(CONTEXTS, others))
    found = _of(settings, kind, text, response) if text and response else None
    return found and found.model_copy(update={"context_column": context})


def _fitting(columns: Mapping[str, pa.DataType], fits: Callable[[pa.DataType], bool]) -> list[str]:
    return [name for name, kind in columns.items() if fits(kind)]


def _pairs(settings: DataSettings, columns: Mapping[str, pa.DataType], given: str) -> DataSettings | None:
    """The columns of preference pairs; the prompt may be part of the responses."""
    fitting = [name for name, type_ in columns.items() if is_text(type_) or is_dialog(type_)]
    chosen = settings.response_column or usual(CHOSEN, fitting)
    rejected = settings.rejected_column or usual(REJECTED, fitting)
    others = [name for name in fitting if name not in (chosen, rejected)]
    text = given or usual(PROMPTS, others)
    return _of(settings, "preference", text, chosen, rejected) if chosen and rejected else None


def _of(settings: DataSettings, kind: str, text: str, response: str = "", rejected: str = "") -> DataSettings:
    columns = {"text_column": text, "response_column": response, "rejected_column": rejected}
    return settings.model_copy(update={"format": kind, **columns})
