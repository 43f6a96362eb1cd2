"""Ten training steps in which pulls, masks, clipping, updates and decay meet, each order as the program documents it.

Called by make_fixtures.py. As in method_fixtures.py, with these differences: the gradient is clipped to a norm of 0.05, which
always cuts; weight decay is 0.1; and a head that is new (its values are those of the folder) is pulled towards 0, or not at
all. A step of learning rate r is, with the mask M, s = 1/p in F and 1 else, and p_i = 1 for weights that M does not reach:

    g   gradient of the loss, + alpha (w - w0), + beta w in a new head            L2-SP
    g   M s g, then clipped; or clipped, then M s g                               clip: after_mask, before_mask
    w   w - r strength (w - w0), or w - r strength w in a new head                weight decay towards the start
    w   AdamW's step times the share, 1 in a new head; torch's form decays before the update, the legacy form after it
    w   w - r (1 - share) gamma (w - w0), not in a new head; then decay           RecAdam

Decay reaches matrices and embeddings, and with `decay_scope: child` what is in the mask alone.
"""

import math

import philox
import torch
import transformers
from method_fixtures import FIXTURES, PEAK, SEED, STEPS, Vanilla, float64
from safetensors.torch import save_file

LIMIT = 0.05
DECAY = 0.1
EPSILON = 1e-4


class Ordered(Vanilla):
    """One setting of what is above."""

    def __init__(
        self, mask=None, before=False, decay_all=False, legacy=False, l2=None, prior=None, recadam=None,
        new_head=False, layer_decay=1.0, factor=1.0,
    ):  # fmt: skip
        super().__init__()
        self.mask, self.before, self.decay_all, self.legacy = mask, before, decay_all, legacy
        self.l2, self.prior, self.recadam, self.new_head = l2, prior, recadam, new_head
        self.layer_decay, self.factor = layer_decay, factor
        self.moments = {name: [torch.zeros_like(leaf) for _ in range(2)] for name, leaf in self.leaves.items()}
        if mask and mask[0] == "magnitude":
            self.fixed = {name: self.largest(name) for name in self.leaves if not name.startswith("classifier")}

    def largest(self, name):
        """Returns which round(p n) values of a parameter are largest; the first of equals."""
        values = self.leaves[name].abs().flatten()
        chosen = torch.sort(values, descending=True, stable=True).indices[: round(self.mask[1] * len(values))]
        return torch.zeros_like(values, dtype=torch.bool).index_fill(0, chosen, True).view_as(self.leaves[name])

    def drawn(self, step):
        """Returns F's mask of a step. Its numbers go through the parameters in the program's order, those that decay first,
        each from a multiple of 64 on."""
        starts, end = {}, 0
        for decays in (True, False):
            for name in self.order:
                if (self.leaves[name].dim() > 1) == decays:
                    starts[name] = end
                    end = (end + self.leaves[name].numel() + 63) // 64 * 64
        kept = philox.kept(philox.derive(SEED, 3, step), [[0, 0, 0]], end, self.mask[1])[0]
        part = {name: kept[start : start + self.leaves[name].numel()] for name, start in starts.items()}
        return {name: float64(values).view_as(self.leaves[name]) / self.mask[1] for name, values in part.items()}

    def factors(self, step):
        """Returns what the gradient of each parameter is multiplied by."""
        match self.mask:
            case None:
                return {}
            case ("f", _):
                return self.drawn(step)
            case _:
                return {name: mask.double() for name, mask in self.fixed.items()}

    def is_new(self, name):
        return self.new_head and name.startswith("classifier")

    def rate_factor(self, name):
        if ".embeddings." in name:
            return self.factor * self.layer_decay ** (self.layers + 2)
        if ".layer." in name:
            return self.factor * self.layer_decay ** (self.layers + 1 - int(name.split(".")[3]))
        return self.factor

    def decayed(self, name):
        """Returns which weights decay, as numbers 0 and 1."""
        leaf = self.leaves[name]
        if leaf.dim() == 1:
            return torch.zeros_like(leaf)
        is_fixed = self.mask and self.mask[0] == "magnitude" and name in self.fixed
        return self.fixed[name].double() if is_fixed and not self.decay_all else torch.ones_like(leaf)

    def clip(self, gradients):
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
        assert norm > LIMIT
        return {name: gradient * (LIMIT / (norm + 1e-6)) for name, gradient in gradients.items()}

    def run(self):
        losses, values = [], {}
        for step in range(STEPS):
            leaves = {name: leaf.requires_grad_() for name, leaf in self.leaves.items()}
            loss = self.loss(step, leaves)
            gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
            losses.append(loss.item())
            with torch.no_grad():
                self.leaves = {name: leaf.detach().clone() for name, leaf in leaves.items()}
                self.step_with(step, gradients)
            if step in (0, STEPS - 1):
                values |= {f"step{step + 1}.{name}": value.float() for name, value in self.written().items()}
        return values | {"losses": torch.tensor(losses, dtype=torch.float64)}

    def step_with(self, step, gradients):
        """Takes a step with the gradients of the loss."""
        if self.l2:
            for name, leaf in self.leaves.items():
                is_new = self.is_new(name)
                gradients[name] = gradients[name] + (
                    self.l2[1] * leaf if is_new else self.l2[0] * (leaf - self.start[name])
                )
        factors = self.factors(step)

        def masked(gradients):
            return {name: gradient * factors.get(name, 1.0) for name, gradient in gradients.items()}

        gradients = masked(self.clip(gradients)) if self.before else self.clip(masked(gradients))
        for name in self.leaves:
            self.update_one(name, gradients[name], step)

    def update_one(self, name, gradient, step):
        leaf, start, new = self.leaves[name], self.start[name], self.is_new(name)
        rate = PEAK * (1 - step / STEPS) * self.rate_factor(name)
        decayed, share = self.decayed(name), 1.0
        if self.prior is not None:
            leaf -= rate * self.prior * decayed * (leaf if new else leaf - start)
        if self.recadam:
            k, t0, gamma = self.recadam
            share = 1 / (1 + math.exp(-k * (step + 1 - t0)))
        decay = rate * DECAY * decayed
        in_optimizer = self.prior is None and not self.recadam
        if in_optimizer and not self.legacy:
            leaf *= 1 - decay
        first, second = self.moments[name]
        first.mul_(0.9).add_(gradient, alpha=0.1)
        second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        bias = [1 - beta ** (step + 1) for beta in (0.9, 0.999)]
        update = first / bias[0] / ((second / bias[1]).sqrt() + EPSILON)
        if self.legacy:
            update = math.sqrt(bias[1]) / bias[0] * first / (second.sqrt() + EPSILON)
        leaf -= rate * (1.0 if new else share) * update
        if self.recadam and not new:
            leaf -= rate * (1 - share) * gamma * (leaf - start)
        if self.recadam or (in_optimizer and self.legacy):
            leaf -= decay * leaf


F = {"mask": ("f", 0.3)}
FIXED = {"mask": ("magnitude", 0.3)}
L2 = {"l2": (0.5, 0.3), "new_head": True}
RECADAM = {"recadam": (0.5, 5, 50), "new_head": True}

CASES = {
    "f": F,
    "f_before_legacy": {**F, "before": True, "legacy": True},
    "f_before_l2_sp": {**F, **L2, "before": True},
    "fixed": FIXED,
    "fixed_before_decay_all": {**FIXED, "before": True, "decay_all": True},
    "fixed_before_l2_sp": {**FIXED, **L2, "before": True},
    "fixed_prior": {**FIXED, "prior": 50, "new_head": True},
    "fixed_recadam": {**FIXED, **RECADAM},
    "recadam": RECADAM,
    "recadam_legacy_rates": {**RECADAM, "legacy": True, "layer_decay": 0.7, "factor": 0.5},
}


def write_orders():
    """Writes the files of all cases, beside those of methods."""
    for name, case in CASES.items():
        save_file(Ordered(**case).run(), FIXTURES / "methods" / f"order_{name}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    write_orders()
