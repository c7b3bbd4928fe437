"""Parity: the tokens and logits of a project's example vs transformers in float32.

transformers reads what the project wrote, and computes its own logits for each position. So a text that differs from
transformers' own at one position is still compared at all positions after it.
"""

import json
from dataclasses import asdict, dataclass, field
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
LIMIT = 2e-4  # of a logit, in float32: rounding gives up to 3e-5, erf for tanh 4e-3


@dataclass(frozen=True)
class Case:
    name: str
    prompt: str
    new_tokens: int = 200
    temperature: float = 0  # greedy
    tie: float = 0  # if the referee's two largest logits differ by less, either token will do


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
        """For each of ids[first:], the logits after the tokens before it: [len(ids) - first, V]. Past the context,
        after the last of them that fit, as nanoGPT crops."""
        inside = self.model(torch.tensor([ids[: self.context]])).logits[0, first - 1 : len(ids) - 1]
        windows = [ids[end - self.context : end] for end in range(max(first, self.context + 1), len(ids))]
        past = [self.model(torch.tensor(part), logits_to_keep=1).logits[:, 0] for part in chunks(windows, 16)]
        return torch.cat([inside, *past]).numpy()

    def generate(self, ids: tuple[int, ...], count: int = 12) -> tuple[int, ...]:
        """ids, and what transformers would write after them."""
        for _ in range(count):
            ids = (*ids, int(self.logits((*ids, 0), len(ids))[0].argmax()))
        return ids


def chunks(items, size):
    return [items[start : start + size] for start in range(0, len(items), size)]


@dataclass
class Outcome:
    """How one project's answer to one case compares; no errors is agreement."""

    project: str
    model: str
    case: str
    context: int
    prompt_tokens: int = 0
    worst_at: list[float] = field(default_factory=list)  # the largest difference of a logit, for each new token
    mean: float = 0.0  # difference of a logit
    ties: list[int] = field(default_factory=list)  # positions where two logits tie and the other one was taken
    errors: list[str] = field(default_factory=list)

    @property
    def new_tokens(self) -> int:
        return len(self.worst_at)

    @property
    def worst(self) -> float:
        return float(np.max(self.worst_at, initial=0))  # NaN if any is


def compare(project: str, model: str, case: Case, answer: Answer, referee: Referee) -> Outcome:
    outcome = Outcome(project, model, case.name, referee.context)
    found = find_errors(outcome, case, answer, referee)
    outcome.errors = [f"{project} ({model}, the prompt {case.name!r}): {error}" for error in found]
    return outcome


def find_errors(outcome: Outcome, case: Case, answer: Answer, referee: Referee):
    prompt = referee.encode(case.prompt)
    room, slides = referee.context - len(prompt), EXAMPLES[outcome.project].slides
    if room < 0 and not slides:
        if answer.status != 2 or answer.dump or len(answer.stderr.splitlines()) != 1:
            given = f"exit status {answer.status} and {answer.stderr!r}"
            yield f"a prompt past the context must end in one line and exit status 2, got {given}"
        return
    if answer.status != 0 or not answer.dump:
        last = (answer.stderr.strip().splitlines() or ["nothing on stderr"])[-1]
        yield f"the example ended with exit status {answer.status}: {last}"
        return
    given, tokens, logits = (answer.dump[name] for name in ("prompt_ids", "tokens", "logits"))
    if given.tolist() != prompt:
        place = next((i for i, (a, b) in enumerate(zip(given, prompt, strict=False)) if a != b), "the end")
        yield f"prompt ids differ from transformers' at {place}: {given.tolist()} and {prompt}"
        return
    count = case.new_tokens if slides else min(case.new_tokens, room + 1)  # no position is left for the last one
    if len(tokens) != count:
        yield f"{len(tokens)} tokens were written, must be {count}"
    if logits.shape != (len(tokens), referee.model.config.vocab_size) or not len(tokens):
        yield f"logits have the shape {logits.shape}, must be one row for each of {len(tokens)} tokens"
        return
    text = (*prompt, *map(int, tokens))
    exact = referee.logits(text, len(prompt))
    differences = np.abs(logits - exact)
    outcome.prompt_tokens = len(prompt)
    outcome.worst_at, outcome.mean = differences.max(axis=1).tolist(), float(differences.mean())
    yield from find_other_tokens(outcome, case, text, exact, referee)
    if len(far := np.flatnonzero(~(differences.max(axis=1) <= LIMIT))):  # true for NaN
        yield (
            f"logits differ by up to {outcome.worst:.1e} from transformers', more than {LIMIT:g}, at {len(far)} of "
            f"{len(tokens)} positions, first at {len(prompt) + int(far[0])}, new token {int(far[0])}"
        )


def find_other_tokens(outcome: Outcome, case: Case, text: tuple[int, ...], exact: np.ndarray, referee: Referee):
    """Where another token follows from transformers' logits; a tie goes either way."""
    first = outcome.prompt_tokens
    tokens = np.array(text[first:])
    other = np.flatnonzero(Sampler(temperature=case.temperature, top_k=50, seed=1)(exact) != tokens)
    if case.temperature == 0:
        ranked = exact.argsort(axis=1)[other]
        best, second = (exact[other, ranked[:, place]] for place in (-1, -2))
        tied = (ranked[:, -2] == tokens[other]) & (best - second <= case.tie)
        outcome.ties, other = (first + other[tied]).tolist(), other[~tied]
    if not len(other):
        return
    place = first + int(other[0])
    before, ours, shown = text[:place], text[place : place + 12], text[max(0, place - 12) : place]
    theirs = "  transformers' logits and the same seed give another token"
    if case.temperature == 0:
        theirs = f"  transformers   {referee.text(referee.generate(before)[place:])!r}"
    lines = f"  both           {referee.text(shown)!r}", f"  {outcome.project:14} {referee.text(ours)!r}", theirs
    yield "\n".join([f"the texts differ from position {place}:", *lines])


# -- the report


def write_report(folder: Path, outcomes: list[Outcome]) -> str:
    """parity.md, parity.json and parity.png; returns the table."""
    folder.mkdir(parents=True, exist_ok=True)
    text = table(outcomes)
    errors = "".join(f"\n{error}\n" for outcome in outcomes for error in outcome.errors)
    (folder / "parity.md").write_text(text + errors, encoding="utf-8")
    (folder / "parity.json").write_text(json.dumps([asdict(o) for o in outcomes], indent=1) + "\n", encoding="utf-8")
    draw(folder / "parity.png", outcomes)
    return text


def table(outcomes: list[Outcome]) -> str:
    """One line for each project, in Markdown."""
    lines = [
        "| project | texts | tokens | other tokens than transformers' | logits differ by at most | in the mean |",
        "|---|---|---|---|---|---|",
    ]
    for project in dict.fromkeys(outcome.project for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.project == project]
        compared = [outcome for outcome in own if outcome.new_tokens]
        ties, wrong = sum(len(outcome.ties) for outcome in own), sum(bool(outcome.errors) for outcome in own)
        others = f"DISAGREES in {wrong} of {len(own)} texts" if wrong else f"{ties} (ties)" if ties else "none"
        tokens = sum(outcome.new_tokens for outcome in compared)
        mean = sum(outcome.mean * outcome.new_tokens for outcome in compared) / (tokens or 1)
        worst = max((outcome.worst for outcome in compared), default=0)
        lines.append(f"| {project} | {len(compared)} | {tokens:,} | {others} | {worst:.1e} | {mean:.1e} |")
    return "\n".join(lines) + "\n"


def draw(path: Path, outcomes: list[Outcome]) -> None:
    """How far logits are from transformers', by position: a line for each project, its largest over the texts."""
    compared = [outcome for outcome in outcomes if outcome.new_tokens]
    if not compared:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panel = plt.subplots(figsize=(8.3, 3.6), layout="constrained")
    for project in dict.fromkeys(outcome.project for outcome in compared):
        worst = worst_by_position([outcome for outcome in compared if outcome.project == project])
        panel.semilogy([*worst], [*worst.values()], lw=1.2, alpha=0.85, label=project)
    panel.axhline(LIMIT, color="black", lw=1, ls="--", label=f"the limit, {LIMIT:g}")
    panel.axvline(compared[0].context, color="grey", lw=1, ls=":", label="the end of the context")
    panel.set(xlabel="position in the text", ylabel="largest difference of a logit")
    panel.set_ylim(bottom=1e-7)
    panel.set_title("Logits of each project vs transformers, float32, the largest over all texts", fontsize=10)
    panel.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


def worst_by_position(outcomes: list[Outcome]) -> dict[int, float]:
    found: dict[int, float] = {}
    for outcome in outcomes:
        for position, worst in enumerate(outcome.worst_at, outcome.prompt_tokens):
            found[position] = max(worst, found.get(position, 1e-7))  # a log axis has no place for equal logits
    return dict(sorted(found.items()))
