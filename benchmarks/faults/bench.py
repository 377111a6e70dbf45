"""One recipe, the run that nothing happens to, and what is noted of the others."""

import dataclasses
import signal
from collections.abc import Sequence
from pathlib import Path

from benchmarks.faults.runs import RECIPE, Run, differences, final_state, last_step
from vir_jax.runs.preemption import EXIT_CODE


@dataclasses.dataclass
class Record:
    """One line of the table.

    Attributes:
      fault: what was done.
      injected: how often.
      survived: how often the run, or the loader, did what it should.
      lost_steps: steps done before a fault that had to be done again, each time; the result holds every step once.
      resume_seconds: from a start to the first new step.
      note: what else was seen.
    """

    fault: str
    injected: int
    survived: int
    lost_steps: list[int] = dataclasses.field(default_factory=list)
    resume_seconds: list[float] = dataclasses.field(default_factory=list)
    note: str = ""


class Bench:
    """The folders of one recipe, and the undisturbed run that all others are compared with."""

    def __init__(self, folder: Path, cache: Path, **changes: object) -> None:
        self.folder, self.cache, self.recipe = folder, cache, {**RECIPE, **changes}
        self.finish(folder / "whole")
        self.expected = final_state(folder / "whole")

    def start(self, workdir: Path, *arguments: str) -> Run:
        """Starts train.py, or starts it again."""
        return Run(workdir, self.recipe, cache=self.cache, arguments=arguments)

    def finish(self, workdir: Path, *arguments: str) -> Run:
        """Lets a run go to its end."""
        return ended(self.start(workdir, *arguments))

    def stopped(self, name: str, *, step: int = 50) -> Path:
        """A workdir whose run has been stopped by SIGTERM after `step` steps or a few more."""
        workdir = self.folder / name
        run = self.start(workdir)
        expect(run.until(lambda: last_step(workdir) >= step), run)
        run.process.send_signal(signal.SIGTERM)
        expect(run.wait() == EXIT_CODE, run)
        return workdir

    def check(self, workdir: Path, *, but: Sequence[str] = ()) -> None:
        """Raises where the run did not end as the undisturbed one did, but for the parts named."""
        wrong = set(differences(self.expected, final_state(workdir))) - set(but)
        if wrong:
            raise RuntimeError(f"{workdir}: {', '.join(wrong)} differ from the undisturbed run's")


def expect(ok: bool, run: Run) -> None:
    """Raises with a run's log where it did not do what it should."""
    if not ok:
        raise RuntimeError(run.log())


def ended(run: Run) -> Run:
    """The run, when it has come to its end."""
    expect(run.wait() == 0, run)
    return run
