"""Every fault by name, and the run that injects one."""

from dataclasses import asdict, dataclass
from pathlib import Path

from bora_fl import __version__
from bora_fl.simulations import grid
from bora_fl.simulations.faults.processes import PROCESS_FAULTS
from bora_fl.simulations.faults.replies import REPLY_FAULTS
from bora_fl.simulations.faults.verdict import CONFIG, Fault

FAULTS: dict[str, Fault] = REPLY_FAULTS | PROCESS_FAULTS


@dataclass(frozen=True)
class FaultRun(grid.Run):
    """A federation with a fault; its result is a `Verdict` as a dictionary. A wrong one is run again."""

    fault: str
    root: Path

    @property
    def name(self) -> str:
        """The fault's."""
        return self.fault

    @property
    def identity(self) -> dict[str, object]:
        """The fault, the settings and the version of the code, which is what is judged."""
        return {"fault": self.fault, "what": FAULTS[self.fault].summary, "config": CONFIG, "version": __version__}

    def work(self) -> grid.Result:
        """Inject the fault."""
        return asdict(FAULTS[self.fault].inject(self.folder))

    def stands(self, result: grid.Result) -> bool:
        """Whether the verdict is good."""
        return bool(result["correct"])

    def line(self, result: grid.Result) -> str:
        """The verdict."""
        return f"{'right' if result['correct'] else 'WRONG'}: {result['outcome']}"
