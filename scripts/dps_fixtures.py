"""Ten training steps of DPS (Zhang et al., 2022), from its definition; files and setting as in method_fixtures.py.

Stages of two steps, with S the sum of squares of a stage's gradients, element by element and before clipping:

    steps 1, 2    everything trains; S
    steps 3, 4    of the matrix of every linear layer the highest ceil(0.7 n) of its n scores have a gradient, and all
                  that are equal to the last of them; clipping sees what is left
    steps 5, 6    as 1 and 2, with S anew; and so on

Moments and decay go on everywhere. In the form dense a score is an element of S. In the form mix passes use

    W' = [(1 - M) T + M W - 0.3 T] / 0.7

for these matrices W, and W gets the gradient of W' times M. In the first stages M is 1 with probability 0.7 for all
weights of an input and T has the first values of W; then M is the choice and T has what W had when its stage began. A
score is an element of S divided by the number of the stage's steps whose M was 1 there, or by 1. This is the released
code (ZhangHaojie077/DPS), which divides S by 1000, and with stages of 50 steps and more multiplies scores by another
factor in the form mix.

Besides what all files hold:

    mask<step>.<parameter>    uint8, which elements of a matrix of WRITTEN have a gradient from that step on
"""

import math

import philox
import torch
import transformers
from method_fixtures import FIXTURES, SEED, STEPS, WRITTEN, Vanilla, float64
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
        self.sums, self.masks, self.chosen = {}, {}, {}

    def weights(self, step):
        stage, first = divmod(step, STAGE)
        self.chooses = stage % 2 == 1
        if self.chooses and first == 0:
            self.masks = {name: highest(self.scores(name)) for name in self.matrices}
            self.chosen |= {f"mask{step + 1}.{name}": self.masks[name] for name in WRITTEN if name in self.masks}
        return self.leaves

    def pull_gradients(self):
        for name in self.matrices:
            gradient = self.leaves[name].grad
            if self.chooses:
                gradient *= self.masks[name]
            else:
                self.sums[name] = gradient.square() + (self.sums[name] if self.step % STAGE else 0)

    def scores(self, name):
        """Returns what the elements of a matrix are chosen by."""
        return self.sums[name]

    def run(self):
        values = super().run()
        return values | {name: mask.to(torch.uint8) for name, mask in self.chosen.items()}


class Mix(Dense):
    """And passes use other weights in place of those that have no gradient."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def weights(self, step):
        weights = super().weights(step)
        if step % STAGE == 0:
            begun = {name: self.leaves[name].detach().clone() for name in self.matrices}
            self.targets = begun if self.chooses else self.start
        return weights | {name: self.mixed(name, step) for name in self.matrices}

    def mixed(self, name, step):
        leaf, target = self.leaves[name], self.targets[name]
        if self.chooses:
            mask = self.masks[name].double()
        else:
            key = philox.of_part(philox.derive(SEED, philox.MIXOUT, step), self.order.index(name))
            mask = float64(philox.kept(key, [[0, 0, 0]], leaf.shape[1], SHARE))
            self.counts[name] = mask + (self.counts[name] if step % STAGE else 0)
        value = ((1 - mask) * target + mask * leaf - (1 - SHARE) * target) / SHARE
        # The second term is 0 and has the gradient times M.
        return value.detach() + mask * (leaf - leaf.detach())

    def scores(self, name):
        return self.sums[name] / self.counts[name].clamp(min=1)


def write_dps():
    """Writes the files of DPS, beside those of other methods."""
    for name, method in {"dps_dense": Dense, "dps_mix": Mix}.items():
        save_file(method().run(), FIXTURES / "methods" / f"{name}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    write_dps()
