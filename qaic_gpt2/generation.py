"""From prompts to texts on a compiled program: the loop over tokens, and QEfficient's statistics."""

import time
from dataclasses import astuple, dataclass, field

import numpy as np

from shared.sampling import Sampler
from shared.tokenizer import Stream, byte_of_character, encode_prompt


@dataclass
class PerfMetrics:
    prefill_time: float  # s, tokenizing included: the time to the first token
    decode_perf: float  # tokens/s of one row, from the second token on
    total_perf: float  # tokens/s of one row, over total_time
    total_time: float  # s


@dataclass
class ExecInfo:
    """What generate returns; printed, it is QEfficient's statistics."""

    batch_size: int
    generated_texts: list  # a list of texts for each batch
    generated_ids: list  # an array (batch, ctx_len) for each batch, filled up with <|endoftext|> (-1 without one)
    perf_metrics: PerfMetrics
    logits: list = field(default_factory=list, repr=False)  # with return_logits: an array (tokens, V) for each text

    def __str__(self):
        perf = self.perf_metrics
        return (
            f"Average Prefill time a.k.a TTFT is= {perf.prefill_time:.2f} sec\n"
            f"Decode is= {perf.decode_perf * self.batch_size:.2f} tokens/sec\n"
            f"Total is= {perf.total_perf * self.batch_size:.2f} tokens/sec\n"
            f"Total (E2E) inference time is= {perf.total_time:.2f} sec"
        )


@dataclass
class Options:
    """generate's keywords."""

    generation_len: int | None = None  # None: to the end of the context
    sampler: Sampler | None = None  # None: greedy
    ignore_eos: bool = False
    stream: bool = True
    return_logits: bool = False


class HuggingFaceBytes:
    """Hugging Face's tokenizer as one of shared.tokenizer: its tokens spell bytes as GPT-2's files do."""

    def __init__(self, tokenizer):
        self.tokenizer, self.byte_of = tokenizer, byte_of_character()
        self.eot, self.encode = tokenizer.eos_token_id, tokenizer.encode

    def to_bytes(self, id):
        return bytes(self.byte_of[char] for char in self.tokenizer.convert_ids_to_tokens(int(id)))


def batches(prompts, batch_size):
    """Whole batches, by QEfficient's rule: too few prompts are repeated, an incomplete last batch is dropped."""
    count, rest = len(prompts), len(prompts) % batch_size
    if count < batch_size:
        print(f"{count} prompts are fewer than the batch_size of {batch_size}: they are repeated")
        return [[prompts[i % count] for i in range(batch_size)]]
    if rest:
        print(f"{count} prompts are not a multiple of the batch_size of {batch_size}: the last {rest} are dropped")
    return [prompts[start : start + batch_size] for start in range(0, count - rest, batch_size)]


def check_context(rows, ctx_len):
    if (longest := max(map(len, rows))) > ctx_len:
        raise ValueError(f"prompt must have at most ctx_len ({ctx_len}) tokens, got {longest}")


def generate_batch(session, tokenizer, prompts, options):
    """One prompt a row -> their ExecInfo. A row's text ends with <|endoftext|>, the batch with its last text."""
    times_s = [time.perf_counter()]
    rows = [encode_prompt(tokenizer, prompt, session.vocab_size) for prompt in prompts]
    check_context(rows, session.ctx_len)
    room = session.ctx_len - max(map(len, rows)) + 1  # the last position, too, predicts a token
    sampler = options.sampler or Sampler(temperature=0)
    end, stream = None if options.ignore_eos else tokenizer.eot, Stream(tokenizer)
    tokens, kept, ended = [], [], np.zeros(len(rows), bool)
    for step in range(min(options.generation_len or room, room)):
        logits = session.decode(tokens[-1]) if step else session.prefill(rows)  # B, V
        tokens.append(sampler(logits))  # B
        times_s.append(time.perf_counter())
        if options.return_logits:
            kept.append(logits.copy())
        ended |= tokens[-1] == end
        if options.stream and not ended[0]:
            print(stream.push(tokens[-1][0]), end="", flush=True)
        if ended.all():
            break
    if options.stream:
        print(stream.end())
        if len(tokens) == room != options.generation_len and not ended.all():
            print(f"(the end of the context: {session.ctx_len} tokens)")
    ids = [cut(row, end) for row in np.stack(tokens, axis=1)]
    texts = [decode(tokenizer, row[row != end]) for row in ids]
    logits = [row[: len(own)] for row, own in zip(np.stack(kept, axis=1), ids, strict=True)] if kept else []
    return ExecInfo(len(ids), texts, padded(ids, session.ctx_len, tokenizer.eot), perf_metrics(times_s), logits)


def cut(ids, end):
    """The ids up to the first end, which is included."""
    found = np.flatnonzero(ids == end)
    return ids[: found[0] + 1] if len(found) else ids


def padded(rows, ctx_len, eot):
    ids = np.full((len(rows), ctx_len), -1 if eot is None else eot)
    for row, own in zip(ids, rows, strict=True):
        row[: len(own)] = own
    return ids


def decode(tokenizer, ids):
    stream = Stream(tokenizer)
    return "".join(map(stream.push, ids)) + stream.end()


def perf_metrics(times_s):
    """times_s: the start, then the time of each token. The first token comes from prefill, and no rate counts it."""
    start, first, last, decoded = times_s[0], times_s[1], times_s[-1], len(times_s) - 2
    rates = [decoded / (last - since) if decoded else 0.0 for since in (first, start)]
    return PerfMetrics(first - start, *rates, last - start)


def join(infos):
    """One ExecInfo of all batches, with the means of their metrics."""
    metrics = PerfMetrics(*np.mean([astuple(info.perf_metrics) for info in infos], axis=0).tolist())
    texts, ids = [info.generated_texts for info in infos], [info.generated_ids for info in infos]
    return ExecInfo(infos[0].batch_size, texts, ids, metrics, [rows for info in infos for rows in info.logits])


def print_stats(info):
    print("\n========================= Performance Stats =========================")
    if info.batch_size > 1:
        print("Batch Performance : \n")
    print(info)
    print("=====================================================================")
