"""A small decoder that reads images aloud: images of Fashion-MNIST as tokens, what to say of them, and its training.

A sequence is ``begin``, 14 × 14 patches in raster order, ``describe``; then the answer: the class, the brightness of
the four quadrants, and a read-out of all patches in the same order, which can't be summed up ahead. A patch is 2 × 2
pixels, one token for the level of its mean brightness: an embedding row for each level is what a linear encoder makes
of a patch of one number, and its place is told by the rotation, as for any other token. So the decoder is a plain
Llama, and the engine runs it. To read from a fixed distance is learned in about 50 steps; a read-out of 7 × 7 fields of
4 patches each, whose distances differ, was not in 200.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.models.fashion_mnist import read

Ids = npt.NDArray[np.int64]
ROWS = COLUMNS = 14
LEVELS, CLASSES = 8, 10
BEGIN = LEVELS + CLASSES
DESCRIBE = BEGIN + 1
VOCABULARY = DESCRIBE + 1
N_PROMPT = ROWS * COLUMNS + 2
ANSWER = {"class": slice(0, 1), "quadrants": slice(1, 5), "read-out": slice(5, 5 + ROWS * COLUMNS)}
N_TOKENS = N_PROMPT + ANSWER["read-out"].stop
PATCHES = slice(1, N_PROMPT - 1)  # their positions
SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
BATCH, RATE, WARM_UP = 16, 3e-3, 20  # sequences, and steps
REPORT = 25  # steps


def brightness(pixels: npt.NDArray[np.uint8], n: int) -> Ids:
    """Levels of the means of n × n fields of each image, (images, n × n) in raster order."""
    side = pixels.shape[1] // n
    means = pixels.reshape(-1, n, side, n, side).mean(axis=(2, 4))
    return (means * LEVELS / 256).astype(np.int64).reshape(len(pixels), n * n)


def sequences(folder: str, part: str, n: int) -> Ids:
    """Prompts and answers of the first images of "train" or "t10k", (n, N_TOKENS)."""
    pixels, labels = read(folder, part, n)
    patches, begin, describe = brightness(pixels, ROWS), np.full((n, 1), BEGIN), np.full((n, 1), DESCRIBE)
    said = LEVELS + labels[:, None].astype(np.int64), brightness(pixels, 2), patches
    return np.concatenate([begin, patches, describe, *said], axis=1)


def train(folder: str, out: Path, minutes: float, n_images: int = 60_000) -> None:
    """Train for so many minutes of processor time, and write a folder of safetensors."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=N_TOKENS,
        rope_theta=1000.0,
        initializer_range=0.05,
        tie_word_embeddings=True,
        **SHAPE,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # what all tokens have in common is what attention to a distance goes by
        model.model.embed_tokens.weight += config.initializer_range * torch.randn(config.hidden_size)
    data = torch.from_numpy(sequences(folder, "train", n_images))
    optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.98), weight_decay=0.01)
    started, step, done = time.process_time(), 0, 0.0
    while done < 1:
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / WARM_UP) * (1 - done)
        ids = data[torch.randint(len(data), (BATCH,))]
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits[:, N_PROMPT - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, N_PROMPT:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        done = (time.process_time() - started) / (60 * minutes)
        if step % REPORT == 0:
            print(f"  {step} steps, {done:.0%} of {minutes} minutes: {loss.item():.3f} nats a token", flush=True)
    model.save_pretrained(out)
