"""Tiny random BERTs as Hugging Face folders, with a WordPiece vocabulary of our own, and texts encoded for them."""

import json
import shutil

import torch
import transformers

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
WORDS = """the a child tuning network small large model trains weights only some reads sentence cat dog sits on mat
and is not of with river bank far near two apples it she they in to ##s ##ing ##ed ##er . , ?""".split()


def vocabulary():
    """Returns the WordPiece entries of every folder, in the order of their ids."""
    return SPECIAL_TOKENS + LETTERS + ["##" + letter for letter in LETTERS] + [word for word in WORDS if word != "a"]


def tiny_config(**overrides):
    """Returns the configuration of a BERT a few thousand weights large."""
    return transformers.BertConfig(
        vocab_size=len(vocabulary()),
        max_position_embeddings=40,
        type_vocab_size=2,
        attn_implementation="eager",
        **overrides,
    )


def random_classifier(config, seed, spread):
    """Returns a classifier with weights drawn from N(0, spread^2), LayerNorm gains from N(1, spread^2), in eval mode.

    The usual start (spread 0.02, biases 0) makes logits and gradients so small that a wrong term would go unseen.
    """
    torch.manual_seed(seed)
    model = transformers.BertForSequenceClassification(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if name.endswith("LayerNorm.weight") else 0.0
            parameter.normal_(centre, spread)
    return model


def write_model_folder(folder, model, lower_case=True, tokenizer_json=False):
    """Writes a Hugging Face folder with weights, configuration and vocabulary; returns its tokenizer."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("".join(token + "\n" for token in vocabulary()), encoding="utf-8")
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": lower_case,
            "tokenize_chinese_chars": True,
            "strip_accents": None,
            "unk_token": "[UNK]",
            "sep_token": "[SEP]",
            "pad_token": "[PAD]",
            "cls_token": "[CLS]",
            "mask_token": "[MASK]",
            "model_max_length": model.config.max_position_embeddings,
        },
    )
    tokenizer = transformers.BertTokenizer(vocab=str(folder / "vocab.txt"), do_lower_case=lower_case)
    if tokenizer_json:
        tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def write_json(path, value):
    """Writes `value` as indented JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def encode(tokenizer, texts, labels):
    """Returns the padded arrays `[examples, tokens]` (int64) of `texts` and their `labels`, as a model takes them."""
    single = isinstance(texts[0], str)
    firsts = texts if single else [first for first, _ in texts]
    seconds = None if single else [second for _, second in texts]
    arrays = tokenizer(firsts, seconds, padding=True, return_token_type_ids=True, return_tensors="pt")
    # A list of int becomes int64, the classes; a list of float becomes float32, the scores.
    return {**arrays, "labels": torch.tensor(labels)}
