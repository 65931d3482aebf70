"""Speech recognition in the shape of Whisper: a spectrogram, two convolutions, an encoder, and a decoder that writes.

    python -m examples.speech

The speaker is a telephone: every key is the sum of two tones, for a random time, with random pauses and noise. The model
hears 0.8 seconds and writes the keys. examples/whisper.py does the same with the weights of whisper-tiny.en.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from fastattn import Causal

from .common import Block, command, train, twins

DIM, HEADS, LAYERS, BATCH = 64, 4, 2, 16
RATE, SAMPLES, WINDOW, HOP, BANDS = 8000, 6400, 256, 80, 64  # 80 frames of 64 frequency bands
LOW, HIGH = (697, 770, 852, 941), (1209, 1336, 1477, 1633)  # Hz, of the rows and columns of the keys
KEYS = "123A456B789C*0#D"
START, END, PAD = 16, 17, 18
LONGEST = 6  # keys in 0.8 seconds, with START in front and END behind


def recording(g):
    """(samples (SAMPLES,), the keys that are heard)"""
    sound, keys, now = 0.2 * torch.randn(SAMPLES, generator=g), [], 200
    while len(keys) < LONGEST - 2:
        length, pause = (int(x) for x in torch.randint(500, 1100, (2,), generator=g))
        if now + length > SAMPLES:
            break
        key = int(torch.randint(16, (), generator=g))
        t = torch.arange(length) * (2 * math.pi / RATE)
        sound[now : now + length] += torch.sin(LOW[key // 4] * t) + torch.sin(HIGH[key % 4] * t)
        keys.append(key)
        now += length + pause
    return sound, keys


def batch_of(g, n, dtype):
    """Spectrograms (n, BANDS, frames) and targets (n, LONGEST)."""
    sounds, targets = torch.empty(n, SAMPLES), torch.full((n, LONGEST), PAD)
    for i in range(n):
        sounds[i], keys = recording(g)
        targets[i, : len(keys) + 2] = torch.tensor([START, *keys, END])
    spectrum = torch.stft(sounds, WINDOW, HOP, window=torch.hann_window(WINDOW), return_complex=True)
    return spectrum[:, :BANDS, 1:].abs().clamp(min=1e-3).log10().to(dtype), targets


def sinusoids(n):  # (n, DIM): the places in time, not learned
    angles = torch.arange(n)[:, None] * torch.exp(-math.log(10000) * torch.arange(DIM // 2) / (DIM // 2 - 1))
    return torch.cat([angles.sin(), angles.cos()], 1)


class Recogniser(nn.Module):
    def __init__(self, attend):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(BANDS, DIM, 3, padding=1), nn.Conv1d(DIM, DIM, 3, stride=2, padding=1)
        self.tokens, self.places = nn.Embedding(PAD + 1, DIM), nn.Embedding(LONGEST, DIM)
        self.encoder = nn.ModuleList(Block(DIM, HEADS, attend) for _ in range(LAYERS))
        self.decoder = nn.ModuleList(Block(DIM, HEADS, attend, decoder=True) for _ in range(LAYERS))
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)

    def encode(self, spectra):  # (B, BANDS, frames) -> (B, frames / 2, DIM)
        x = F.gelu(self.conv2(F.gelu(self.conv1(spectra)))).transpose(1, 2)
        x = x + sinusoids(x.shape[1]).to(x)
        for block in self.encoder:
            x = block(x)
        return self.norm1(x)

    def decode(self, ids, memory):  # (B, n) -> logits (B, n, PAD + 1), against the embeddings as in Whisper
        x = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        for block in self.decoder:
            x = block(x, Causal(), memory)
        return self.norm2(x) @ self.tokens.weight.T / math.sqrt(DIM)


def loss_of(model, batch):
    spectra, targets = batch
    logits = model.decode(targets[:, :-1], model.encode(spectra))
    return F.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), ignore_index=PAD)


@torch.no_grad()
def transcribe(model, spectra):
    memory, ids = model.encode(spectra), torch.full((len(spectra), 1), START)
    for _ in range(LONGEST - 1):
        ids = torch.cat([ids, model.decode(ids, memory)[:, -1:].argmax(-1)], 1)
    return ["".join(KEYS[i] for i in row[1 : row.index(END) if END in row else None] if i < 16) for row in ids.tolist()]


def main(steps=250, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    models = twins(Recogniser, dtype)
    curves = train(models, loss_of, [batch_of(g, BATCH, dtype) for _ in range(steps)], lr=2e-3)
    curves.show(f"speech: {LAYERS} + {LAYERS} layers, loss per key")
    spectra, targets = batch_of(g, 64, dtype)
    truth = ["".join(KEYS[i] for i in row if i < 16) for row in targets.tolist()]
    found = {name: transcribe(model, spectra) for name, model in models.items()}
    for name, said in found.items():
        right = sum(a == b for a, b in zip(said, truth))
        print(f"{name:9s}{right} of {len(truth)} new recordings right; heard {said[0]} where the keys were {truth[0]}")
    return curves, found


if __name__ == "__main__":
    command(main)
