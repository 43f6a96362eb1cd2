"""Ten training steps of fine-tuning methods, each written here from its definition with torch and transformers alone.

Called by make_fixtures.py. Each method is a file of tests/fixtures/methods/; what is common to all:

    model       bert_pair (3 layers, 3 classes, 5 examples) or bert_regression (1 layer, 7 examples), head as it comes
    step        all examples of the folder in file order as one batch: slot of an example = its row; seed 3
    schedule    learning rate of step t = 0..9 is 1e-3 (1 - t/10)
    clip        torch.nn.utils.clip_grad_norm_ to 1 over all that trains, after pulls on gradients
    optimizer   torch.optim.AdamW: betas 0.9 and 0.999, epsilon 1e-4, decay 0.01 on matrices and embeddings
    dropout     none, but where a method says so
    numbers     float64; random numbers are drawn in float32 (philox.py) and converted

A file holds

    losses              [10], float64, the loss of each step with its penalties (pulls on gradients or weights are none)
    norms               [10], float64, the gradient norm before clipping
    step1.<parameter>   values after step 1 of those of WRITTEN that train; step10.<parameter> after step 10; float32

and what the method's class says. All parameters count as pretrained, w0 are their first values.
"""

import functools
import math
import pathlib
import shutil

import numpy
import philox
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn import functional

FIXTURES = pathlib.Path(__file__).parent.parent / "tests" / "fixtures"

SEED = 3
STEPS = 10
PEAK = 1e-3
DECAY = 0.01
DROPOUT = 0.1
WORDS = "bert.embeddings.word_embeddings.weight"
OUTPUT = "classifier.weight"
WRITTEN = [
    WORDS,
    "bert.encoder.layer.0.attention.self.query.weight",
    "bert.encoder.layer.1.attention.self.value.weight",
    "bert.encoder.layer.2.intermediate.dense.weight",
    "bert.encoder.layer.2.output.dense.bias",
    "bert.encoder.layer.0.output.LayerNorm.weight",
    "bert.pooler.dense.weight",
    OUTPUT,
    "classifier.bias",
]


def declaration_order(layers):
    """Returns the names of all parameters in the order in which the program declares them."""
    tables = ["word_embeddings", "position_embeddings", "token_type_embeddings"]
    parts = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
    parts += ["intermediate.dense", "output.dense", "attention.output.LayerNorm", "output.LayerNorm"]
    names = [f"bert.embeddings.{table}.weight" for table in tables]
    modules = ["bert.embeddings.LayerNorm"]
    modules += [f"bert.encoder.layer.{layer}.{part}" for layer in range(layers) for part in parts]
    modules += ["bert.pooler.dense", "classifier"]
    return names + [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]


def float64(array):
    """Returns a numpy array as a float64 tensor."""
    return torch.from_numpy(array).double()


def divergence(first, second):
    """Returns KL(p || q) + KL(q || p) of the softmax of two sets of logits, summed over classes and examples."""
    p, q = functional.log_softmax(first, -1), functional.log_softmax(second, -1)
    return ((p.exp() - q.exp()) * (p - q)).sum()


def squared_difference(first, second):
    """Returns the squared difference of two sets of scores, summed over examples."""
    return (first - second).square().sum()


def divergence_from_constant(first, second):
    """Returns KL(p || q) of the softmax of two sets of logits, summed over classes and examples; p has no gradient."""
    p = functional.log_softmax(first.detach(), -1)
    return (p.exp() * (p - functional.log_softmax(second, -1))).sum()


class PatternDropout(torch.nn.Module):
    """The program's dropout at one place of the network (src/model/dropout.rs): rows are tokens, or one an example."""

    def __init__(self, method, site):
        super().__init__()
        self.method, self.site = method, site

    def forward(self, states):
        if self.method.dropout == 0:
            return states
        rows = token_rows(states, self.site) if states.dim() == 3 else example_rows(states, self.site)
        key = philox.derive(SEED, self.method.dropout_purpose, self.method.step)
        keep = philox.kept(key, rows, states.shape[-1], 1 - self.method.dropout)
        scale = float(numpy.float32(1 / (1 - self.method.dropout)))
        return states * float64(keep).reshape(states.shape) * scale


def token_rows(states, site):
    """Returns the names [position, slot, site] of the rows of states `[examples, tokens, width]`."""
    examples, tokens = states.shape[:2]
    return [[position, slot, site] for slot in range(examples) for position in range(tokens)]


def example_rows(states, site):
    """Returns the names [0, slot, site] of the rows of states `[examples, width]`."""
    return [[0, slot, site] for slot in range(len(states))]


class Vanilla:
    """Fine-tuning of all parameters, and where the methods differ from it."""

    def __init__(self, folder="bert_pair", dropout=0.0):
        self.folder, self.dropout = FIXTURES / folder, dropout
        self.model = transformers.BertForSequenceClassification.from_pretrained(
            self.folder, attn_implementation="eager", dtype=torch.float64, attention_probs_dropout_prob=0.0
        ).train()
        self.batch = load_file(self.folder / "reference.safetensors")
        self.labels = self.batch["labels"]
        self.examples = len(self.labels)
        self.layers = len(self.model.bert.encoder.layer)
        self.order = declaration_order(self.layers)
        self.leaves = {name: value.detach().clone() for name, value in self.model.named_parameters()}
        assert sorted(self.leaves) == sorted(self.order)
        self.start = {name: value.clone() for name, value in self.leaves.items()}
        self.place_dropout()

    def place_dropout(self):
        """Puts the program's dropout where BERT has its own; attention counts a place of its own before the others."""
        bert = self.model.bert
        bert.embeddings.dropout = PatternDropout(self, 0)
        for number, layer in enumerate(bert.encoder.layer):
            layer.attention.output.dropout = PatternDropout(self, 3 * number + 2)
            layer.output.dropout = PatternDropout(self, 3 * number + 3)
        self.model.dropout = PatternDropout(self, 3 * self.layers + 1)

    # What methods change.

    def trained(self):
        """Returns the names of the leaves that train."""
        return list(self.leaves)

    def weights(self, step):
        """Returns the weights that the passes of a step use."""
        return self.leaves

    def loss(self, step, weights):
        """Returns the loss of a step."""
        return self.task_loss(self.outputs(step, weights))

    def pull_gradients(self):
        """Changes gradients before they are clipped."""

    def rate_factor(self, name):
        """Returns the factor on a parameter's learning rate."""
        return 1.0

    def update(self, step, rate):
        """Changes the leaves, given their gradients and the learning rate."""
        self.adamw(rate)

    def written(self):
        """Returns the values to write."""
        return {name: self.leaves[name] for name in WRITTEN if name in self.trained()}

    # What they are made of.

    def embedded(self, weights):
        """Returns the word embeddings of all tokens."""
        return weights[WORDS][self.batch["input_ids"]]

    def outputs(self, step, weights, shift=0.0, purpose=philox.DROPOUT, words=None):
        """Runs a training pass with `shift` added to the word embeddings, or to `words` in their place; returns logits, or
        scores `[examples]`."""
        self.step, self.dropout_purpose = step, purpose
        inputs = {name: self.batch[name] for name in ("attention_mask", "token_type_ids")}
        inputs["inputs_embeds"] = (self.embedded(weights) if words is None else words) + shift
        outputs = torch.func.functional_call(self.model, weights, kwargs=inputs).logits
        return outputs if self.labels.dtype == torch.int64 else outputs.squeeze(-1)

    def task_loss(self, outputs):
        """Returns the mean loss of the examples."""
        if self.labels.dtype == torch.int64:
            return functional.cross_entropy(outputs, self.labels)
        return functional.mse_loss(outputs, self.labels.double())

    def difference(self, first, second):
        """Returns how far two sets of outputs are apart, as the mean over examples."""
        measure = divergence if self.labels.dtype == torch.int64 else squared_difference
        return measure(first, second) / self.examples

    def noise(self, draw, step, site, size, states):
        """Returns noise for states `[examples, tokens, width]`: that of a step and a site."""
        key = philox.derive(SEED, philox.NOISE, step)
        return float64(draw(key, token_rows(states, site), states.shape[-1], size)).reshape(states.shape)

    def adamw(self, rate, decay=DECAY):
        """Takes a step of torch.optim.AdamW."""
        if not hasattr(self, "optimizer"):
            groups = [{"params": [self.leaves[name]], "name": name} for name in self.trained()]
            self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-4, foreach=False, fused=False)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * self.rate_factor(group["name"])
            group["weight_decay"] = decay if self.leaves[group["name"]].dim() > 1 else 0.0
        self.optimizer.step()

    def run(self):
        """Trains; returns what the file holds."""
        losses, norms, values = [], [], {}
        for name in self.trained():
            self.leaves[name].requires_grad_()
        for step in range(STEPS):
            trained = [self.leaves[name] for name in self.trained()]
            for leaf in trained:
                leaf.grad = None
            loss = self.loss(step, self.weights(step))
            loss.backward()
            with torch.no_grad():
                self.pull_gradients()
                norms.append(float(torch.nn.utils.clip_grad_norm_(trained, 1.0, foreach=False)))
                self.update(step, PEAK * (1 - step / STEPS))
            losses.append(loss.item())
            if step in (0, STEPS - 1):
                values |= {f"step{step + 1}.{name}": value.detach().float() for name, value in self.written().items()}
        curves = {"losses": losses, "norms": norms}
        return values | {name: torch.tensor(curve, dtype=torch.float64) for name, curve in curves.items()}


class L2SP(Vanilla):
    """g += alpha (w - w0): no parameter is new here, so beta has nothing to pull."""

    def __init__(self, alpha):
        super().__init__()
        self.alpha = alpha

    def pull_gradients(self):
        for name, leaf in self.leaves.items():
            leaf.grad += self.alpha * (leaf - self.start[name])


class PriorWeightDecay(Vanilla):
    """w += rate strength (w0 - w) where there is decay, which it takes the place of, then the optimizer's step."""

    def __init__(self, strength):
        super().__init__()
        self.strength = strength

    def update(self, step, rate):
        for name, leaf in self.leaves.items():
            if leaf.dim() > 1:
                leaf += rate * self.strength * (self.start[name] - leaf)
        self.adamw(rate, decay=0.0)


class RecAdam(Vanilla):
    """With share = sigmoid(k (step - t0)), steps counted from 1: Adam's step times share, then
    w -= rate (1 - share) gamma (w - w0), then w -= rate decay w where there is decay."""

    def __init__(self, k, t0, gamma):
        super().__init__()
        self.k, self.t0, self.gamma = k, t0, gamma

    def update(self, step, rate):
        share = 1 / (1 + math.exp(-self.k * (step + 1 - self.t0)))
        self.adamw(rate * share, decay=0.0)
        for name, leaf in self.leaves.items():
            leaf -= rate * (1 - share) * self.gamma * (leaf - self.start[name])
            if leaf.dim() > 1:
                leaf -= rate * DECAY * leaf


class LayerWiseRates(Vanilla):
    """The learning rate times decay^(layers + 2) in the embeddings, decay^(layers + 1 - i) in layer i, 1 above."""

    def __init__(self, decay):
        super().__init__()
        self.decay = decay

    def rate_factor(self, name):
        if ".embeddings." in name:
            return self.decay ** (self.layers + 2)
        if ".layer." in name:
            return self.decay ** (self.layers + 1 - int(name.split(".")[3]))
        return 1.0


class Mixout(Vanilla):
    """W' = [(1 - M) W0 + M W - q W0] / (1 - q) for the matrix of every linear layer; M is 1 with probability 1 - q.

    By input neuron, M has one number an input, and W gets the gradient of W' times M, without 1 / (1 - q), as in the
    released code (bloodwass/mixout). By weight, M has one number a weight and the gradient is that of the formula.
    """

    def __init__(self, q, by_input):
        super().__init__()
        self.q, self.by_input = q, by_input

    def weights(self, step):
        matrices = [name for name, leaf in self.leaves.items() if leaf.dim() == 2 and ".embeddings." not in name]
        return self.leaves | {name: self.mixed(name, step) for name in matrices}

    def mixed(self, name, step):
        leaf, start = self.leaves[name], self.start[name]
        key = philox.of_part(philox.derive(SEED, philox.MIXOUT, step), self.order.index(name))
        numbers = leaf.shape[1] if self.by_input else leaf.numel()
        mask = float64(philox.kept(key, [[0, 0, 0]], numbers, 1 - self.q)).reshape(-1, leaf.shape[1])
        value = ((1 - mask) * start + mask * leaf - self.q * start) / (1 - self.q)
        # The second term is 0 and has the gradient times M.
        return value.detach() + mask * (leaf - leaf.detach()) if self.by_input else value


class R3F(Vanilla):
    """Task loss + strength D(f(e + z), f(e)), z noise on the word embeddings e, a constant in f(e + z).

    D is KL(p || q) + KL(q || p) in classes and the squared difference in scores, as means over examples, with the gradients
    of both sides. The released code (fairseq, sentence_prediction_r3f.py) has no D for scores.
    """

    def __init__(self, strength, epsilon, draw, folder="bert_pair"):
        super().__init__(folder)
        self.strength, self.epsilon, self.draw = strength, epsilon, draw

    def loss(self, step, weights):
        words = self.embedded(weights).detach()
        noise = self.noise(self.draw, step, 0, self.epsilon, words)
        clean, noised = self.outputs(step, weights), self.outputs(step, weights, noise, words=words)
        return self.task_loss(clean) + self.strength * self.difference(noised, clean)


class R4F(R3F):
    """R3F, and both passes use W / sigma for the matrix W of the head; the file has W.

    One power iteration a step, as in torch.nn.utils.spectral_norm: v = W^T u / |W^T u|, u = W v / |W v|, both constants;
    sigma = u^T W v. The first u is random; v needs no start.
    """

    def weights(self, step):
        leaf = self.leaves[OUTPUT]
        if step == 0:
            numbers = philox.normal(philox.derive(SEED, philox.HEAD, 0), [[1, 0, 0]], leaf.shape[0], 1.0)
            self.left = functional.normalize(float64(numbers[0]), dim=0, eps=1e-12)
        with torch.no_grad():
            right = functional.normalize(leaf.T @ self.left, dim=0, eps=1e-12)
            self.left = functional.normalize(leaf @ right, dim=0, eps=1e-12)
        return self.leaves | {OUTPUT: leaf / (self.left @ leaf @ right)}


class Smart(Vanilla):
    """Task loss + alpha R(f(e), f(e + d)), e the word embeddings and d a shift of theirs that moves the output far.

        z = normal noise,  g = gradient by z of sum over examples of [KL(p' || p) + KL(p || p')]
        d = z + step_size g / (max |g| + epsilon), cut to [-radius, radius]
        R = [KL(p' as a constant || p) + KL(p as a constant || p')] / examples

    with p the softmax of f(e), a constant in g, and p' that of f(e + z), then of f(e + d); the maximum is over the numbers
    of a token. In scores g and R are of squared differences, with the gradients of both sides in R. d is a constant; weights get no gradient from g, and that of R through both passes, e included.

    This is algorithm 1 of Jiang et al. (2020) with one step. R and its constants are those of the released code
    (namisan/mt-dnn, SymKlCriterion), and so are the sum in g and epsilon. That code's last version takes
    d = (z + step_size g) / (max |z + step_size g| + epsilon), about 1 whatever step_size, on embeddings that are already
    normalised: word embeddings are far smaller. Its first version takes d as here without z and bound.
    """

    def __init__(self, alpha, step_size, deviation, radius, epsilon=1e-6, folder="bert_pair"):
        super().__init__(folder)
        self.alpha, self.step_size, self.deviation = alpha, step_size, deviation
        self.radius, self.epsilon = radius, epsilon

    def loss(self, step, weights):
        clean = self.outputs(step, weights)
        shifted = self.outputs(step, weights, self.shift(step, weights, clean.detach()))
        if self.labels.dtype == torch.int64:
            distance = divergence_from_constant(shifted, clean) + divergence_from_constant(clean, shifted)
        else:
            distance = squared_difference(shifted, clean)
        return self.task_loss(clean) + self.alpha * distance / self.examples

    def shift(self, step, weights, clean):
        noise = self.noise(philox.normal, step, 1, self.deviation, self.embedded(weights)).requires_grad_()
        measure = divergence if self.labels.dtype == torch.int64 else squared_difference
        (ascent,) = torch.autograd.grad(measure(self.outputs(step, weights, noise), clean), noise)
        largest = ascent.abs().amax(-1, keepdim=True)
        shift = noise.detach() + self.step_size * ascent / (largest + self.epsilon)
        return shift.clamp(-self.radius, self.radius)


class RDrop(Vanilla):
    """Task losses of two passes with different dropout, added, + alpha D: half of KL(p || q) + KL(q || p) in classes, the
    squared difference in scores, as means over examples."""

    def __init__(self, alpha, folder="bert_pair"):
        super().__init__(folder, DROPOUT)
        self.alpha = alpha

    def loss(self, step, weights):
        first = self.outputs(step, weights)
        second = self.outputs(step, weights, purpose=philox.SECOND_DROPOUT)
        half = 0.5 if self.labels.dtype == torch.int64 else 1.0
        task = self.task_loss(first) + self.task_loss(second)
        return task + self.alpha * half * self.difference(first, second)


class HyPe(Vanilla):
    """Noise is added to the states that enter each encoder layer, those of the embeddings included.

    Uniform noise is from (-scale, scale); the released code (Yuanhy1997/HyPe) draws it from [0, scale).
    """

    def __init__(self, scale, draw):
        super().__init__()
        self.scale, self.draw = scale, draw
        for number, layer in enumerate(self.model.bert.encoder.layer):
            layer.register_forward_pre_hook(functools.partial(self.with_noise, number))

    def with_noise(self, number, _, inputs):
        states, *others = inputs
        return (states + self.noise(self.draw, self.step, 16 + number, self.scale, states), *others)


class LoRA(Vanilla):
    """W = W0 + (alpha / rank) B A for the targets of all layers; A, B and the head train, A and B with decay.

    The file has `<module>.lora_A` [rank, in] and `<module>.lora_B` [out, rank] of all of these modules, the merged W of
    those of WRITTEN, and the head.
    """

    def __init__(self, rank, alpha, targets):
        super().__init__()
        self.factor = alpha / rank
        self.targets = [name for name in self.order if name.endswith(tuple(f"{target}.weight" for target in targets))]
        for name in self.targets:
            key = philox.of_part(philox.derive(SEED, philox.HEAD, 0), self.order.index(name))
            output, width = self.leaves[name].shape
            numbers = philox.normal(key, [[3, 0, 0]], rank * width, 1 / rank)
            self.leaves[self.pair(name)[0]] = float64(numbers).reshape(rank, width)
            self.leaves[self.pair(name)[1]] = torch.zeros(output, rank, dtype=torch.float64)

    def pair(self, name):
        """Returns the names of A and B of a matrix."""
        return [name.removesuffix("weight") + factor for factor in ("lora_A", "lora_B")]

    def trained(self):
        return [factor for name in self.targets for factor in self.pair(name)] + [OUTPUT, "classifier.bias"]

    def weights(self, step):
        weights = {name: self.leaves[name] for name in self.order}
        for name in self.targets:
            first, second = (self.leaves[factor] for factor in self.pair(name))
            weights[name] = self.leaves[name] + self.factor * second @ first
        return weights

    def written(self):
        merged = self.weights(STEPS)
        names = [name for name in WRITTEN if name in self.targets]
        return {name: self.leaves[name] for name in self.trained()} | {name: merged[name] for name in names}


CASES = {
    "vanilla": Vanilla,
    "vanilla_dropout": lambda: Vanilla(dropout=DROPOUT),
    "l2_sp": lambda: L2SP(alpha=0.3),
    "prior_weight_decay": lambda: PriorWeightDecay(strength=50),
    "recadam": lambda: RecAdam(k=0.5, t0=5, gamma=50),
    "layer_wise_rates": lambda: LayerWiseRates(decay=0.7),
    "mixout_input_neuron": lambda: Mixout(q=0.3, by_input=True),
    "mixout_weight": lambda: Mixout(q=0.3, by_input=False),
    "r3f_uniform": lambda: R3F(strength=2, epsilon=0.02, draw=philox.uniform),
    "r3f_normal": lambda: R3F(strength=2, epsilon=0.02, draw=philox.normal),
    "r3f_regression_mse": lambda: R3F(strength=2, epsilon=0.02, draw=philox.uniform, folder="bert_regression"),
    "r4f": lambda: R4F(strength=1, epsilon=0.02, draw=philox.uniform),
    "smart": lambda: Smart(alpha=1, step_size=0.1, deviation=0.01, radius=0.05),
    "smart_regression": lambda: Smart(
        alpha=1, step_size=0.1, deviation=0.01, radius=0.05, folder="bert_regression"
    ),
    "r_drop": lambda: RDrop(alpha=1.5),
    "r_drop_regression": lambda: RDrop(alpha=1.5, folder="bert_regression"),
    "hype_normal": lambda: HyPe(scale=0.05, draw=philox.normal),
    "hype_uniform": lambda: HyPe(scale=0.05, draw=philox.uniform),
    "lora": lambda: LoRA(rank=3, alpha=6, targets=["query", "value"]),
}


def write_methods():
    """Writes the files of all methods."""
    folder = FIXTURES / "methods"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, method in CASES.items():
        save_file(method().run(), folder / f"{name}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    write_methods()
