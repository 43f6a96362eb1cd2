"""The Python peer of the speed benchmark: transformers' BERT trained with the authors' released optimizer.

    python benches/peer.py --method child_tuning_f --lengths benches/rte_lengths.txt --threads 2

A training step is what the released training script does: forward with dropout, mean loss, backward, clip of the
global gradient norm, optimizer step, schedule step. The model has the shape of BERT-base or BERT-large and random
weights; the tokens are random too, since neither changes the time. A batch is padded to its own longest sentence, or
with `--padding fixed` to 128 tokens, as the example scripts of transformers do.

Protocol, one JSON object a line on stdout, for compare.py:
    after building and one warm-up step on the first batch   {"ready": true, "torch": VERSION, "device": NAME}
    after each line `go N` on stdin                          {"seconds": S, "tokens": T, "steps": N}
Steps take the batches in order, from the first batch on, and start over at the end; T counts real tokens, without
padding. The program ends when stdin does.
"""

import argparse
import json
import pathlib
import platform
import sys
import time

import torch
import transformers

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "scripts"))
import released_optimizer  # noqa: E402  (kept with the scripts that make the fixtures)

FIXED_LENGTH = 128
SHAPES = {
    "BERT-base": {},
    "BERT-large": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
}
# Batches of equal examples, with `--tokens`.
EQUAL_BATCHES = 4
# The child's share, and the settings of the released run.sh; the steps are those of RTE, 3 epochs.
SHARE = 0.3
LEARNING_RATE = 4e-5
WEIGHT_DECAY = 0.01
EPSILON = 1e-8
WARMUP_STEPS = 46
TOTAL_STEPS = 468


def make_batches(lengths, batch_size, vocabulary_size, padding):
    """Returns batches of random tokens on the CPU, each with its number of real tokens."""
    batches = []
    for start in range(0, len(lengths), batch_size):
        own = torch.tensor(lengths[start : start + batch_size])
        width = own.max() if padding == "longest" else FIXED_LENGTH
        mask = (torch.arange(width) < own[:, None]).long()
        inputs = {
            "input_ids": torch.randint(1000, vocabulary_size, mask.shape) * mask,
            "attention_mask": mask,
            "token_type_ids": torch.zeros_like(mask),
            "labels": torch.randint(0, 2, (len(own),)),
        }
        batches.append((inputs, int(own.sum())))
    return batches


def make_optimizer(method, model):
    """Returns the optimizer of `method`, with weight decay on all but biases and LayerNorm gains."""
    groups = [{"params": [], "weight_decay": WEIGHT_DECAY}, {"params": [], "weight_decay": 0.0}]
    for name, parameter in model.named_parameters():
        groups["bias" in name or "LayerNorm.weight" in name]["params"].append(parameter)

    if method == "vanilla":
        # The default of transformers' Trainer, `adamw_torch_fused`.
        return torch.optim.AdamW(groups, lr=LEARNING_RATE, eps=EPSILON, fused=True)
    mode = {"child_tuning_f": "ChildTuning-F", "child_tuning_d": "ChildTuning-D"}[method]
    optimizer = released_optimizer.load().ChildTuningAdamW(
        groups, lr=LEARNING_RATE, eps=EPSILON, reserve_p=SHARE, mode=mode
    )
    if method == "child_tuning_d":
        # A random mask costs each step what a computed one does.
        optimizer.set_gradient_mask(
            {
                parameter: torch.rand_like(parameter) < SHARE
                for name, parameter in model.named_parameters()
                if "layer" in name
            }
        )
    return optimizer


class Peer:
    """A model in training: its optimizer, its schedule and its place in the batches."""

    def __init__(self, arguments):
        torch.manual_seed(42)
        self.device = torch.device(arguments.device)
        self.precision = arguments.precision
        config = transformers.BertConfig(**SHAPES[arguments.shape])
        self.model = transformers.BertForSequenceClassification(config).to(self.device).train()
        batch_size = arguments.batch_size
        if arguments.tokens is None:
            lengths = [int(line) for line in arguments.lengths.read_text().split()]
        else:
            lengths = [arguments.tokens] * (EQUAL_BATCHES * batch_size)
        self.batches = make_batches(lengths, batch_size, config.vocab_size, arguments.padding)
        self.optimizer = make_optimizer(arguments.method, self.model)
        self.schedule = transformers.get_linear_schedule_with_warmup(self.optimizer, WARMUP_STEPS, TOTAL_STEPS)

    def step(self, inputs):
        """Trains on one batch."""
        inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            loss = self.model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.model.zero_grad()

    def go(self, first, steps):
        """Times `steps` steps from batch number `first` on; returns seconds and real tokens."""
        self.wait()
        start = time.perf_counter()
        tokens = 0
        for number in range(first, first + steps):
            inputs, real_tokens = self.batches[number % len(self.batches)]
            self.step(inputs)
            tokens += real_tokens
        self.wait()
        return time.perf_counter() - start, tokens

    def wait(self):
        """Waits until the device has done what was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def device_name(self):
        """Returns the name of the GPU, or `cpu`."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"


def report(**values):
    """Writes one line of the protocol."""
    print(json.dumps(values), flush=True)


def main():
    parser = argparse.ArgumentParser(description="The Python peer of the speed benchmark; see compare.py.")
    parser.add_argument("--method", choices=["vanilla", "child_tuning_f", "child_tuning_d"], required=True)
    parser.add_argument("--precision", choices=["float32", "bf16"], default="float32")
    parser.add_argument("--padding", choices=["longest", "fixed"], default="longest")
    lengths = parser.add_mutually_exclusive_group(required=True)
    lengths.add_argument("--lengths", type=pathlib.Path, help="a file with one token count per line")
    lengths.add_argument("--tokens", type=int, help="token count of every example")
    parser.add_argument("--shape", choices=SHAPES, default="BERT-base")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    peer = Peer(arguments)
    peer.go(0, 1)
    report(ready=True, torch=torch.__version__, device=peer.device_name(), python=platform.python_version())

    first = 0
    for line in sys.stdin:
        word, count = line.split()
        if word != "go":
            raise SystemExit(f"expected `go N`, got `{line.strip()}`")
        seconds, tokens = peer.go(first, int(count))
        first += int(count)
        report(seconds=seconds, tokens=tokens, steps=int(count))


if __name__ == "__main__":
    main()
