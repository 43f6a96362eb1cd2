"""Writes tests/fixtures/tokenizers: small vocabularies of every kind, and what transformers makes of texts with them.

    .venv/bin/python scripts/make_tokenizer_fixtures.py
"""

import collections
import contextlib
import json
import random
import re
import tempfile
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import models, pre_tokenizers, trainers
from tokenizer_reference import encode

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "tokenizers"

SUBJECTS = ["The old sailor", "A young teacher", "Nobody", "My neighbour's dog", "Every visitor", "The café owner",
            "Some photographers", "The committee", "Her grandmother", "An unemployed engineer", "This marvellous orchestra",
            "The lighthouse keeper", "Three children", "The unfriendly clerk", "Whoever believes that"]
VERBS = ["repaired", "never noticed", "was painting", "had forgotten", "quickly sold", "wouldn't mention", "will remember",
         "believed in", "kept discussing", "photographed", "unlocked", "is translating", "can't afford", "disapproves of"]
OBJECTS = ["the wooden boat", "a naïve question", "twelve letters", "the missing keys (again)", "his well-known résumé",
           "a remarkable invention", "several unreadable books", "the weather forecast", "an unusually long journey",
           "yesterday's newspaper", "the lowest bridge", "almost everything", "musical instruments", "the latest election"]
ENDINGS = [" before the storm.", ", didn't they?", "; it cost 1,250 euros.", " in 1987!", ".", " during the holidays.",
           ", whatever happens.", " without any explanation.", " on Wednesday morning.", ": what a pity!"]
CHOICE = random.Random(7)
SENTENCES = [CHOICE.choice(SUBJECTS) + " " + CHOICE.choice(VERBS) + " " + CHOICE.choice(OBJECTS) + CHOICE.choice(ENDINGS)
             for _ in range(500)]
SENTENCES += [
    "Whether it rains or not, the ferry leaves at seven.",
    "She said \"no\" twice - and he said - nothing.",
    "unbelievable unbelievably believable believing belief",
    "Über allen Gipfeln ist Ruh.",
]

TEXTS = [
    ("The old sailor repaired the wooden boat.", "A young teacher sold twelve letters, didn't they?"),
    ("Nobody noticed.", "Every visitor had forgotten the missing keys (again) before the storm; it cost 1,250 euros."),
    ("Every visitor had forgotten the missing keys (again) before the storm; it cost 1,250 euros.", "Nobody noticed."),
    ("My neighbour's dog was painting his well-known résumé in 1987!", None),
    ("Nobody", None),
    ("", None),
    ("", ""),
    ("the boat", ""),
    ("", "the boat"),
    ("   leading, and trailing   ", "  "),
    ("tabs\tand\nnewlines\r\nand\u00a0hard\u3000blanks \u2009 here", " \t\n"),
    ("THE OLD SAILOR", "Every ÜBER Café NAÏVE İstanbul ẞ ΣΑΣ"),
    ("cafe\u0301 re\u0301sume\u0301 na\u0131\u0308ve", "ca\u0327 o\u0302\u0323 \u1ed9 \u212b \u0958"),
    ("🙂 the boat 👩‍👩‍👧 🇫🇷 sails ✈️", "🙂🙂🙂"),
    ("東京タワー is 日本語 and 中文字 mixed한국어", "一二三"),
    ("``quoted'' and ''quoted`` \"quoted\" “quoted” ‘so’ `so'", "it''s ```"),
    ("ﬁne ＡＢＣ ™ … ½ ² ⅷ \u200bzero\ufeff width\u00adsoft", "\x07bell\x00nul\x7f \u2028line"),
    ("unbelievablybelievablyunbelievable" * 6, "a" * 130),
    ("special <s> A </s> <sep> B<cls> <mask>x <pad> <unk> </s></s>", "[CLS] the [SEP] [MASK] boat[PAD] [UNK]"),
    ("a  <mask> b   [MASK]  c <eop> <eod> .(.)- \"", "<mask>[MASK]<mask>"),
    ("the marker<<x>>inside and <<X>> apart MiXeD mixed", "wordy theword word"),
    ("₤5 £5 €5 — – - ... 3.14 1,000,000 user@example.org #tag C++", "http://a.b/c?d=e&f"),
    ("don't can't I'll we're he's o'clock 'tis", "DON'T"),
    ("the the the the the the", "boat boat boat boat boat boat"),
    ("the the the the the", "boat boat boat boat boat boat"),
    ("ᾳ ΐ \u0344 क्षि ก็ \u0e33 \U0001d54f", "x\u0323\u0307 \u0307\u0323"),
]
MAX_LENGTHS = [6, 9, 10, 17, 128]

CASED = {"tokenizer_class": "BertTokenizer", "do_lower_case": False, "tokenize_chinese_chars": False}
MARKER = {"content": "<<x>>", "lstrip": True, "rstrip": False, "normalized": True, "single_word": False, "special": False}
WORD = {"content": "word", "lstrip": False, "rstrip": False, "normalized": False, "single_word": True, "special": False}


def described(content, **more):
    return {"__type": "AddedToken", "content": content, "lstrip": False, "rstrip": False, "normalized": False,
            "single_word": False, **more}


def cases(sizes):
    """What is written beside the vocabularies, by name; `sizes` are their numbers of tokens."""
    after = sizes["vocab.txt"]
    yield "wordpiece", ["vocab.txt"], {"config.json": {"model_type": "bert"}}
    yield "wordpiece_cased", ["vocab.txt"], {
        "config.json": {"model_type": "electra"},
        "tokenizer_config.json": {**CASED, "added_tokens_decoder": {str(after): MARKER, str(after + 1): WORD}},
        "special_tokens_map.json": {"mask_token": "never read"},
    }
    yield "wordpiece_accents", ["vocab.txt"], {
        "config.json": {"model_type": "bert"},
        "tokenizer_config.json": {"strip_accents": False, "do_lower_case": True, "truncation_side": "left",
                                  "additional_special_tokens": ["<eop>", "C++"], "own_token": "mixed"},
        "special_tokens_map.json": {"mask_token": {**MARKER, "content": "[MASK]"}, "sep_token": "[SEP]"},
        "added_tokens.json": {"<<x>>": after + 1, "C++": after, "apart": after + 2},
    }
    yield "wordpiece_split_special", ["vocab.txt"], {
        "config.json": {"model_type": "bert"},
        "tokenizer_config.json": {"split_special_tokens": True, "strip_accents": True, "do_lower_case": False},
    }
    yield "roberta", ["vocab.json", "merges.txt"], {"config.json": {"model_type": "roberta"}}
    yield "roberta_prefix_space", ["vocab.json", "merges.txt"], {
        "config.json": {"model_type": "roberta"},
        "tokenizer_config.json": {"tokenizer_class": "RobertaTokenizer", "add_prefix_space": True, "trim_offsets": False,
                                  "mask_token": described("<mask>", lstrip=True), "bos_token": "<s>"},
    }
    after = sizes["vocab.json"]
    yield "roberta_added", ["vocab.json", "merges.txt"], {
        "config.json": {"model_type": "roberta", "tokenizer_class": "RobertaTokenizerFast"},
        "special_tokens_map.json": {"mask_token": {"content": "<mask>", "lstrip": True, "normalized": False,
                                                   "rstrip": False, "single_word": False},
                                    "additional_special_tokens": ["<eop>"]},
        "added_tokens.json": {"word": after, "<<x>>": after + 1},
    }
    yield "xlnet", ["spiece.model"], {"config.json": {"model_type": "xlnet"}}
    yield "xlnet_lower", ["spiece.model"], {
        "config.json": {"model_type": "xlnet"},
        "tokenizer_config.json": {"do_lower_case": True, "keep_accents": True, "remove_space": False,
                                  "additional_special_tokens": ["<eop>", "<eod>"], "mask_token": described("<mask>")},
    }
    after = sizes["spiece.model"]
    yield "xlnet_added", ["spiece.model"], {
        "config.json": {"model_type": "xlnet"},
        "tokenizer_config.json": {"tokenizer_class": "XLNetTokenizer", "truncation_side": "left",
                                  "added_tokens_decoder": {str(after): MARKER, str(after + 1): WORD}},
    }
    yield "deberta_v2", ["spm.model"], {"config.json": {"model_type": "deberta-v2"}}
    yield "deberta_v2_lower_punctuation", ["spm.model"], {
        "config.json": {"model_type": "deberta-v2"},
        "tokenizer_config.json": {"do_lower_case": True, "split_by_punct": True, "vocab_type": "spm"},
    }
    after = sizes["spm.model"]
    yield "deberta_v2_added", ["spm.model"], {
        "config.json": {"model_type": "deberta-v2"},
        "tokenizer_config.json": {"tokenizer_class": "DebertaV2Tokenizer", "add_prefix_space": False},
        "added_tokens.json": {"[MASK]": after, "<<x>>": after + 1},
    }


def make_wordpiece():
    """A vocabulary of frequent words, of beginnings and ends of words, and of characters."""
    parts = collections.Counter()
    for word in re.findall(r"\w+|[^\w\s]", " ".join(SENTENCES + [sentence.lower() for sentence in SENTENCES])):
        parts.update({word, word[0], word[:3], *("##" + letter for letter in word[1:]), *("##" + word[-n:] for n in (2, 3)
                                                                                         if n < len(word))})
    frequent = sorted(parts, key=lambda part: (-parts[part], part))[:340]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *frequent, "東", "京", "日", "é", "##é", "`", "mixed", "MiXeD"]
    tokens = list(dict.fromkeys(tokens))
    (FOLDER / "vocab.txt").write_text("".join(token + "\n" for token in tokens))
    return len(tokens)


def train_bpe():
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=520, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"], show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        ),
    )
    tokenizer.model.save(str(FOLDER))
    return tokenizer.get_vocab_size()


# What is replaced, in code points: wide letters, signs that are several letters, blanks, what has no width.
RULES = {
    **{f"{0xFF21 + letter:X}": f"{0x41 + letter:X}" for letter in range(26)},
    **{blank: "20" for blank in ["9", "A", "D", "A0", "3000", "2009", "2028"]},
    **{nothing: "" for nothing in ["7", "7F", "AD", "200B", "FEFF"]},
    "2122": "54 4D", "2026": "2E 2E 2E", "FB01": "66 69", "65 301": "E9", "2044": "2F", "1F642": "3A 29",
}


def train_sentencepiece(name, **options):
    # The file keeps the names that the trainer is given, so that they are relative ones.
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("rules.tsv").write_text("".join(f"{source}\t{target}\n" for source, target in RULES.items()))
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(SENTENCES), model_prefix="trained", model_type="unigram", vocab_size=200,
            normalization_rule_tsv="rules.tsv", num_threads=1, minloglevel=2, **options,
        )
        content = Path("trained.model").read_bytes()
    (FOLDER / name).write_bytes(content)
    return sentencepiece.SentencePieceProcessor(model_proto=content).get_piece_size()


def main():
    FOLDER.mkdir(parents=True, exist_ok=True)
    sizes = {
        "vocab.txt": make_wordpiece(),
        "vocab.json": train_bpe(),
        "spiece.model": train_sentencepiece(
            "spiece.model", unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
            control_symbols=["<cls>", "<sep>", "<pad>", "<mask>", "<eod>"],
            user_defined_symbols=["<eop>", ".", "(", ")", "-"],
        ),
        "spm.model": train_sentencepiece(
            "spm.model", pad_id=0, bos_id=1, eos_id=2, unk_id=3,
            pad_piece="[PAD]", bos_piece="[CLS]", eos_piece="[SEP]", unk_piece="[UNK]",
        ),
    }
    texts = {"max_lengths": MAX_LENGTHS, "texts": TEXTS}
    (FOLDER / "texts.json").write_text(json.dumps(texts, indent=1) + "\n")
    answers = collections.defaultdict(list)
    for name, vocabulary, files in cases(sizes):
        with tempfile.TemporaryDirectory() as folder:
            for file in vocabulary:
                Path(folder, file).write_bytes((FOLDER / file).read_bytes())
            for file, content in files.items():
                Path(folder, file).write_text(json.dumps(content))
            encodings = [
                [[ids, "".join(map(str, types))] for ids, types in encode(folder, TEXTS, length)] for length in MAX_LENGTHS
            ]
        answer = {"name": name, "vocabulary": vocabulary, "files": files, "encodings": encodings}
        answers[vocabulary[0].replace(".", "_")].append(json.dumps(answer, separators=(",", ":")))
    for name, lines in answers.items():
        (FOLDER / f"{name}_cases.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")


if __name__ == "__main__":
    main()
