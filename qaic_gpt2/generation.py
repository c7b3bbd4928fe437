"""From prompts to texts on a compiled program: the loop over tokens, and QEfficient's statistics."""

import time
from collections import deque
from dataclasses import astuple, dataclass, field
from pathlib import Path

import numpy as np

from shared.sampling import Sampler
from shared.tokenizer import Stream, byte_of_character, encode_prompt


@dataclass
class PerfMetrics:
    prefill_time: float  # s, tokenizing included: the time to the first token
    decode_perf: float  # tokens/s of one row, from the second token on
    total_perf: float  # tokens/s of one row, over total_time
    total_time: float  # s


@dataclass(repr=False)
class ExecInfo:
    """What generate returns; printed, it is QEfficient's statistics."""

    batch_size: int  # 1 with continuous batching, whose rates are of all rows
    generated_texts: list  # a list of texts for each batch; with continuous batching the texts
    generated_ids: list  # an array (batch, ctx_len) for each batch, filled up with <|endoftext|> (-1 without one)
    perf_metrics: PerfMetrics
    logits: list = field(default_factory=list)  # with return_logits: an array (tokens, V) for each text
    tokens_per_call: float | None = None  # with draft_tokens: of decode

    def __repr__(self) -> str:
        perf = self.perf_metrics
        lines = [
            f"Average Prefill time a.k.a TTFT is= {perf.prefill_time:.2f} sec",
            f"Decode is= {perf.decode_perf * self.batch_size:.2f} tokens/sec",
            f"Total is= {perf.total_perf * self.batch_size:.2f} tokens/sec",
            f"Total (E2E) inference time is= {perf.total_time:.2f} sec",
        ]
        if self.tokens_per_call is not None:
            lines.append(f"Tokens per call of decode is= {self.tokens_per_call:.2f}")
        return "\n".join(lines)


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


def read_prompts(prompts: str | list[str] | None, path: str | None) -> list[str]:
    """The prompts as a list, or the lines of a file, as QEfficient reads them."""
    if path is not None:
        try:
            return [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise ValueError(f"prompts_txt_file_path must be a text file, got {path}: {error}") from None
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"prompts must be a text or a list of texts, got {prompts!r}")
    return [*prompts]


def generate(session, tokenizer, prompts: list[str], options: Options) -> ExecInfo:
    """All prompts: batch by batch, or, with continuous batching, from a queue."""
    if session.continuous:
        return generate_batch(session, tokenizer, fill(prompts, session.batch_size), options)
    batches = split(prompts, session.batch_size)
    return join([generate_batch(session, tokenizer, batch, options) for batch in batches])


def fill(prompts: list[str], batch_size: int) -> list[str]:
    """At least batch_size prompts, by QEfficient's rule: too few are repeated."""
    count = len(prompts)
    if count >= batch_size:
        return prompts
    print(f"{count} prompts are fewer than the batch_size of {batch_size}: they are repeated")
    return [prompts[i % count] for i in range(batch_size)]


def split(prompts: list[str], batch_size: int) -> list[list[str]]:
    """Whole batches, by QEfficient's rule: too few prompts are repeated, an incomplete last batch is dropped."""
    prompts = fill(prompts, batch_size)
    if rest := len(prompts) % batch_size:
        print(
            f"{len(prompts)} prompts are not a multiple of the batch_size of {batch_size}: the last {rest} are dropped"
        )
    return [prompts[start : start + batch_size] for start in range(0, len(prompts) - rest, batch_size)]


def check_context(rows, ctx_len):
    if (longest := max(map(len, rows))) > ctx_len:
        raise ValueError(f"prompt must have at most ctx_len ({ctx_len}) tokens, got {longest}")


@dataclass
class Text:
    """A text that is being generated."""

    prompt: list[int]
    most: int  # tokens
    end: int | None  # the token that ends it
    keep_logits: bool
    stream: Stream | None = None  # prints it
    tokens: list[int] = field(default_factory=list)
    logits: list[np.ndarray] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        return len(self.tokens) == self.most or self.tokens[-1:] == [self.end]

    def add(self, token: int, logits: np.ndarray) -> None:
        self.tokens.append(token)
        if self.keep_logits:
            self.logits.append(logits.copy())
        if self.stream and token != self.end:
            print(self.stream.push(token), end="", flush=True)


def begin(session, tokenizer, prompts: list[str], options: Options) -> list[Text]:
    """A Text for each prompt, of which the first is printed."""
    prompts = [encode_prompt(tokenizer, prompt, session.vocab_size) for prompt in prompts]
    check_context(prompts, session.ctx_len)
    end, texts = None if options.ignore_eos else tokenizer.eot, []
    for ids in prompts:
        room = session.ctx_len - len(ids) + 1  # the last position, too, predicts a token
        texts.append(Text(ids, min(options.generation_len or room, room), end, options.return_logits))
    texts[0].stream = Stream(tokenizer) if options.stream else None
    return texts


def generate_batch(session, tokenizer, prompts: list[str], options: Options) -> ExecInfo:
    """The ExecInfo of prompts, one for each row of the session; a row whose text has ended takes one that is left."""
    times_s, reads_s = [time.perf_counter()], []
    texts = begin(session, tokenizer, prompts, options)
    rows, waiting = texts[: session.batch_size], deque(texts[session.batch_size :])
    sampler, fresh = options.sampler or Sampler(temperature=0), [*range(len(rows))]  # fresh: rows with a new prompt
    while fresh or not all(text.ended for text in rows):
        logits, read_s = next_logits(session, rows, fresh)  # B, V
        for text, token, own in zip(rows, sampler(logits).tolist(), logits, strict=True):
            if not text.ended:
                text.add(token, own)
        times_s.append(time.perf_counter())
        reads_s.append(read_s)
        fresh = refill(session, rows, waiting)
    if options.stream:
        print(texts[0].stream.end())
        if texts[0].most != options.generation_len and texts[0].tokens[-1] != texts[0].end:
            print(f"(the end of the context: {session.ctx_len} tokens)")
    metrics = perf_metrics(times_s, reads_s, texts, session.continuous)
    return exec_info(session, tokenizer, texts, metrics)


def next_logits(session, rows: list[Text], fresh: list[int]) -> tuple[np.ndarray, float]:
    """(the logits (B, V) after the last token of each row, or after the prompt of a fresh one; s to read prompts)"""
    if len(fresh) < len(rows):
        logits = session.decode(np.array([text.tokens[-1] if text.tokens else 0 for text in rows]))
    else:
        logits = np.empty((len(rows), session.vocab_size), np.float32)
    start = time.perf_counter()
    for row in fresh:
        logits[row] = session.read(row, rows[row].prompt)
    return logits, time.perf_counter() - start


def refill(session, rows: list[Text], waiting: deque[Text]) -> list[int]:
    """Gives each row whose text has ended the next one that waits; returns these rows."""
    fresh = []
    for row in [row for row, text in enumerate(rows) if text.ended]:
        session.positions[row] = 0  # what the row decodes after its end is not read
        if waiting:
            rows[row] = waiting.popleft()
            fresh.append(row)
    return fresh


def exec_info(session, tokenizer, texts: list[Text], metrics: PerfMetrics) -> ExecInfo:
    ids = np.full((len(texts), session.ctx_len), -1 if tokenizer.eot is None else tokenizer.eot)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text.tokens)] = text.tokens
    decoded = [decode(tokenizer, [id for id in text.tokens if id != text.end]) for text in texts]
    logits = [np.stack(text.logits) for text in texts if text.logits]
    batch_size = 1 if session.continuous else session.batch_size
    return ExecInfo(batch_size, decoded, ids, metrics, logits, session.tokens_per_call)


def decode(tokenizer, ids):
    stream = Stream(tokenizer)
    return "".join(map(stream.push, ids)) + stream.end()


def perf_metrics(times_s: list[float], reads_s: list[float], texts: list[Text], continuous: bool) -> PerfMetrics:
    """QEfficient's. times_s: the start, then the end of each step; reads_s: of it, the time to read prompts.

    A text's first token comes from prefill, and no rate counts it. With continuous batching the rates are of all rows,
    and reading a prompt is never decoding; otherwise they are of one row.
    """
    start, first, last = times_s[0], times_s[1], times_s[-1]
    counts = [len(text.tokens) - 1 for text in texts]
    decoded, pause, prompts = max(counts), 0.0, 1
    if continuous:
        decoded, pause, prompts = sum(counts), sum(reads_s[1:]), len(texts)
    rates = [decoded / seconds if decoded else 0.0 for seconds in (last - first - pause, last - start)]
    return PerfMetrics((first - start + pause) / prompts, *rates, last - start)


def join(infos: list[ExecInfo]) -> ExecInfo:
    """One ExecInfo of all batches, with the means of their metrics."""
    metrics = PerfMetrics(*np.mean([astuple(info.perf_metrics) for info in infos], axis=0).tolist())
    texts, ids = [info.generated_texts for info in infos], [info.generated_ids for info in infos]
    logits, per_call = [rows for info in infos for rows in info.logits], infos[0].tokens_per_call
    if per_call is not None:
        per_call = float(np.mean([info.tokens_per_call for info in infos]))
    return ExecInfo(infos[0].batch_size, texts, ids, metrics, logits, per_call)


def print_stats(info: ExecInfo, prompts: list[str], automation: bool) -> None:
    if automation:
        print("input=", prompts)
        print("output=", info.generated_texts)
        print(info)
        return
    print("\n========================= Performance Stats =========================")
    if info.batch_size > 1:
        print("Batch Performance : \n")
    print(info)
    print("=====================================================================")
