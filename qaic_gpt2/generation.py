"""From prompts to texts on a compiled program, timed as QEfficient times it."""

import time
from dataclasses import dataclass, field

import numpy as np

from shared.tokenizer import Stream, byte_of_character


@dataclass
class PerfMetrics:
    prefill_time: float  # s, with tokenizing: the time to the first token
    decode_perf: float  # tokens/s of one row, from the second token on
    total_perf: float
    total_time: float  # s


@dataclass
class ExecInfo:
    """What generate returns; printed, it is QEfficient's statistics."""

    batch_size: int
    generated_texts: list  # a list of texts for each batch
    generated_ids: list  # an array (batch, ctx_len) for each batch, behind a text <|endoftext|> (-1 without one)
    perf_metrics: PerfMetrics
    logits: list = field(default_factory=list, repr=False)  # with return_logits: a list of rows for each text

    def __str__(self):
        perf = self.perf_metrics
        return (
            f"Average Prefill time a.k.a TTFT is= {perf.prefill_time:.2f} sec\n"
            f"Decode is= {perf.decode_perf * self.batch_size:.2f} tokens/sec\n"
            f"Total is= {perf.total_perf * self.batch_size:.2f} tokens/sec\n"
            f"Total (E2E) inference time is= {perf.total_time:.2f} sec"
        )


class Bytes:
    """What a Stream asks of a tokenizer, from one of Hugging Face's: they spell bytes as GPT-2's files do."""

    def __init__(self, tokenizer):
        self.tokenizer, self.byte_of = tokenizer, byte_of_character()
        self.eot, self.encode = tokenizer.eos_token_id, tokenizer.encode

    def to_bytes(self, id):
        return bytes(self.byte_of[char] for char in self.tokenizer.convert_ids_to_tokens(int(id)))


def encode(tokenizer, prompt):
    """The prompt's ids; <|endoftext|> begins a text without a prompt, as in GPT-2's training."""
    ids = tokenizer.encode(prompt) or [tokenizer.eot]
    if ids == [None]:
        raise ValueError("prompt must not be empty: this model has no <|endoftext|>")
    return ids


def fix_prompts(prompts, batch_size):
    """As many as fill batches, by QEfficient's rule: too few are repeated, what fills no last batch is dropped."""
    if len(prompts) < batch_size:
        print(f"{len(prompts)} prompts are fewer than the batch_size of {batch_size}: they are repeated")
        return [prompts[i % len(prompts)] for i in range(batch_size)]
    if left := len(prompts) % batch_size:
        print(f"{len(prompts)} prompts are no multiple of the batch_size of {batch_size}: the last {left} are dropped")
    return prompts[: len(prompts) - left]


def generate_batch(session, tokenizer, prompts, generation_len, sampler, ignore_eos, stream, return_logits):
    """One prompt a row, to generation_len or the context's end, or until all rows came to theirs."""
    began = time.perf_counter()
    prompts = [encode(tokenizer, prompt) for prompt in prompts]
    longest = max(map(len, prompts))
    room = session.ctx_len - longest + 1  # the last position predicts a token, too
    if room < 1:
        raise ValueError(f"prompt must have at most ctx_len ({session.ctx_len}) tokens, got {longest}")
    if (largest := max(map(max, prompts))) >= (vocab_size := session.logits.shape[2]):
        raise ValueError(f"prompt must have tokens below vocab_size ({vocab_size}), got {largest}")
    count, end = min(generation_len or room, room), None if ignore_eos else tokenizer.eot
    texts, shown = [[] for _ in prompts], Stream(tokenizer)  # ids
    rows = [[] for _ in prompts]
    over = np.zeros(len(prompts), bool)
    positions = np.array([[len(prompt)] for prompt in prompts])
    logits, first = session.prefill(prompts), None
    for left in reversed(range(count)):
        tokens = sampler(logits)
        first = first or time.perf_counter()
        for row in np.flatnonzero(~over):
            texts[row].append(int(tokens[row]))
            if return_logits:
                rows[row].append(logits[row].copy())
        if stream and not over[0] and tokens[0] != end:
            print(shown.push(texts[0][-1]), end="", flush=True)
        over |= tokens == end
        if left == 0 or over.all():
            break
        logits = session(tokens[:, None], positions)
        positions += 1
    done = time.perf_counter()
    if stream:
        print(shown.end())
        if count == room != generation_len and not over.all():
            print(f"(the end of the context: {session.ctx_len} tokens)")
    ids = np.full((len(prompts), session.ctx_len), -1 if tokenizer.eot is None else tokenizer.eot)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = text
    decoded = count - left - 1  # the first token came of the prompt
    rates = [decoded / (done - since) if decoded else 0.0 for since in (first, began)]
    metrics = PerfMetrics(first - began, *rates, done - began)
    texts = [decode(tokenizer, [id for id in text if id != end]) for text in texts]
    return ExecInfo(len(prompts), texts, ids, metrics, rows if return_logits else [])


def decode(tokenizer, ids):
    stream = Stream(tokenizer)
    return "".join(map(stream.push, ids)) + stream.end()


def print_stats(info):
    print("\n========================= Performance Stats =========================")
    if info.batch_size > 1:
        print("Batch Performance : \n")
    print(info)
    print("=====================================================================")
