"""The state of the machine at the start of a benchmark, and the warnings that follow from it."""

from dataclasses import asdict, dataclass

from fastrms.bench import machine, roofline

__all__ = ["Quiet", "look"]

# From here on other programs, or a second thread that adds little, are reported.
OTHERS, SPEEDUP = 0.2, 1.5


@dataclass(frozen=True)
class Quiet:
    """How busy the machine is: see `look`."""

    load: float | None  # over the last minute, this program and its predecessors included
    others_use: float | None  # processors that other programs use
    two_thread_speedup: float | None  # of two threads over one; None without a second thread

    def warnings(self) -> list[str]:
        """Return a sentence for each reason not to trust the times of this run."""
        found = []
        if self.others_use is not None and self.others_use > OTHERS:
            found.append(f"other programs use {self.others_use:.1f} processors: times are too long, and vary")
        if self.two_thread_speedup is not None and self.two_thread_speedup < SPEEDUP:
            found.append(
                f"two threads compute divisions only {self.two_thread_speedup:.2f} times as fast as one: a processor "
                "is busy, or both threads share one; times with several threads are too long"
            )
        return found

    def document(self) -> dict[str, object]:
        """Return the state and the warnings for a file of results."""
        return {**asdict(self), "warnings": self.warnings()}


def look(threads: int) -> Quiet:
    """Look how busy the machine is; this takes about a second, and longer if the loop has to be compiled."""
    load, others = machine.load(), machine.others_use()
    return Quiet(load, others, roofline.divider_speedup() if threads > 1 else None)
