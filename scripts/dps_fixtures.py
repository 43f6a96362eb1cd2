"""Ten training steps of DPS (Zhang et al., 2022), written here from its definition; files and setting as in method_fixtures.py.

Stages of two steps, with S the sum of squares of a stage's gradients, element by element and before clipping:

    steps 1, 2    everything trains; S
    steps 3, 4    of the matrix of every linear layer the highest ceil(0.7 n) of its n sums have a gradient, and all that are
                  equal to the last of them; clipping sees what is left
    steps 5, 6    as 1 and 2, with S anew; and so on

Moments and decay go on everywhere. This is the released code (ZhangHaojie077/DPS, DPSDense), which divides S by 1000.

Besides what all files hold:

    mask<step>.<parameter>    uint8, which elements of a matrix of WRITTEN have a gradient from that step on
"""

import math

import torch
import transformers
from method_fixtures import FIXTURES, STEPS, WRITTEN, Vanilla
from safetensors.torch import save_file

SHARE = 0.7
STAGE = int(STEPS * 0.2)
# Sums that are nearer to each other than this, relative to them, could be in another order in float32.
GAP = 1e-4


def is_matrix(name, leaf):
    """Returns whether a parameter is the matrix of a linear layer."""
    return leaf.dim() == 2 and ".embeddings." not in name


def highest(scores):
    """Returns which scores are among the highest of SHARE."""
    count = math.ceil(SHARE * scores.numel())
    last, next_one = scores.flatten().sort(descending=True).values[count - 1 : count + 1]
    assert last > (1 + GAP) * next_one, "two scores are too near to each other"
    return scores >= last


class Dense(Vanilla):
    """All weights train in one stage, and those with the highest sums in the next."""

    def __init__(self):
        super().__init__()
        self.matrices = [name for name, leaf in self.leaves.items() if is_matrix(name, leaf)]
        self.step, self.sums, self.masks, self.chosen = 0, {}, {}, {}

    def pull_gradients(self):
        # A pass counts its step from 0.
        stage, first = divmod(self.step, STAGE)
        if stage % 2 == 1 and first == 0:
            self.masks = {name: highest(self.scores(name)) for name in self.matrices}
            self.chosen |= {f"mask{self.step + 1}.{name}": self.masks[name] for name in WRITTEN if name in self.masks}
        for name in self.matrices:
            gradient = self.leaves[name].grad
            if stage % 2 == 1:
                gradient *= self.masks[name]
            else:
                self.sums[name] = gradient.square() + (self.sums[name] if first else 0)

    def scores(self, name):
        """Returns what the elements of a matrix are chosen by."""
        return self.sums[name]

    def run(self):
        values = super().run()
        return values | {name: mask.to(torch.uint8) for name, mask in self.chosen.items()}


def write_dps():
    """Writes the files of DPS, beside those of other methods."""
    save_file(Dense().run(), FIXTURES / "methods" / "dps_dense.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    write_dps()
