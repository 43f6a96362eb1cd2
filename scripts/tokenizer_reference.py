"""What transformers makes of texts with the tokenizer of a folder; reads a question from stdin, answers on stdout."""

import json
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

from transformers import AutoTokenizer  # noqa: E402


def encode(folder, pairs, max_length):
    """Returns the ids and the token types of each text or pair, in order."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answers = []
    for first, second in pairs:
        # A batch of one: alone, an empty second text would count as none.
        texts = ([first],) if second is None else ([first], [second])
        made = tokenizer(*texts, truncation="longest_first", max_length=max_length, return_token_type_ids=True)
        answers.append([made["input_ids"][0], made["token_type_ids"][0]])
    return answers


if __name__ == "__main__":
    question = json.load(sys.stdin)
    lengths = question["max_lengths"]
    json.dump([encode(question["folder"], question["pairs"], length) for length in lengths], sys.stdout)
