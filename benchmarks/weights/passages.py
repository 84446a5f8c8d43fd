"""A text task that needs no download: which article does this passage come from? For encoders of the BERT family.

Articles are the ones of a WikiText file (headings ``= Title =``). Every fourth paragraph of an article is held out, so
no passage of the test shares a paragraph with training; of the test's passages every third is used.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn
from torch.nn.utils import parametrize

HEADING = re.compile(r"^ = [^=]+ = \n", re.MULTILINE)


@dataclass(frozen=True)
class Passages:
    """Token ids int64 (n, length) and article numbers (n,), to train on and held out."""

    train: torch.Tensor
    train_labels: torch.Tensor
    test: torch.Tensor
    test_labels: torch.Tensor

    def batches(self, size: int, n_steps: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches of training passages, epoch after epoch in fresh order."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.empty(0, dtype=torch.int64)
        for _ in range(n_steps):
            if len(order) < size:
                order = torch.randperm(len(self.train), generator=generator)
            picked, order = order[:size], order[size:]
            yield self.train[picked], self.train_labels[picked]


def passages(text: str, tokenizer: Tokenizer, n_articles: int, length: int) -> Passages:
    """The ``n_articles`` longest articles in passages of ``length`` tokens, the first of which is [CLS]."""
    articles = sorted(HEADING.split(text)[1:], key=len, reverse=True)[:n_articles]
    tokenizer.no_truncation()
    tokenizer.no_padding()
    start = tokenizer.token_to_id("[CLS]")
    parts: dict[bool, list[np.ndarray]] = {True: [], False: []}
    labels: dict[bool, list[int]] = {True: [], False: []}
    for number, article in enumerate(articles):
        paragraphs = [p for p in article.split("\n") if len(p) > 2 and not p.startswith(" =")]
        for held_out in (False, True):
            kept = [p for i, p in enumerate(paragraphs) if (i % 4 == 3) == held_out]
            ids = tokenizer.encode(" ".join(kept), add_special_tokens=False).ids
            for at in range(0, len(ids) - length + 2, length - 1):
                parts[held_out].append(np.asarray([start, *ids[at : at + length - 1]]))
                labels[held_out].append(number)
    train, test = (torch.from_numpy(np.stack(parts[held_out])) for held_out in (False, True))
    return Passages(train, torch.tensor(labels[False]), test[::3], torch.tensor(labels[True])[::3])


class Classifier(nn.Module):
    """An encoder, the mean of its last hidden states, and a linear head."""

    def __init__(self, encoder: nn.Module, n_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, n_classes)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(ids)[0].float().mean(dim=1))


def load(folder: str, n_classes: int, seed: int) -> tuple[Classifier, Tokenizer]:
    """The encoder of a Hugging Face folder, without dropout and with attention that can be differentiated twice."""
    from transformers import AutoModel

    torch.manual_seed(seed)
    encoder = AutoModel.from_pretrained(folder, attn_implementation="eager", add_pooling_layer=False)
    return Classifier(encoder, n_classes).eval(), Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))


def fine_tune(model: Classifier, data: Passages, n_steps: int, rate: float, seed: int, batch: int = 32) -> None:
    """Adam with a rate that rises over a tenth of the steps and falls to 0; products in bfloat16."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for step, (ids, labels) in enumerate(data.batches(batch, n_steps, seed)):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(10 * (step + 1) / n_steps, 1 - step / n_steps)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(model(ids), labels)
        loss.backward()
        optimizer.step()


@torch.no_grad()
@parametrize.cached()
def accuracy(model: Classifier, data: Passages) -> float:
    """Percent of the held-out passages, in float32."""
    found = torch.cat([model(ids).argmax(1) for ids in data.test.split(64)])
    return 100 * float((found == data.test_labels).float().mean())
