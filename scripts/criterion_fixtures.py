"""Masks of criteria other than Child-Tuning_D's, and a training with one of them, on the model folder bert_pair.

Called by make_fixtures.py. The data are the five examples of bert_pair, dropout is off, everything is in float64. Each file
of tests/fixtures/criteria/ has

    share                [1], float64: p
    mask/<parameter>     uint8, the bits of the mask, element 0 in the lowest bit of byte 0; none of the head, which trains

and is named for its method:

    fish_mask_empirical, fish_mask_expected
        the highest squared gradients, summed over examples one by one; the head is counted in the share of all weights
    sift                 of each tensor, the largest gradients of the mean loss
    magnitude_mask, magnitude_mask_lowest
        of each tensor, the largest and the smallest weights
    lt_sft               the weights that moved farthest in TRAINING without a mask; and, from the same start,
        after/<parameter>    float32: after TRAINING with the mask, the members in their order; of the head everything

The margin at the edge of every mask is wider than what float32 may move it by; where it would not be, this stops. Rules
for each tensor leave out the biases of keys: their gradient is 0 but for rounding.
"""

import math
import pathlib
import shutil

import numpy
import torch
import transformers
from safetensors.torch import load_file, save_file

FIXTURES = pathlib.Path(__file__).parent.parent / "tests" / "fixtures"

# All examples in every step, in the order of the file.
TRAINING = dict(steps=10, learning_rate=1e-3, epsilon=1e-4, weight_decay=0.01, clip=1.0)
# Least distance of the scores on both sides of the edge, relative to the largest score that is compared.
MARGIN = 2e-5


def start():
    """Returns the model of bert_pair without dropout in float64, and its inputs."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        FIXTURES / "bert_pair",
        attn_implementation="eager",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        dtype=torch.float64,
    )
    reference = load_file(FIXTURES / "bert_pair" / "reference.safetensors")
    return model.train(), {key: reference[key] for key in ["input_ids", "attention_mask", "token_type_ids", "labels"]}


def is_head(name):
    """Returns whether a parameter is of the head."""
    return name.startswith("classifier")


def gradient(model, loss):
    """Returns the gradient of a loss by parameter name."""
    model.zero_grad()
    loss.backward(retain_graph=True)
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def add(sums, gradients, weight=1.0):
    """Adds weighted squares of gradients to `sums`."""
    for name, own in gradients.items():
        sums[name] = sums.get(name, 0.0) + weight * own**2


def empirical_fisher(model, inputs):
    """Returns the sum over examples of squared gradients of the loss at the labels of the data."""
    sums = {}
    for row in range(len(inputs["labels"])):
        add(sums, gradient(model, model(**{key: array[row : row + 1] for key, array in inputs.items()}).loss))
    return sums


def expected_fisher(model, inputs):
    """Returns the sum over examples of the expectation over the model's labels of squared gradients."""
    sums = {}
    for row in range(len(inputs["labels"])):
        logits = model(**{key: array[row : row + 1] for key, array in inputs.items() if key != "labels"}).logits
        logarithms = logits.log_softmax(-1)[0]
        for logarithm in logarithms:
            add(sums, gradient(model, -logarithm), logarithm.exp().item())
    return sums


def members(scores, count, largest=True):
    """Returns which of some scores, a dictionary of tensors, are the `count` largest or smallest of all together."""
    flat = torch.cat([own.ravel() for own in scores.values()])
    order = torch.argsort(flat, descending=largest, stable=True)
    if 0 < count < len(flat):
        gap = (flat[order[count - 1]] - flat[order[count]]).abs() / flat.max()
        assert gap > MARGIN, f"{list(scores)[:1]} of {len(scores)}: another share, the edge is {gap:.1e} wide"
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    chosen[order[:count]] = True
    sizes = [own.numel() for own in scores.values()]
    parts = torch.split(chosen, sizes)
    return {name: part.reshape(own.shape) for (name, own), part in zip(scores.items(), parts, strict=True)}


def share_of(share, total):
    """Returns round(p n) with halves away from zero."""
    return math.floor(share * total + 0.5)


def without_head(scores):
    """Returns the scores of what the masks reach."""
    return {name: own for name, own in scores.items() if not is_head(name)}


def budgeted(model, scores, share):
    """Returns FISH Mask's mask: the head has the first part of the budget."""
    total = sum(parameter.numel() for parameter in model.parameters())
    head = sum(parameter.numel() for name, parameter in model.named_parameters() if is_head(name))
    budget = share_of(share, total)
    assert budget == int(share * total), "where the released code cuts down instead of rounding, take another share"
    return members(without_head(scores), budget - head)


def per_tensor(scores, share, largest=True):
    """Returns the mask of the largest or smallest scores of each tensor."""
    mask = {}
    for name, own in without_head(scores).items():
        if not name.endswith("key.bias"):
            mask |= members({name: own}, share_of(share, own.numel()), largest)
    return mask


def train(model, inputs, mask=None):
    """Takes the steps of TRAINING; with a mask, what it leaves out keeps its value."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": TRAINING["weight_decay"]},
            {"params": vectors, "weight_decay": 0.0},
        ],
        eps=TRAINING["epsilon"],
    )
    for step in range(TRAINING["steps"]):
        for group in optimizer.param_groups:
            group["lr"] = TRAINING["learning_rate"] * (1 - step / TRAINING["steps"])
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        for name, parameter in model.named_parameters():
            if mask and not is_head(name):
                parameter.grad *= mask[name]
        torch.nn.utils.clip_grad_norm_(model.parameters(), TRAINING["clip"])
        optimizer.step()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if mask and not is_head(name):
                    # Weight decay of what does not train is taken back.
                    parameter.copy_(torch.where(mask[name], parameter, before[name]))
    return {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}


def write(name, share, mask, **further):
    """Writes one file."""
    bits = {
        f"mask/{key}": torch.from_numpy(numpy.packbits(own.numpy().ravel(), bitorder="little"))
        for key, own in mask.items()
    }
    tensors = {"share": torch.tensor([share], dtype=torch.float64), **bits, **further}
    save_file(tensors, FIXTURES / "criteria" / f"{name}.safetensors")


def write_criteria():
    """Writes all files."""
    shutil.rmtree(FIXTURES / "criteria", ignore_errors=True)
    (FIXTURES / "criteria").mkdir()
    model, inputs = start()

    for name, scores in [("empirical", empirical_fisher(model, inputs)), ("expected", expected_fisher(model, inputs))]:
        write(f"fish_mask_{name}", 0.035, budgeted(model, scores, 0.035))
    magnitudes = {name: own.abs() for name, own in gradient(model, model(**inputs).loss).items()}
    write("sift", 0.05, per_tensor(magnitudes, 0.05))
    weights = {name: parameter.detach().abs() for name, parameter in model.named_parameters()}
    write("magnitude_mask", 0.053, per_tensor(weights, 0.053))
    write("magnitude_mask_lowest", 0.053, per_tensor(weights, 0.053, largest=False))

    changes = {name: own.abs() for name, own in train(model, inputs).items()}
    scores = without_head(changes)
    mask = members(scores, share_of(0.029, sum(own.numel() for own in scores.values())))
    model, inputs = start()
    train(model, inputs, mask)
    after = {
        f"after/{name}": (parameter.detach() if is_head(name) else parameter.detach()[mask[name]]).float().contiguous()
        for name, parameter in model.named_parameters()
    }
    write("lt_sft", 0.029, mask, **after)


if __name__ == "__main__":
    torch.set_num_threads(1)
    write_criteria()
