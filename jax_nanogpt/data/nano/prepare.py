"""gpt2-nano's data and tokenizer: tiny Shakespeare and Python's help texts, less some of each, in their own BPE.

Half a million tokens are few: a model that sees them twenty times memorizes them. So train.bin holds the text eight
times: four times as the tokenizer encodes it, and four times with one merge in seven left out at random, which spells
words in many ways (BPE dropout, arXiv 1910.13267).

Held out, in val.bin: Shakespeare's last tenth, and help topics that share under 2 % of their 60-character shingles
with all others. heldout.json names them, so that any machine can rebuild the text from its own Python.
"""

import json
import platform
import random
import sys
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from jax_nanogpt.cli import Parser  # isort: skip  # first: it names a missing package
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from jax_nanogpt.data.corpus import (
    SHAKESPEARE_SHA256,
    add_input,
    pydoc_topics,
    shakespeare,
    shingles,
    write_dataset,
)
from jax_nanogpt.files import write_file, write_text
from shared.tokenizer import load_tokenizer

HERE = Path(__file__).resolve().parent

MERGES = 1151  # with 256 bytes and <|endoftext|> a vocabulary of 1,408: a multiple of 128
SPEECHES = 32  # in a document of Shakespeare: the text does not mark its scenes
COPIES = 4  # with all merges, and as many with dropout
SKIPPED = 0.15  # of the merges, with dropout
END = "<|endoftext|>"


def is_apart(name, parts, others):
    """Whether a topic shares under 2 % of its shingles with the other topics."""
    rest = set().union(*(parts[other] for other in others if other != name))
    return len(parts[name] & rest) < 0.02 * len(parts[name])


def hold_out(unique):
    """The names of topics to hold out, about a tenth of the text in unique; and of those to test on, which are apart
    from all of Python's topics, the repetitive ones too that pydoc_topics leaves out."""
    parts = {name: shingles(text) for name, text in topics.items()}
    held, size = [], 0
    for name in unique:
        if is_apart(name, parts, unique) and size + len(unique[name]) <= sum(map(len, unique.values())) / 10:
            held.append(name)
            size += len(unique[name])
    others = topics.keys() - held
    return held, [name for name in held if is_apart(name, parts, others)]


def train_tokenizer(texts):
    """A byte-level BPE like GPT-2's: the 256 bytes, the merges, and <|endoftext|> last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=256 + MERGES, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([END])
    return tokenizer


def write_tokenizer(folder, tokenizer, context):
    """GPT-2's two files, and tokenizer.json with its config for transformers."""
    write_file(folder / "tokenizer.json", lambda path: tokenizer.save(str(path)))
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    write_text(folder / "merges.txt", "\n".join(lines) + "\n")
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    write_text(folder / "vocab.json", json.dumps(dict(vocab), ensure_ascii=False) + "\n")
    about = {"tokenizer_class": "GPT2TokenizerFast", "model_max_length": context, "add_prefix_space": False}
    about |= {f"{token}_token": END for token in ("bos", "eos", "unk", "pad")}
    write_text(folder / "tokenizer_config.json", json.dumps(about, indent=2) + "\n")


def encode_with_dropout(text, ranks, rng):
    """BPE that at every step skips each possible merge with probability SKIPPED."""
    ids = []
    for _, (start, end) in pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text):
        parts = [bytes([byte]) for byte in text[start:end].encode("utf-8")]
        while True:
            merges = [(ranks.get(a + b), i) for i, (a, b) in enumerate(pairwise(parts))]
            merges = [(rank, i) for rank, i in merges if rank is not None and rng.random() >= SKIPPED]
            if not merges:
                break
            _, i = min(merges)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += map(ranks.get, parts)
    return ids


def write(play):
    """The tokenizer, train.bin and val.bin, heldout.json."""
    seen, unseen = play[: int(0.9 * len(play))], play[int(0.9 * len(play)) :]
    unique = pydoc_topics()
    held, tested = hold_out(unique)
    speeches = seen.split("\n\n")
    documents = ["\n\n".join(speeches[i : i + SPEECHES]) for i in range(0, len(speeches), SPEECHES)]
    documents += [text for name, text in unique.items() if name not in held]

    write_tokenizer(HERE, train_tokenizer(documents), context=256)
    tokenizer = load_tokenizer(HERE)
    ranks = {tokenizer.to_bytes(id): id for id in range(tokenizer.eot)}
    rng = random.Random(0)
    train = []
    for _ in range(COPIES):
        for text in documents:
            train += [*tokenizer.encode(text), tokenizer.eot]
        for text in documents:
            train += [*encode_with_dropout(text, ranks, rng), tokenizer.eot]
    tests = [unseen, *(unique[name] for name in tested)]
    val = [token for text in tests for token in [*tokenizer.encode(text), tokenizer.eot]]
    splits = {"train": train, "val": val}
    write_dataset(HERE, splits, tokenizer)
    about = {
        "shakespeare": {"sha256": SHAKESPEARE_SHA256, "from_character": len(seen), "characters": len(unseen)},
        "pydoc_data.topics": {"python": platform.python_version(), "topics": tested},
    }
    write_text(HERE / "heldout.json", json.dumps(about, indent=2) + "\n")
    print(f"held out: Shakespeare's last {len(unseen):,} characters and {len(tested)} of {len(topics)} help topics")


def main(argv=None):
    parser = Parser(__doc__)
    add_input(parser)
    args = parser.parse_args(argv)
    try:
        play = shakespeare(args.input, HERE)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    try:
        write(play)
    except OSError as error:  # a full disk
        parser.error(str(error))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
