"""Count models of 8-bit audio: what a network has to beat."""

from __future__ import annotations

import torch

from .audio import Clip

CLASSES = 256


def count_baselines(train: list[Clip], held_out: list[Clip]) -> dict[str, float]:
    """Bits per sample on the held-out clips of models that count classes, or pairs of classes, in the training clips.

    Counts start at one, so that what was never seen is not impossible. Like the network, they are asked for every
    sample but a clip's first.
    """
    pairs, unseen = (_pairs(clips) for clips in (train, held_out))
    joint = torch.bincount(pairs, minlength=CLASSES**2).reshape(CLASSES, CLASSES).double()
    unigram = joint.sum(0) + 1
    bigram = joint + 1
    unigram_bits = -(unigram / unigram.sum()).log2()
    bigram_bits = -(bigram / bigram.sum(1, keepdim=True)).log2()
    return {
        "uniform": 8.0,
        "unigram": float(unigram_bits[unseen % CLASSES].mean()),
        "bigram": float(bigram_bits.flatten()[unseen].mean()),
    }


def _pairs(clips: list[Clip]) -> torch.Tensor:
    return torch.cat([clip.samples[:-1].long() * CLASSES + clip.samples[1:].long() for clip in clips])
