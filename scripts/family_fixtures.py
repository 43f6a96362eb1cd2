"""Tiny random models of every family, with what transformers makes of a few random examples.

Called by make_fixtures.py. Each model is a folder of tests/fixtures/families/: config.json, model.safetensors, and
reference.safetensors with, for all examples as one batch,

    input_ids, attention_mask, token_type_ids   [examples, tokens], int64, padded on the family's side
    labels                                      [examples], int64 classes or float32 scores
    logits                                      [examples, labels]
    loss                                        [1], mean cross-entropy, or mean squared error
    gradient/<parameter>                        gradient of the loss
    per_example/<parameter>                     mean over examples of the squared gradient of the example's own loss

The examples are numbers of tokens, not texts: some models see one text, some two by their token types, all of uneven
lengths. The configs set what published ones of the family set, and not to the usual values.
"""

import inspect
import pathlib
import shutil

import torch
import transformers
from safetensors.torch import save_file

FIXTURES = pathlib.Path(__file__).parent.parent / "tests" / "fixtures" / "families"

LENGTHS = [7, 1, 12, 3, 18]
# Numbers below are left to special tokens.
FIRST_WORD = 5
VOCABULARY = 40

CLASSES = {
    "num_labels": 3,
    "id2label": {0: "entailment", 1: "neutral", 2: "contradiction"},
    "label2id": {"entailment": 0, "neutral": 1, "contradiction": 2},
}
SCORE = {"num_labels": 1, "id2label": {0: "score"}, "label2id": {"score": 0}, "problem_type": "regression"}

BERT_SIZES = dict(vocab_size=VOCABULARY, hidden_size=12, num_attention_heads=3, num_hidden_layers=2, intermediate_size=20)
MODERNBERT = dict(pad_token_id=3, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)

XLNET_SIZES = dict(vocab_size=VOCABULARY, d_model=12, n_head=2, n_layer=2, d_inner=20)

# Name of the folder, config, and how many kinds of token types its examples have.
MODELS = [
    (
        "roberta_pair",
        transformers.RobertaConfig(
            **BERT_SIZES,
            **CLASSES,
            max_position_embeddings=22,
            type_vocab_size=1,
            layer_norm_eps=1e-5,
            classifier_dropout=0.2,
        ),
        1,
    ),
    (
        "roberta_padding",
        transformers.RobertaConfig(
            **{**BERT_SIZES, "num_hidden_layers": 1, "num_attention_heads": 2},
            max_position_embeddings=30,
            type_vocab_size=2,
            pad_token_id=4,
            hidden_act="relu",
            layer_norm_eps=1e-7,
        ),
        2,
    ),
    (
        "roberta_regression",
        transformers.RobertaConfig(
            **{**BERT_SIZES, "hidden_size": 8, "num_attention_heads": 1},
            **SCORE,
            max_position_embeddings=20,
            type_vocab_size=1,
            hidden_act="gelu_new",
        ),
        1,
    ),
    (
        "electra_projection",
        transformers.ElectraConfig(
            **BERT_SIZES, **CLASSES, embedding_size=7, max_position_embeddings=18, layer_norm_eps=1e-6
        ),
        2,
    ),
    (
        "electra_base",
        transformers.ElectraConfig(
            **{**BERT_SIZES, "num_attention_heads": 4, "num_hidden_layers": 1},
            embedding_size=12,
            max_position_embeddings=25,
            type_vocab_size=3,
            hidden_act="silu",
            classifier_dropout=0.0,
        ),
        3,
    ),
    (
        "electra_regression",
        transformers.ElectraConfig(
            **{**BERT_SIZES, "hidden_size": 10, "num_attention_heads": 5},
            **SCORE,
            embedding_size=16,
            max_position_embeddings=18,
            hidden_act="tanh",
        ),
        2,
    ),
    (
        "distilbert_pair",
        transformers.DistilBertConfig(
            vocab_size=VOCABULARY, dim=12, n_heads=3, n_layers=2, hidden_dim=20, max_position_embeddings=18, **CLASSES
        ),
        1,
    ),
    (
        "distilbert_sinusoidal",
        transformers.DistilBertConfig(
            vocab_size=VOCABULARY,
            dim=8,
            n_heads=2,
            n_layers=1,
            hidden_dim=24,
            max_position_embeddings=30,
            sinusoidal_pos_embds=True,
            activation="relu",
            seq_classif_dropout=0.0,
        ),
        1,
    ),
    (
        "distilbert_regression",
        transformers.DistilBertConfig(
            vocab_size=VOCABULARY,
            dim=10,
            n_heads=1,
            n_layers=3,
            hidden_dim=10,
            max_position_embeddings=18,
            activation="gelu_new",
            **SCORE,
        ),
        1,
    ),
    (
        "deberta_v2_shared",
        transformers.DebertaV2Config(
            **BERT_SIZES,
            **CLASSES,
            max_position_embeddings=20,
            relative_attention=True,
            pos_att_type="p2c|c2p",
            position_buckets=8,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
            position_biased_input=False,
        ),
        1,
    ),
    (
        "deberta_v2_convolution",
        transformers.DebertaV2Config(
            **{**BERT_SIZES, "num_attention_heads": 2},
            max_position_embeddings=24,
            max_relative_positions=6,
            relative_attention=True,
            pos_att_type=["c2p", "p2c"],
            type_vocab_size=2,
            embedding_size=7,
            conv_kernel_size=3,
            conv_act="gelu",
            conv_groups=2,
            attention_head_size=6,
            pooler_hidden_act="tanh",
            pooler_dropout=0.2,
            cls_dropout=0.3,
            layer_norm_eps=1e-5,
        ),
        2,
    ),
    (
        "deberta_v2_regression",
        transformers.DebertaV2Config(
            **{**BERT_SIZES, "hidden_size": 10, "num_attention_heads": 5, "num_hidden_layers": 3},
            **SCORE,
            max_position_embeddings=18,
            relative_attention=True,
            pos_att_type="p2c",
            position_buckets=6,
            max_relative_positions=16,
            norm_rel_ebd="layer_norm",
            conv_kernel_size=5,
            hidden_act="relu",
            pooler_hidden_act="relu",
        ),
        1,
    ),
    (
        "deberta_v2_absolute",
        transformers.DebertaV2Config(
            **{**BERT_SIZES, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1},
            max_position_embeddings=18,
            type_vocab_size=3,
            pos_att_type="c2p",
            norm_rel_ebd="layer_norm",
            conv_kernel_size=3,
        ),
        3,
    ),
    (
        "modernbert_windows",
        transformers.ModernBertConfig(
            **{**BERT_SIZES, "num_hidden_layers": 3},
            **CLASSES,
            **MODERNBERT,
            local_attention=6,
            classifier_pooling="mean",
            classifier_dropout=0.1,
            attention_dropout=0.1,
        ),
        1,
    ),
    (
        "modernbert_biases",
        transformers.ModernBertConfig(
            **{**BERT_SIZES, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 9},
            **MODERNBERT,
            layer_types=["sliding_attention", "sliding_attention"],
            rope_parameters={
                "full_attention": {"rope_type": "default", "rope_theta": 50.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 7.5},
            },
            local_attention=3,
            norm_bias=True,
            attention_bias=True,
            mlp_bias=True,
            classifier_bias=True,
            norm_eps=1e-3,
            hidden_activation="silu",
            classifier_activation="relu",
            embedding_dropout=0.1,
            mlp_dropout=0.2,
        ),
        1,
    ),
    (
        "modernbert_regression",
        transformers.ModernBertConfig(
            **{**BERT_SIZES, "num_attention_heads": 1},
            **SCORE,
            **MODERNBERT,
            global_attn_every_n_layers=2,
            global_rope_theta=300.0,
            local_rope_theta=40.0,
            local_attention=20,
        ),
        1,
    ),
    (
        "xlnet_pair",
        transformers.XLNetConfig(**XLNET_SIZES, **CLASSES, clamp_len=6, layer_norm_eps=1e-6, mem_len=None),
        3,
    ),
    (
        "xlnet_mean",
        transformers.XLNetConfig(
            **{**XLNET_SIZES, "n_head": 1, "n_layer": 1},
            ff_activation="relu",
            summary_type="mean",
            summary_use_proj=False,
            summary_activation="",
            untie_r=True,
        ),
        2,
    ),
    (
        "xlnet_uni",
        transformers.XLNetConfig(
            **{**XLNET_SIZES, "d_model": 8, "d_inner": 10},
            **SCORE,
            attn_type="uni",
            ff_activation="gelu_new",
            summary_type="first",
            summary_activation="relu",
            summary_first_dropout=0.2,
        ),
        1,
    ),
    (
        "xlnet_uni_last",
        transformers.XLNetConfig(
            **{**XLNET_SIZES, "n_head": 3}, **CLASSES, attn_type="uni", clamp_len=5, summary_activation="gelu"
        ),
        2,
    ),
]


def random_classifier(config, seed, spread):
    """Returns a classifier of the config's family with weights from N(0, spread^2), and normalisations' from N(1, ...)."""
    torch.manual_seed(seed)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_scale = parameter.dim() == 1 and name.endswith("weight")
            parameter.requires_grad_(True).normal_(1.0 if is_scale else 0.0, spread)
    return model


def random_examples(config, token_types, seed):
    """Returns padded examples of LENGTHS with random tokens, token types in ascending order, and labels."""
    generator = torch.Generator().manual_seed(seed)
    padding = config.pad_token_id
    left = config.model_type == "xlnet"
    inputs = {
        "input_ids": torch.full([len(LENGTHS), max(LENGTHS)], padding),
        "attention_mask": torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.int64),
        "token_type_ids": torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.int64),
    }
    for row, length in enumerate(LENGTHS):
        own = slice(max(LENGTHS) - length, None) if left else slice(0, length)
        inputs["input_ids"][row, own] = torch.randint(FIRST_WORD, VOCABULARY, [length], generator=generator)
        inputs["attention_mask"][row, own] = 1
        inputs["token_type_ids"][row, own] = torch.arange(length) * token_types // length
    if config.num_labels == 1:
        labels = torch.randn(len(LENGTHS), generator=generator)
    else:
        labels = torch.randint(0, config.num_labels, [len(LENGTHS)], generator=generator)
    return {**inputs, "labels": labels}


def takes_examples_alone(config):
    """Returns whether a padded batch is no reference: XLNet's summaries of what is on the left are of padding then, and its
    one-sided attention does not take a batch's mask."""
    return config.model_type == "xlnet" and (config.summary_type in ("first", "mean") or config.attn_type == "uni")


def reference(model, inputs):
    """Returns logits, loss, gradients and per-example squared gradients of the examples."""
    known = inspect.signature(model.forward).parameters
    taken = {name: array for name, array in inputs.items() if name in known}

    def alone(row):
        own = inputs["attention_mask"][row].bool()
        inputs_alone = {name: array[row : row + 1] for name, array in taken.items()}
        return model(**{name: array if name == "labels" else array[:, own] for name, array in inputs_alone.items()})

    if takes_examples_alone(model.config):
        outputs = [alone(row) for row in range(len(LENGTHS))]
        logits, loss = torch.cat([output.logits for output in outputs]), sum(output.loss for output in outputs) / len(LENGTHS)
    else:
        output = model(**taken)
        logits, loss = output.logits, output.loss
    model.zero_grad()
    loss.backward()
    found = {"logits": logits.detach(), "loss": loss.detach().reshape(1)}
    none = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        found[f"gradient/{name}"] = none[name] if parameter.grad is None else parameter.grad.clone()
    squares = none
    for row in range(len(LENGTHS)):
        model.zero_grad()
        alone(row).loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                squares[name] += parameter.grad**2 / len(LENGTHS)
    return found | {f"per_example/{name}": square for name, square in squares.items()}


def write_family(name, config, token_types, spread=0.3):
    """Writes one model's folder."""
    folder = FIXTURES / name
    shutil.rmtree(folder, ignore_errors=True)
    model = random_classifier(config, seed=3, spread=spread)
    inputs = random_examples(config, token_types, seed=4)
    found = reference(model, inputs)
    model.save_pretrained(folder)
    tensors = {key: tensor.detach().clone().contiguous() for key, tensor in {**inputs, **found}.items()}
    save_file(tensors, folder / "reference.safetensors")


def write_families():
    """Writes the folders of all models."""
    for name, config, token_types in MODELS:
        write_family(name, config, token_types)


if __name__ == "__main__":
    torch.set_num_threads(1)
    write_families()
