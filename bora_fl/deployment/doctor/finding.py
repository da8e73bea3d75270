"""What a check found."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["pass", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report.

    Attributes:
        subject: What was looked at.
        level: ``fail`` if a run would fail, ``warn`` if it might or would be worse for it.
        text: What was found.
        remedy: What to do; empty for ``pass``, and where the text says it.
    """

    subject: str
    level: Level
    text: str
    remedy: str = ""
