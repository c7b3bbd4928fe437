"""One truth: what a project's example wrote, beside transformers in float32, token by token.

transformers reads what the project wrote, and says at each place which token it would have chosen, and by what logits.
So a text that leaves transformers' own at one place is still compared at all the places after it.
"""

import json
import os
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, GPT2LMHeadModel, logging

from shared.sampling import Sampler
from tests.conventions.rules import ROOT
from tests.tools.examples import EXAMPLES, Answer

logging.disable_progress_bar()
logging.set_verbosity_error()

NANO = ROOT / "checkpoints" / "gpt2-nano"
LIMIT = 2e-4  # of a logit, in float32; rounding makes up to 3e-5, and erf in place of tanh 4e-3


@dataclass(frozen=True)
class Case:
    name: str
    prompt: str
    new_tokens: int = 200
    temperature: float = 0  # greedy
    tie: float = 0  # where the referee's two best logits are as near as this, either may be taken


class Referee:
    """transformers' GPT-2 in float32, and its tokenizer."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.context = self.model.config.n_positions

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text) or [self.tokenizer.eos_token_id]

    def text(self, ids) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    @lru_cache(maxsize=16)  # projects that agree ask for the same  # noqa: B019
    @torch.inference_mode()
    def logits(self, ids: tuple[int, ...], first: int) -> np.ndarray:
        """For each of ids[first:], the logits behind the tokens before it; past the context, behind the last of them
        that fit, as nanoGPT crops."""
        inside = self.model(torch.tensor([ids[: self.context]])).logits[0, first - 1 : len(ids) - 1]
        windows = [ids[end - self.context : end] for end in range(max(first, self.context + 1), len(ids))]
        past = [self.model(torch.tensor(part), logits_to_keep=1).logits[:, 0] for part in chunks(windows, 16)]
        return torch.cat([inside, *past]).numpy()

    def goes_on(self, ids: tuple[int, ...], count: int = 12) -> tuple[int, ...]:
        """ids and what it would write behind them."""
        for _ in range(count):
            ids = (*ids, int(self.logits((*ids, 0), len(ids))[0].argmax()))
        return ids


def chunks(items, size):
    return [items[start : start + size] for start in range(0, len(items), size)]


@dataclass
class Outcome:
    """How one project's answer to one case compares; complaints is empty where all is well."""

    project: str
    model: str
    case: str
    complaints: list[str] = field(default_factory=list)
    prompt_tokens: int = 0
    new_tokens: int = 0
    context: int = 0
    flips: list[int] = field(default_factory=list)  # positions where a tie went the other way
    worst_at: list[float] = field(default_factory=list)  # the largest difference of a logit, for each token
    mean: float = 0.0  # difference of a logit

    def complain(self, what: str) -> None:
        self.complaints.append(f"{self.project} ({self.model}, the prompt {self.case!r}): {what}")

    @property
    def worst(self) -> float:
        return float(np.max(self.worst_at, initial=0))  # NaN where any is


def compare(project: str, model: str, case: Case, answer: Answer, referee: Referee) -> Outcome:
    outcome = Outcome(project, model, case.name, context=referee.context)
    prompt = referee.encode(case.prompt)
    room = referee.context - len(prompt)
    if room < 0 and not EXAMPLES[project].slides:
        if answer.status != 2 or answer.dump or len(answer.stderr.splitlines()) != 1:
            said = f"exit status {answer.status} and {answer.stderr!r}"
            outcome.complain(f"it does not go past the context, so one line and exit status 2 are expected, not {said}")
        return outcome
    if answer.status != 0 or not answer.dump:
        last = (answer.stderr.strip().splitlines() or ["nothing on stderr"])[-1]
        outcome.complain(f"the example ended with exit status {answer.status}: {last}")
        return outcome

    given, tokens, logits = (answer.dump[name] for name in ("prompt_ids", "tokens", "logits"))
    if given.tolist() != prompt:
        place = next((i for i, (a, b) in enumerate(zip(given, prompt, strict=False)) if a != b), "the end")
        outcome.complain(f"prompt ids differ from transformers' tokenizer's at {place}: {given.tolist()} and {prompt}")
        return outcome
    counts = {case.new_tokens}
    if case.new_tokens > room and not EXAMPLES[project].slides:
        counts = {room, room + 1}  # the last one may be written, though no place is left from which to read it
    if len(tokens) not in counts:
        outcome.complain(f"{len(tokens)} tokens were written, {' or '.join(map(str, sorted(counts)))} are expected")
    if logits.shape != (len(tokens), referee.model.config.vocab_size) or not len(tokens):
        outcome.complain(f"logits have the shape {logits.shape}, one row a token is expected, of {len(tokens)} tokens")
        return outcome

    text = (*prompt, *map(int, tokens))
    exact = referee.logits(text, len(prompt))
    outcome.prompt_tokens, outcome.new_tokens = len(prompt), len(tokens)
    differences = np.abs(logits - exact)
    outcome.worst_at, outcome.mean = differences.max(axis=1).tolist(), float(differences.mean())
    best = np.sort(exact, axis=1)
    gaps = best[:, -1] - best[:, -2]
    sampler = Sampler(temperature=case.temperature, top_k=50, seed=1)
    other = np.flatnonzero(sampler(exact) != tokens)
    if case.temperature == 0:
        second = exact.argsort(axis=1)[other, -2] == tokens[other]
        tied = second & (gaps[other] <= case.tie)
        outcome.flips = [len(prompt) + int(i) for i in other[tied]]
        other = other[~tied]
    if len(other):
        outcome.complain(where_texts_part(project, text, len(prompt) + int(other[0]), referee, sampler))
    far = np.flatnonzero(~(differences.max(axis=1) <= LIMIT))  # true for NaN
    if len(far):
        outcome.complain(
            f"logits are up to {outcome.worst:.1e} from transformers', {LIMIT:g} at most is expected; at {len(far)} of "
            f"{len(tokens)} positions, first at {len(prompt) + int(far[0])}, new token {int(far[0])}"
        )
    return outcome


def where_texts_part(project, text, position, referee, sampler):
    before = text[:position]
    greedy = sampler.temperature == 0
    theirs = referee.goes_on(before) if greedy else before
    skip = max(0, position - 12)
    lines = [
        f"the texts part at position {position}:",
        f"  both           {referee.text(before[skip:])!r}",
        f"  {project:14} {referee.text(text[position : position + 12])!r}",
    ]
    if greedy:
        lines.append(f"  transformers   {referee.text(theirs[position:])!r}")
    else:
        lines.append("  transformers' logits and the same seed give another token")
    return "\n".join(lines)


# -- the report


def write_report(folder: Path, outcomes: list[Outcome]) -> str:
    """parity.md, parity.json and parity.png; returns the table."""
    folder.mkdir(parents=True, exist_ok=True)
    text = table(outcomes)
    found = "".join(f"\n{complaint}\n" for outcome in outcomes for complaint in outcome.complaints)
    rows = [
        {key: getattr(outcome, key) for key in ("project", "model", "case", "prompt_tokens", "new_tokens", "flips")}
        | {"max_difference": outcome.worst, "mean_difference": outcome.mean, "complaints": outcome.complaints}
        for outcome in outcomes
    ]
    for name, content in {"parity.md": text + found, "parity.json": json.dumps(rows, indent=1) + "\n"}.items():
        part = folder / f"{name}.{os.getpid()}"
        part.write_text(content, encoding="utf-8")
        part.replace(folder / name)
    draw(folder / "parity.png", outcomes)
    return text


def table(outcomes: list[Outcome]) -> str:
    """A line a project, in Markdown."""
    lines = [
        "| project | texts | tokens | other tokens than transformers' | logits differ by at most | in the mean |",
        "|---|---|---|---|---|---|",
    ]
    for project in dict.fromkeys(outcome.project for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.project == project]
        compared = [outcome for outcome in own if outcome.new_tokens]
        flips, wrong = sum(len(outcome.flips) for outcome in own), sum(bool(outcome.complaints) for outcome in own)
        others = f"DISAGREES in {wrong} of {len(own)} texts" if wrong else f"{flips} (ties)" if flips else "none"
        tokens = sum(outcome.new_tokens for outcome in compared)
        mean = sum(outcome.mean * outcome.new_tokens for outcome in compared) / (tokens or 1)
        worst = max((outcome.worst for outcome in compared), default=0)
        lines.append(f"| {project} | {len(compared)} | {tokens:,} | {others} | {worst:.1e} | {mean:.1e} |")
    return "\n".join(lines) + "\n"


def draw(path: Path, outcomes: list[Outcome]) -> None:
    """How far logits are from transformers', by position: a panel a text, a line a project."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = list(dict.fromkeys((o.model, o.case) for o in outcomes if o.new_tokens))
    if not cases:
        return
    columns = min(3, len(cases))
    rows = -(-len(cases) // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(4.2 * columns, 2.7 * rows), sharey=True, squeeze=False, layout="constrained"
    )
    for panel in panels.flat[len(cases) :]:
        panel.set_axis_off()
    colors = {project: f"C{i}" for i, project in enumerate(EXAMPLES)}
    for panel, (model, case) in zip(panels.flat, cases, strict=False):
        for o in outcomes:
            if (o.model, o.case) == (model, case) and o.new_tokens:
                places = o.prompt_tokens + np.arange(o.new_tokens)
                worst = np.maximum(o.worst_at, 1e-7)  # a log axis has no place for equal logits
                panel.semilogy(places, worst, color=colors.get(o.project), lw=1, alpha=0.85)
                if places[-1] > o.context:
                    panel.axvline(o.context, color="grey", lw=0.8, ls=":")
        panel.axhline(LIMIT, color="black", lw=0.8, ls="--")
        panel.set_title(f"{model}: {case}", fontsize=10)
        panel.grid(alpha=0.3)
    for panel in panels[:, 0]:
        panel.set_ylabel("largest difference\nof a logit")
    for panel in panels[-1]:
        panel.set_xlabel("position in the text")
    handles = [plt.Line2D([], [], color=color, label=project) for project, color in colors.items()]
    handles.append(plt.Line2D([], [], color="black", lw=0.8, ls="--", label=f"the limit, {LIMIT:g}"))
    handles.append(plt.Line2D([], [], color="grey", lw=0.8, ls=":", label="the context's edge"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle("Logits of each project beside transformers', float32, by position")
    part = path.with_name(f"{path.stem}.{os.getpid()}.png")
    figure.savefig(part, dpi=110)
    part.replace(path)
    plt.close(figure)
