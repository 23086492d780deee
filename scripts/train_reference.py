"""Train the in-house decoders gpt2-tiny, opt-tiny and bloom-tiny on text that every Python installation carries.

They are made to test quantization with: real architectures, small enough for the repository, and text that nobody has to
download. The same seed, steps, threads, Python version (its library is the text) and torch version give the same bytes on
the same kind of CPU.
"""

from __future__ import annotations

import argparse
import itertools
import math
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy

from scalefold.compiler.artifact import publish, staged
from scalefold.models import tiny

MODELS = Path(__file__).parent.parent / "models"
NAMES = ("gpt2-tiny", "opt-tiny", "bloom-tiny")
SPECIAL = ("<|endoftext|>", "<|padding|>")
MIXTURE = {"prose": 0.45, "code": 0.40, "tables": 0.15}
"""Share of each domain in what a model reads."""

LONG_SHARE = 0.1
"""Share of the steps, at the end, with windows as long as the context: so that every position is trained."""

Tokens = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Plan:
    """What is trained, and how.

    Attributes:
        window: tokens of a training sequence, and of an evaluation window.
        rows: sequences per step.
        rate: highest learning rate of AdamW, for embeddings and vectors.
        turn: highest learning rate of Muon, for the matrices of the layers.
    """

    steps: int = 1500
    seed: int = 0
    threads: int = 2
    width: int = 256
    layers: int = 4
    heads: int = 4
    vocabulary: int = 2048
    context: int = 512
    window: int = 256
    rows: int = 4
    rate: float = 0.005
    turn: float = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--steps", type=int, default=Plan.steps, help=f"default {Plan.steps}")
    parser.add_argument("--seed", type=int, default=Plan.seed, help=f"default {Plan.seed}")
    parser.add_argument("--threads", type=int, default=Plan.threads, help=f"default {Plan.threads}; part of the result")
    parser.add_argument("-o", "--output", type=Path, default=MODELS, metavar="DIR", help="default: models/")
    arguments = parser.parse_args()
    plan = Plan(steps=arguments.steps, seed=arguments.seed, threads=arguments.threads)
    torch.set_num_threads(plan.threads)
    console = Console()
    with console.status("reading the text of this Python installation"):
        text = {domain: list(tiny.training(domain)) for domain in tiny.DOMAINS}
        held_out = {domain: list(tiny.held_out(domain)) for domain in tiny.DOMAINS}
    for name in arguments.names:
        found = make(name, plan, text, held_out, arguments.output / name, console)
        console.print(f"{name}: held-out perplexity " + ", ".join(f"{key} {value:.1f}" for key, value in found.items()))


def make(
    name: str,
    plan: Plan,
    text: Mapping[str, list[str]],
    held_out: Mapping[str, list[str]],
    output: Path,
    console: Console,
) -> dict[str, float]:
    """Train one model, write its folder, and return the held-out perplexity of each domain, measured as stored."""
    tokenizer = tokenizer_of(plan, text)
    model = train(model_of(name, plan), plan, tokens_of(tokenizer, text), name, console)
    model.half().float()  # what is stored is measured
    found = {domain: perplexity(model, tokens, plan) for domain, tokens in tokens_of(tokenizer, held_out).items()}
    with staged(output) as scratch:
        stage = scratch / name
        model.half().save_pretrained(stage)
        fast = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token=SPECIAL[0],
            eos_token=SPECIAL[0],
            pad_token=SPECIAL[1],
            model_max_length=plan.context,
        )
        fast.save_pretrained(stage)
        (stage / "README.md").write_text(card(name, plan, model, text, found), encoding="utf-8")
        publish(stage, output)
    return found


def tokenizer_of(plan: Plan, text: Mapping[str, list[str]]) -> tokenizers.Tokenizer:
    """A byte-level BPE trained on the domains in the shares of the mixture."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=plan.vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    whole = min(sum(map(len, text[domain])) / share for domain, share in MIXTURE.items())
    shares = (spread(text[domain], whole * share) for domain, share in MIXTURE.items())
    tokenizer.train_from_iterator(itertools.chain.from_iterable(shares), trainer)
    return tokenizer


def spread(documents: list[str], characters: float) -> Iterable[str]:
    """The same share of the lines of every document, about so many characters in all."""
    share = characters / sum(map(len, documents))
    for document in documents:
        lines = document.splitlines(keepends=True)
        yield "".join(line for index, line in enumerate(lines) if int((index + 1) * share) > int(index * share))


def tokens_of(tokenizer: tokenizers.Tokenizer, text: Mapping[str, list[str]]) -> dict[str, torch.Tensor]:
    """The documents of each domain as one row of tokens, each document behind an end-of-text token."""
    start = tokenizer.token_to_id(SPECIAL[0])
    return {
        domain: torch.tensor(
            [token for entry in tokenizer.encode_batch(documents) for token in (start, *entry.ids)], dtype=torch.int64
        )
        for domain, documents in text.items()
    }


def model_of(name: str, plan: Plan) -> Any:
    """A model with random weights, the same for the same seed."""
    start, padding = range(len(SPECIAL))
    same = {"vocab_size": plan.vocabulary, "bos_token_id": start, "eos_token_id": start, "pad_token_id": padding}
    torch.manual_seed(plan.seed)
    if name == "gpt2-tiny":
        sizes = {"n_embd": plan.width, "n_layer": plan.layers, "n_head": plan.heads, "n_positions": plan.context}
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**same, **sizes, **dropout))
    if name == "opt-tiny":
        config = transformers.OPTConfig(
            **same,
            hidden_size=plan.width,
            word_embed_proj_dim=plan.width,
            ffn_dim=4 * plan.width,
            num_hidden_layers=plan.layers,
            num_attention_heads=plan.heads,
            max_position_embeddings=plan.context,
            dropout=0.0,
        )
        return transformers.OPTForCausalLM(config)
    config = transformers.BloomConfig(**same, hidden_size=plan.width, n_layer=plan.layers, n_head=plan.heads)
    return transformers.BloomForCausalLM(config)


class Muon:
    """Momentum whose update of a matrix has singular values near 1 (Jordan et al., 2024).

    Here 0.2 million tokens of it beat 0.77 million of AdamW alone, on held-out prose and code. `torch.optim.Muon` computes
    in bfloat16, which takes 40 times as long on a CPU without such units.

    Args:
        matrices: what it updates.
    """

    def __init__(self, matrices: Iterable[torch.nn.Parameter]) -> None:
        self.momenta = [(matrix, torch.zeros_like(matrix)) for matrix in matrices]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Update every matrix from its gradient, with Nesterov momentum and weight decay."""
        for matrix, momentum in self.momenta:
            assert matrix.grad is not None
            momentum.lerp_(matrix.grad, 0.05)
            update = orthogonal(matrix.grad.lerp(momentum, 0.95))
            size = math.sqrt(max(matrix.shape) / min(matrix.shape))
            matrix.mul_(1 - 0.1 * rate).add_(update, alpha=-rate * size)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest matrix with singular values of about 1, by five steps of a quintic Newton-Schulz iteration."""
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonal(matrix.T).T
    x: torch.Tensor = matrix / (matrix.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


def train(model: Any, plan: Plan, tokens: Tokens, name: str, console: Console) -> Any:
    """Muon and AdamW, with warm-up and a linear way down; every row is a window at random from a domain at random."""
    tables = {id(entry.weight) for entry in model.modules() if isinstance(entry, torch.nn.Embedding)}
    matrices = [entry for entry in model.parameters() if entry.ndim == 2 and id(entry) not in tables]
    others = [entry for entry in model.parameters() if entry.ndim != 2 or id(entry) in tables]
    muon = Muon(matrices)
    adamw = torch.optim.AdamW(others, lr=plan.rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    generator = torch.Generator().manual_seed(plan.seed)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    model.train()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(name, total=plan.steps)
        for step in range(plan.steps):
            length = plan.context if step >= plan.steps * (1 - LONG_SHARE) else plan.window
            loss = loss_of(model, draw(tokens, plan, length, generator))
            torch.autograd.backward(loss)
            share = share_of_rate(step / plan.steps)
            muon.step(plan.turn * share)
            torch.nn.utils.clip_grad_norm_(others, 1.0)
            adamw.param_groups[0]["lr"] = plan.rate * share
            adamw.step()
            model.zero_grad()
            progress.update(task, advance=1, description=f"{name} loss {loss.item():.3f}")
    return model.eval()


def share_of_rate(done: float) -> float:
    """Up over the first fortieth of the training, then level, then down to nothing over the last seven tenths."""
    return min(1.0, 40 * done + 0.1, (1 - done) / 0.7)


def draw(tokens: Tokens, plan: Plan, length: int, generator: torch.Generator) -> torch.Tensor:
    """Windows [rows, length + 1], or fewer rows where the windows are longer than usual."""
    shares = torch.tensor([MIXTURE[domain] for domain in tokens])
    rows = max(1, plan.rows * plan.window // length)
    chosen = torch.multinomial(shares, rows, replacement=True, generator=generator)
    windows = []
    for domain in chosen.tolist():
        row = list(tokens.values())[domain]
        start = int(torch.randint(len(row) - length, (), generator=generator))
        windows.append(row[start : start + length + 1])
    return torch.stack(windows)


def loss_of(model: Any, batch: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of every next token."""
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: Any, tokens: torch.Tensor, plan: Plan) -> float:
    """Per token, over windows side by side; the first token of a window is not predicted."""
    count = len(tokens) // plan.window
    windows = torch.chunk(tokens[: count * plan.window].view(count, plan.window), max(1, count // plan.rows))
    total = sum(loss_of(model, batch).item() * len(batch) for batch in windows)
    return math.exp(total / count)


def card(name: str, plan: Plan, model: Any, text: Mapping[str, list[str]], found: Mapping[str, float]) -> str:
    """The model card."""
    size = sum(entry.numel() for entry in model.parameters())
    read = plan.steps * plan.rows * plan.window
    rows = "\n".join(
        f"| {domain} | {MIXTURE[domain]:.2f} | {sum(map(len, text[domain])) / 1e6:.1f} | {found[domain]:.2f} |"
        for domain in tiny.DOMAINS
    )
    return CARD.format(
        name=name,
        architecture=type(model).__name__,
        size=size / 1e6,
        plan=plan,
        read=read / 1e6,
        rows=rows,
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        tokenizers=tokenizers.__version__,
        share=f"1/{1 / tiny.HELD_OUT_SHARE:.0f}",
    )


CARD = """# {name}

An in-house model, trained to test quantization with. **It is not a published model**, it is good for nothing else, and
figures measured on it say nothing about published models of that architecture.

* Architecture: `{architecture}` of transformers; {plan.layers} layers, width {plan.width}, {plan.heads} heads, context
  {plan.context}, embeddings tied to the output layer; {size:.2f} million parameters, stored in float16.
* Tokenizer: byte-level BPE of {plan.vocabulary} tokens, trained on the same text.
* Training: {plan.steps} steps of {plan.rows} x {plan.window} tokens ({read:.2f} million in all), Muon and AdamW, on a CPU;
  the last tenth of the steps with windows of {plan.context}.

| domain | share of training | training text, million characters | held-out perplexity per token |
| --- | ---: | ---: | ---: |
{rows}

Perplexity is of the stored weights, run in float32, over windows of {plan.window} tokens side by side, the first token of
each not predicted; a token is one of this tokenizer's.

## Text

What a Python installation carries (here {python}): `prose` is the help topics of `pydoc` and the docstrings of the
standard library, `code` its sources without docstrings, `tables` the Unicode character table. {share} of the documents of
every domain, chosen by a hash of their names, were never trained on: `scalefold.models.tiny.held_out(domain)`.

The text is under the [PSF licence](https://docs.python.org/3/license.html), the character table under the
[Unicode licence](https://www.unicode.org/license.txt); the weights are under Apache-2.0, as scalefold is.

## Rebuild

    python scripts/train_reference.py {name} --steps {plan.steps} --seed {plan.seed} --threads {plan.threads}

The same bytes need the same Python version (it is the text), torch {torch}, transformers {transformers}, tokenizers
{tokenizers}, and the same kind of CPU.
"""


if __name__ == "__main__":
    main()
