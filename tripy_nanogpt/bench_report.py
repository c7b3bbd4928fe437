"""How bench.py and bench_quant.py measure: medians of interleaved calls, one row of results for each work."""

import resource
import time
from statistics import median
from typing import NamedTuple

import torch

PAIRS = 5
PROMPT_TOKENS = 16


def time_s(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def bandwidth():
    """Bytes/s: the best of ten sums of 256 MiB of float32 by torch, on all cores; NumPy's sum reads a quarter less."""
    ones = torch.ones(2**26)
    return 2**28 / min(time_s(ones.sum) for _ in range(10))


class Work(NamedTuple):
    """new_tokens after prompt_tokens; if new_tokens is 1, what is measured is prefill."""

    work: str
    model: str
    dtype: str
    prompt_tokens: int
    new_tokens: int


class Report:
    def __init__(self, device):
        self.device, self.bandwidth, self.results = device, bandwidth(), []
        self.on_cpu = device.startswith("cpu")  # on a GPU neither transformers nor this bandwidth is comparable
        print(f"{device}; memory bandwidth {self.bandwidth / 1e9:.1f} GB/s", flush=True)

    def add(self, work, ours, peer=None, peer_name="transformers", read=0, **extra):
        """Median rates of ours and, interleaved, of peer, after a first call of each; the first of ours compiles.

        read: bytes that a step has to read from memory.
        """
        first_s, _ = time_s(ours), peer and peer()
        pairs = [(time_s(ours), time_s(peer) if peer else None) for _ in range(PAIRS)]
        took_s = median(ours_s for ours_s, _ in pairs)
        size = work.prompt_tokens if work.new_tokens == 1 else work.new_tokens
        row = {
            "compile_s": round(max(0, first_s - took_s), 2),
            "ttft_ms": round(took_s * 1e3, 2) if work.new_tokens == 1 else None,
            "tokens_per_s": round(size / took_s, 1),
            "mbu": round(read * size / took_s / self.bandwidth, 3) if read and self.on_cpu else None,
        }
        line = f"{size / took_s:8,.1f} tokens/s"
        if work.new_tokens > 1:
            line += f", {took_s / size * 1e3:.2f} ms a token"
        if peer:
            peer_s = median(peer_s for _, peer_s in pairs)
            row["peer"] = {"name": peer_name, "tokens_per_s": round(size / peer_s, 1)}
            row["ratio"] = round(median(peer_s / ours_s for ours_s, peer_s in pairs), 3)
            line += f", {row['ratio']:.2f} x {peer_name} ({size / peer_s:,.1f})"
        self.add_row(work, row | extra, line)

    def add_row(self, work, row, line):
        device, _, engine = self.device.partition(": ")
        empty = dict.fromkeys(("compile_s", "ttft_ms", "tokens_per_s", "peer", "ratio", "mbu"))
        row = work._asdict() | {"device": device, "engine": engine, "batch": 1} | empty | row
        row["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        self.results.append(row)
        print(f"{work.work:18} {work.model:12} {work.dtype:8} {line}", flush=True)
