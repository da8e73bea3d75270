"""What a site has spent on a data set: on disk before anything is trained, over rounds, runs, processes and restarts.

A ledger is one JSON file per data set, named by the site's policy, or without one by a fingerprint of the data. `spend`
writes first and returns after, so that a client that dies while training, or before its reply leaves, has spent its
steps and cannot spend them again. ε composes over every run on the same records: a second run does not start from zero.

Beside each ledger, in the state folder, stands its head: how many entries it had and their digest. A ledger that lacks
some of them, such as an older copy that was put back, is refused. The ledger is written first, so that a crash between
the two leaves a head that is behind, never one that is ahead.

A data officer may write `limit.json` (`{"epsilon": 8.0, "delta": 1e-5}`) into the folder. It binds every run, whatever
budget the run asks for.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from filelock import FileLock

from bora_fl.config import Settings
from bora_fl.data import source_fingerprint
from bora_fl.paths import state_folder, write_atomically
from bora_fl.privacy.accounting import Accountant, Budget, BudgetExceeded, Spent, Unit, epsilon, merge_history
from bora_fl.privacy.policy import SitePolicy

_VERSION = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Ledger:
    """A client's account of one data set. Use `Ledger.open`.

    Attributes:
        budget: The run's budget; it holds for all that was spent on the data set, by whichever run.
        unit: Whose presence the spent noise hides; each unit has a file of its own.
    """

    def __init__(
        self, file: Path, run_id: str, dataset_fingerprint: str, budget: Budget, accountant: Accountant, unit: Unit
    ) -> None:
        self.budget, self.unit = budget, unit
        self._file, self._run, self._dataset, self._accountant = file, run_id, dataset_fingerprint, accountant

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        run_id: str,
        dataset_fingerprint: str,
        budget: Budget,
        accountant: Accountant = "prv",
        unit: Unit = "record",
    ) -> Self:
        """Open the ledger of a data set, or start one.

        Args:
            folder: Where the site keeps its ledgers. It must outlive the process.
            run_id: The run that spends.
            dataset_fingerprint: Names the data set: see `fingerprint`, or the name that the site's policy gives it.
            budget: What the run may spend on the data set, earlier runs included.
            accountant: `"prv"` or `"rdp"`.
            unit: Whose presence the noise hides.

        Raises:
            ValueError: If the arguments or the file on disk are not usable. An unreadable ledger is never started anew.
        """
        if not _NAME.fullmatch(dataset_fingerprint):
            raise ValueError(f"dataset_fingerprint = {dataset_fingerprint!r}: use fingerprint(records)")
        Path(folder).mkdir(mode=0o700, parents=True, exist_ok=True)
        name = dataset_fingerprint if unit == "record" else f"{dataset_fingerprint}-{unit}"
        ledger = cls(Path(folder) / f"{name}.json", run_id, dataset_fingerprint, budget, accountant, unit)
        epsilon([], budget.delta, accountant)
        ledger._read()
        return ledger

    def spend(self, noise_multiplier: float, sample_rate: float, steps: int) -> float:
        """Book steps before they are taken.

        On return they are on disk, flushed to the device. Two processes may spend at once.

        Args:
            noise_multiplier: Noise of each step, in multiples of the clipping norm.
            sample_rate: Probability with which a record takes part in a step.
            steps: Number of steps.

        Returns:
            ε spent on the data set, these steps included.

        Raises:
            BudgetExceeded: If they do not fit; the ledger is then as it was.
        """
        with self._locked():
            entries = self._read()
            before = [spent for _, spent in entries]
            after = [*before, Spent(noise_multiplier, sample_rate, steps)]
            reached = []
            for budget, source in self._budgets():
                reached.append(epsilon(after, budget.delta, self._accountant))
                if reached[-1] > budget.epsilon:
                    spent = epsilon(before, budget.delta, self._accountant)
                    raise BudgetExceeded(source, budget, spent, after[-1], reached[-1], self.unit)
            self._write([*entries, (self._run, after[-1])])
        return reached[0]

    def epsilon(self, run_id: str | None = None) -> float:
        """Return ε spent on the data set at the budget's δ, by all runs or by one."""
        return epsilon(self.history(run_id), self.budget.delta, self._accountant)

    def history(self, run_id: str | None = None) -> list[Spent]:
        """Return what was spent, merged, by all runs or by one."""
        return merge_history(spent for run, spent in self._read() if run_id in (None, run))

    def _budgets(self) -> Iterator[tuple[Budget, str]]:
        yield self.budget, "the run's budget"
        limit = self._file.parent / "limit.json"
        if limit.exists():
            try:
                yield Budget(**json.loads(limit.read_text())), f"the site's limit ({limit})"
            except (TypeError, ValueError) as error:
                raise ValueError(f'{limit}: {error}; write {{"epsilon": 8.0, "delta": 1e-5}}') from error

    def _read(self) -> list[tuple[str, Spent]]:
        head = self._read_head()  # before the ledger, which another process may write to in between
        entries = self._read_entries() if self._file.exists() else []
        if head != (0, "") and head != (head[0], _digest(entries[: head[0]])):
            raise ValueError(
                f"privacy ledger {self._file} was rolled back or changed: its {len(entries)} entries do not begin with "
                f"the {head[0]} that {self._head_file} counted. Put the newest copy of the ledger back, or, only if "
                f"you know that every entry is in it, delete {self._head_file}. Until then, training on these records "
                "is refused"
            )
        return entries

    def _read_entries(self) -> list[tuple[str, Spent]]:
        try:
            content: dict[str, Any] = json.loads(self._file.read_text())
            if (content["version"], content["unit"], content["dataset"]) != (_VERSION, self.unit, self._dataset):
                raise ValueError(f"it is version {content['version']} for {content['unit']}s of {content['dataset']}")
            return [
                (
                    entry["run"],
                    Spent(float(entry["noise_multiplier"]), float(entry["sample_rate"]), int(entry["steps"])),
                )
                for entry in content["entries"]
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"privacy ledger {self._file} cannot be read ({error}): restore it from a backup. Without it, what "
                "these records have spent is not known, and training on them is refused"
            ) from error

    def _write(self, entries: list[tuple[str, Spent]]) -> None:
        content = {
            "version": _VERSION,
            "unit": self.unit,
            "dataset": self._dataset,
            "entries": [{"run": run, **spent._asdict()} for run, spent in entries],
        }
        write_atomically(self._file, json.dumps(content, indent=1), mode=0o600)
        head = {"entries": len(entries), "sha256": _digest(entries), "ledger": str(self._file)}
        self._head_file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(self._head_file, json.dumps(head) + "\n", mode=0o600)

    @property
    def _head_file(self) -> Path:
        """Named by where the ledger is: ledgers of the same data in other folders have heads of their own."""
        place = hashlib.sha256(str(self._file.resolve()).encode()).hexdigest()
        return state_folder() / "ledger-heads" / f"{place}.json"

    def _read_head(self) -> tuple[int, str]:
        """How many entries the ledger had at least, and their digest; (0, "") if none were ever counted."""
        try:
            head = json.loads(self._head_file.read_text())
            return int(head["entries"]), str(head["sha256"])
        except FileNotFoundError:
            return 0, ""
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self._head_file}, which counts the entries of the privacy ledger {self._file}, cannot be read "
                f"({error}). If you know that the ledger is whole, delete it. Until then, training is refused"
            ) from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with FileLock(self._file.with_suffix(".lock"), mode=0o600):
            yield


def _digest(entries: list[tuple[str, Spent]]) -> str:
    rows = [[run, float(spent.noise_multiplier), float(spent.sample_rate), int(spent.steps)] for run, spent in entries]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def site_ledger(
    settings: Settings, run_id: str, partition: int, unit: Unit = "record", policy: SitePolicy | None = None
) -> Ledger:
    """The ledger of the data that a site trains on, under a run's budget.

    Args:
        settings: The run's settings, as the site grants them.
        run_id: The run, under which steps are booked.
        partition: The client's partition; with the data's files it names the ledger where the site has no policy.
        unit: Whose presence the noise hides.
        policy: The site's; it names the ledger.

    Raises:
        ValueError: If the ledger on disk cannot be read.
    """
    return Ledger.open(
        ledger_folder(settings),
        run_id=run_id,
        dataset_fingerprint=policy.ledger if policy else source_fingerprint(settings.data, partition),
        budget=Budget(settings.privacy.epsilon, settings.privacy.delta),
        accountant=settings.privacy.accountant,
        unit=unit,
    )


def ledger_folder(settings: Settings) -> Path:
    """``privacy.ledger-dir``, else ``$BORA_FL_STATE/ledger``, else ``~/.local/state/bora_fl/ledger``."""
    if settings.privacy.ledger_dir:
        return Path(settings.privacy.ledger_dir).expanduser()
    return state_folder() / "ledger"


def planned_rounds(settings: Settings) -> int:
    """Rounds that a client takes part in if it is sampled as often as ``strategy.fraction-train`` expects."""
    return math.ceil(settings.run.num_rounds * settings.strategy.fraction_train)


def fingerprint(records: Iterable[bytes | str]) -> str:
    """Return a fingerprint of a data set that does not depend on the order of its records.

    Adding, removing or changing a record gives another one, and with it another ledger: what the unchanged records have
    spent before must then be carried over by copying the old file's entries.

    Args:
        records: Each record's content, serialized in any fixed way.

    Returns:
        64 hexadecimal digits.
    """
    digests = sorted(
        hashlib.sha256(record.encode() if isinstance(record, str) else record).digest() for record in records
    )
    return hashlib.sha256(b"".join(digests)).hexdigest()
