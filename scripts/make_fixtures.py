"""Writes the reference numbers under tests/fixtures/ that the Rust tests are held to.

    pip install -r requirements-dev.txt
    pip install --no-deps modelscope==1.40.2
    python scripts/make_fixtures.py

Everything comes from torch, transformers and the authors' released optimizer, in float32 on one CPU thread, from
fixed seeds: a second run writes the same bytes. Steps, batches and examples count from 0.

    bert_single/, bert_pair/, bert_regression/   see write_bert
    optimizer.safetensors                        see write_optimizer
    schedule.json                                see write_schedule
    fisher/                                      see write_fisher
    fisher_regression/                           see write_fisher_regression
    weights/                                     see write_weights in weight_fixtures.py
    families/                                    see family_fixtures.py
    methods/                                     see method_fixtures.py, dps_fixtures.py and order_fixtures.py; in float64
    criteria/                                    see criterion_fixtures.py; in float64
"""

import contextlib
import io
import pathlib
import sys

import numpy
import torch
import transformers
from safetensors.torch import save_file

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import released_optimizer  # noqa: E402  (a neighbour of this file)
from criterion_fixtures import write_criteria  # noqa: E402
from dps_fixtures import write_dps  # noqa: E402
from family_fixtures import write_families  # noqa: E402
from method_fixtures import write_methods  # noqa: E402
from order_fixtures import write_orders  # noqa: E402
from tiny_bert import encode, random_classifier, tiny_config, write_json, write_model_folder  # noqa: E402
from weight_fixtures import write_weights  # noqa: E402

FIXTURES = pathlib.Path(__file__).parent.parent / "tests" / "fixtures"

SINGLE_TEXTS = [
    "Dogs?",
    "the child network trains only some weights.",
    "a cat and a dog sitting on the mat, near the river bank",
    "sentences of a small model is not far",
    "quartz jigs vex the model and two bankers, with apples",
    "cats on mats",
]
SINGLE_LABELS = [0, 1, 1, 0, 1, 1]

PAIR_TEXTS = [
    ("a", "b"),
    ("the cat sits on the mat.", "the mat is near the cat"),
    ("a dog reads two sentences", "not a dog, a cat?"),
    ("large models trained with apples", "Zebras jump on the river bank."),
    ("the bank is far.", "two"),
]
PAIR_LABELS = [2, 0, 1, 1, 2]

# The tokenizer of this folder keeps case, so words with a capital are unknown to it.
REGRESSION_TEXTS = [
    "apples",
    "two dogs sit near the Cat and the river",
    "Unknown words, with a known end",
    "the child is small",
    "a network of weights trains on sentences of the river bank, not on mats and apples.",
    "is a dog a model?",
    "far",
]
REGRESSION_LABELS = [0.0, 3.5, 1.25, 5.0, 2.75, 4.2, 0.8]

FISHER_TEXTS = [
    ("the cat sits", "a cat sits on the mat"),
    ("two dogs", "not two apples"),
    ("the river bank is far.", "far is the river"),
    ("a small model", "the model trains"),
    ("weights and networks", "the child reads a sentence"),
    ("a", "some"),
    ("dogs near the bank", "cats near the bank?"),
    ("only some weights", "the large network trained only some weights"),
    ("is the mat small", "the mat is not large"),
    ("child tuning", "tuning a child network, with apples"),
    ("the dog is not a cat.", "a cat is not the dog"),
]
FISHER_LABELS = [0, 1, 2, 1, 0, 2, 2, 1, 0, 0, 1]
FISHER_SCORES = [4.0, 0.5, 3.5, 1.0, 2.5, 0.0, 4.5, 3.0, 1.5, 2.0, 5.0]
FISHER_BATCH_SIZE = 4
FISHER_SHARE = 0.3


def rows(inputs, start, end):
    """Returns the examples `start` to `end` (exclusive) of the padded arrays."""
    return {name: array[start:end] for name, array in inputs.items()}


def gradients(model, inputs):
    """Returns the mean loss over `inputs` and its gradient for every parameter, by name."""
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def prefixed(prefix, tensors):
    """Returns `tensors` with every name put under `prefix`."""
    return {f"{prefix}/{name}": tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def write_bert(name, texts, labels, seed, config, lower_case=True, tokenizer_json=False):
    """Writes the model folder `name` with `examples.json` and `reference.safetensors`.

    examples.json: a list of {"text", "text_pair" (null for single sentences), "label"}.
    reference.safetensors, for all examples as one batch:
        input_ids, attention_mask, token_type_ids   [examples, tokens], int64, padded at the right with 0
        labels                                      [examples], int64 classes or float32 scores
        logits                                      [examples, labels]
        loss                                        [1], mean cross-entropy, or mean squared error
        gradient/<parameter>                        gradient of the loss; that of every key bias is 0 but for rounding
    """
    folder = FIXTURES / name
    model = random_classifier(config, seed, spread=0.3)
    tokenizer = write_model_folder(folder, model, lower_case, tokenizer_json)
    inputs = encode(tokenizer, texts, labels)

    pairs = [(text, None) if isinstance(text, str) else text for text in texts]
    write_json(
        folder / "examples.json",
        [{"text": a, "text_pair": b, "label": label} for (a, b), label in zip(pairs, labels, strict=True)],
    )
    loss, gradient = gradients(model, inputs)
    with torch.no_grad():
        logits = model(**inputs).logits
    save_file(
        {**inputs, "logits": logits, "loss": loss.reshape(1), **prefixed("gradient", gradient)},
        folder / "reference.safetensors",
    )


def write_berts():
    """Writes the three model folders: each has its own sizes, activation, epsilon, head and kind of tokenizer file.

    The seeds are ones whose models tell the examples apart: most give one class to all of them.
    """
    write_bert(
        "bert_single",
        SINGLE_TEXTS,
        SINGLE_LABELS,
        seed=11,
        config=tiny_config(
            hidden_size=24,
            num_attention_heads=4,
            num_hidden_layers=2,
            intermediate_size=40,
            hidden_act="gelu",
            layer_norm_eps=1e-12,
            classifier_dropout=0.3,
            id2label={0: "unacceptable", 1: "acceptable"},
            label2id={"unacceptable": 0, "acceptable": 1},
        ),
    )
    write_bert(
        "bert_pair",
        PAIR_TEXTS,
        PAIR_LABELS,
        seed=1,
        tokenizer_json=True,
        config=tiny_config(
            hidden_size=32,
            num_attention_heads=2,
            num_hidden_layers=3,
            intermediate_size=48,
            hidden_act="gelu_new",
            layer_norm_eps=1e-5,
            problem_type="single_label_classification",
            id2label={0: "entailment", 1: "neutral", 2: "contradiction"},
            label2id={"entailment": 0, "neutral": 1, "contradiction": 2},
        ),
    )
    write_bert(
        "bert_regression",
        REGRESSION_TEXTS,
        REGRESSION_LABELS,
        seed=1,
        lower_case=False,
        config=tiny_config(
            hidden_size=20,
            num_attention_heads=5,
            num_hidden_layers=1,
            intermediate_size=36,
            hidden_act="relu",
            layer_norm_eps=1e-7,
            problem_type="regression",
            id2label={0: "score"},
            label2id={"score": 0},
        ),
    )


def linear_schedule(warmup, total):
    """Returns transformers' linear schedule as a function from step to the multiplier of the peak learning rate."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    return transformers.get_linear_schedule_with_warmup(optimizer, warmup, total).lr_lambdas[0]


def write_schedule():
    """Writes schedule.json: a list of {"warmup", "total", "multipliers"}, the multipliers for steps 0 to total."""
    schedules = []
    for warmup, total in [(0, 10), (3, 10), (10, 10), (5, 47)]:
        multiplier = linear_schedule(warmup, total)
        multipliers = [float(multiplier(step)) for step in range(total + 1)]
        schedules.append({"warmup": warmup, "total": total, "multipliers": multipliers})
    write_json(FIXTURES / "schedule.json", schedules)


def write_optimizer():
    """Writes optimizer.safetensors: ten steps of AdamW in both forms, on tensors `first`, `second`, `third`.

    Weight decay is 0.01 on `first` and `second` and 0 on `third`; betas 0.9 and 0.999; epsilon 1e-8. The gradients of
    `second` are about 1e-7, where the place of epsilon decides the step.
        initial/<name>, gradient/<step>/<name>
        learning_rates               [10], float64, a linear schedule with 3 warm-up steps (the first rate is 0)
        torch/<step>/<name>          the weights after that step of torch.optim.AdamW
        hf_legacy/<step>/<name>      the same of the released ChildTuningAdamW without a mask
    """
    torch.manual_seed(4)
    shapes = {"first": (7, 5), "second": (13,), "third": (3, 1, 11)}
    scales = {"first": 1.0, "second": 1e-7, "third": 1e-3}
    initial = {name: torch.randn(shape) for name, shape in shapes.items()}
    steps = [{name: torch.randn(shape) * scales[name] for name, shape in shapes.items()} for _ in range(10)]
    multiplier = linear_schedule(3, 10)
    learning_rates = [0.02 * multiplier(step) for step in range(10)]

    def run(optimizer_class, **options):
        weights = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in initial.items()}
        groups = [
            {"params": [weights["first"], weights["second"]], "weight_decay": 0.01},
            {"params": [weights["third"]], "weight_decay": 0.0},
        ]
        optimizer = optimizer_class(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, **options)
        after = {}
        for step, learning_rate in enumerate(learning_rates):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            for name, parameter in weights.items():
                parameter.grad = steps[step][name].clone()
            optimizer.step()
            after |= prefixed(str(step), weights)
        return after

    tensors = prefixed("initial", initial)
    for step, gradient in enumerate(steps):
        tensors |= prefixed(f"gradient/{step}", gradient)
    tensors["learning_rates"] = torch.tensor(learning_rates, dtype=torch.float64)
    tensors |= prefixed("torch", run(torch.optim.AdamW, foreach=False, fused=False))
    tensors |= prefixed("hf_legacy", run(released_optimizer.load().ChildTuningAdamW, mode=None, reserve_p=1.0))
    save_file(tensors, FIXTURES / "optimizer.safetensors")


def fisher_model(folder, inputs_of, **overrides):
    """Writes the model folder of a Fisher fixture; returns the model and its data set `inputs_of(tokenizer)`."""
    config = tiny_config(
        hidden_size=16,
        num_attention_heads=2,
        num_hidden_layers=2,
        intermediate_size=24,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **overrides,
    )
    model = random_classifier(config, seed=5, spread=0.4)
    return model, inputs_of(write_model_folder(folder, model))


def per_example_fisher(model, inputs):
    """Returns (1/|D|) sum_j (d loss_j / dw)^2, the paper's estimator, by a plain loop over batches of one."""
    examples = len(inputs["labels"])
    fisher = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for example in range(examples):
        _, gradient = gradients(model, rows(inputs, example, example + 1))
        for name in fisher:
            fisher[name] += gradient[name] ** 2 / examples
    return fisher


def batch_fisher(model, batches, clip):
    """Returns the mean over batches of the squared gradient of the batch's mean loss.

    With `clip`, each tensor's gradient is first scaled down, alone, to a norm of at most 1, as the release does.
    """
    fisher = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for batch in batches:
        gradients(model, batch)
        for name, parameter in model.named_parameters():
            if clip:
                torch.nn.utils.clip_grad_norm_(parameter, 1.0)
            fisher[name] += parameter.grad**2 / len(batches)
    return fisher


def released_mask(released, model, batches):
    """Returns the mask, by parameter name, that the release's own `calculate_fisher` makes of `batches`."""
    model.zero_grad()  # the release adds to whatever gradient it finds
    with contextlib.redirect_stdout(io.StringIO()):
        masks = released.calculate_fisher(
            model, batches, lambda network, batch: network(**batch).loss, FISHER_SHARE, grad_clip={"max_norm": 1.0}
        )
    return {name: masks[parameter] for name, parameter in model.named_parameters() if parameter in masks}


def released_steps(released, model, batches, mask):
    """Trains `model` for one step a batch as the release does, in mode D; returns the weights after each step.

    The clip to a global norm of 1 sees the unmasked gradients; the mask is applied inside the optimizer.
    """
    model.train()
    named = dict(model.named_parameters())
    undecayed = [name for name in named if "bias" in name or "LayerNorm.weight" in name]
    optimizer = released.ChildTuningAdamW(
        [
            {"params": [named[name] for name in named if name not in undecayed], "weight_decay": 0.01},
            {"params": [named[name] for name in undecayed], "weight_decay": 0.0},
        ],
        lr=1e-3,
        eps=1e-8,
        mode="ChildTuning-D",
    )
    optimizer.set_gradient_mask({named[name]: keep for name, keep in mask.items()})
    after = []
    for batch in batches:
        gradients(model, batch)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert norm > 1.0, "the global clip must bite, or the fixture does not show it"
        optimizer.step()
        after.append({name: parameter.detach().clone() for name, parameter in named.items()})
    return after


def write_fisher():
    """Writes fisher/: a model folder without dropout, and reference.safetensors for 11 pairs with labels.

    Batches hold 4 examples in order, the last one 3.
        input_ids, attention_mask, token_type_ids, labels    the padded data set
        per_example/<parameter>      (1/|D|) sum_j (d log p(y_j|x_j) / dw)^2
        batch/<parameter>            mean over batches of the squared gradient of the batch's mean loss
        official/<parameter>         the same with each tensor clipped alone to norm 1; names with "layer" only
        official_threshold           [1], float64, numpy's percentile 70 of all `official` values
        official_mask/<parameter>    uint8, 1 where `official` reaches the threshold (30 % kept)
        gradient_norm                [1], global norm of the gradient of the first batch, before the clip
        official_step/<parameter>    the weights after one step of the released optimizer, mode D, on the first batch:
                                     clip to global norm 1, then mask; learning rate 1e-3, epsilon 1e-8, weight decay
                                     0.01 but for names with `bias` or `LayerNorm.weight`
        official_step_3/<parameter>  the same after one step on each of the three batches: their clip factors differ
    """
    folder = FIXTURES / "fisher"
    model, inputs = fisher_model(
        folder,
        lambda tokenizer: encode(tokenizer, FISHER_TEXTS, FISHER_LABELS),
        hidden_act="gelu_new",
        layer_norm_eps=1e-5,
        id2label={0: "entailment", 1: "neutral", 2: "contradiction"},
        label2id={"entailment": 0, "neutral": 1, "contradiction": 2},
    )
    starts = range(0, len(FISHER_LABELS), FISHER_BATCH_SIZE)
    batches = [rows(inputs, start, start + FISHER_BATCH_SIZE) for start in starts]
    released = released_optimizer.load()

    per_example = per_example_fisher(model, inputs)
    batch = batch_fisher(model, batches, clip=False)
    official = {name: value for name, value in batch_fisher(model, batches, clip=True).items() if "layer" in name}
    assert any(not torch.equal(official[name], batch[name]) for name in official), "some tensors must be clipped"
    assert any(torch.equal(official[name], batch[name]) for name in official), "some tensors must not be clipped"

    values = numpy.concatenate([value.numpy().ravel() for value in official.values()])
    threshold = numpy.percentile(values, (1 - FISHER_SHARE) * 100)
    mask = {name: value >= threshold for name, value in official.items()}
    for name, keep in released_mask(released, model, batches).items():
        assert torch.equal(mask[name], keep), f"{name}: the release makes another mask"

    _, gradient = gradients(model, batches[0])
    norm = torch.linalg.vector_norm(torch.cat([tensor.ravel() for tensor in gradient.values()]))
    after = released_steps(released, model, batches, mask)
    save_file(
        {
            **inputs,
            **prefixed("per_example", per_example),
            **prefixed("batch", batch),
            **prefixed("official", official),
            "official_threshold": torch.tensor([float(threshold)], dtype=torch.float64),
            **prefixed("official_mask", {name: keep.to(torch.uint8) for name, keep in mask.items()}),
            "gradient_norm": norm.reshape(1),
            **prefixed("official_step", after[0]),
            **prefixed("official_step_3", after[2]),
        },
        folder / "reference.safetensors",
    )


def write_fisher_regression():
    """Writes fisher_regression/: a model folder without dropout, and reference.safetensors for 11 pairs with scores.

    input_ids, attention_mask, token_type_ids, labels    the padded data set, labels float32
    per_example/<parameter>      (1/|D|) sum_j (d (logit_j - y_j)^2 / dw)^2
    """
    folder = FIXTURES / "fisher_regression"
    model, inputs = fisher_model(
        folder,
        lambda tokenizer: encode(tokenizer, FISHER_TEXTS, FISHER_SCORES),
        problem_type="regression",
        id2label={0: "score"},
        label2id={"score": 0},
    )
    save_file(
        {**inputs, **prefixed("per_example", per_example_fisher(model, inputs))},
        folder / "reference.safetensors",
    )


def main():
    # One thread: the order of floating-point sums, and so the last bits, do not depend on the machine's cores.
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    write_berts()
    write_schedule()
    write_optimizer()
    write_fisher()
    write_fisher_regression()
    write_weights(FIXTURES / "weights")
    write_families()
    write_methods()
    write_criteria()
    write_dps()
    write_orders()


if __name__ == "__main__":
    main()
