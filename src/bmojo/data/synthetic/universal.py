"""Outputs of random programs of a universal machine: data that hold every regularity, the simpler the more often.

    program  + [ + . + . ]   prints  0 1 0 1 0 1 ...        program  . + .  prints  0 1  and then what comes next

A program is drawn one instruction at a time, each as likely as any other, and run until it has printed enough, never
prints again, or is cut off (after `time_limit` steps without a new instruction, or at `depth` instructions). A model
trained on this learns Solomonoff's prediction in context: the least loss is that of
P(next bit 1 | x) = M(x1) / (M(x0) + M(x1)), and with the same `depth` and `time_limit` as a table's D and T that is
exactly the M_norm of `bmojo.universal.SolomonoffTable`.
Source: Grau-Moya et al. 2024, Learning Universal Predictors, arXiv 2401.14953.

Token ids: the bits, then the start, which stands first; the label of a token is the bit behind it, and there is none
behind the end of an output, where the tokens are 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bmojo.data.synthetic.task import NO_ANSWER, Batch, Task, next_symbols
from bmojo.universal.machine import get_machine
from bmojo.universal.sample import sample_outputs


@dataclass(frozen=True, kw_only=True)
class Universal(Task):
    """Outputs of up to `length` bits of programs that print at least `at_least`.

    With `at_least` = 1 only silent programs are passed over, which leaves the best prediction as it is. A larger one
    makes long outputs frequent, and the best prediction that given so many bits are printed.
    """

    length: int = 256
    machine: str = "bp7"
    depth: int = 64
    time_limit: int = 1024
    at_least: int = 1

    def check(self) -> None:
        get_machine(self.machine)
        for name, most in (("depth", 4096), ("time_limit", 2**20), ("at_least", self.length)):
            value = getattr(self, name)
            self.require(1 <= value <= most, f"{name} must be from 1 to {most}, got {value}")

    @property
    def vocab_size(self) -> int:
        return 3

    @property
    def chance(self) -> float:
        return 0.5

    def batch(self, number: int, rows: int) -> Batch:
        """Every bit that is printed is asked; `distance` is that to the start."""
        draw = self.generator(number)
        bits, lengths = sample_outputs(
            draw, rows, self.machine, self.length, self.depth, self.time_limit, self.at_least
        )
        batch = next_symbols(bits, start=2)
        silent = np.arange(self.length) >= lengths[:, None]
        batch["labels"][silent], batch["distance"][silent] = NO_ANSWER, 0
        return batch
