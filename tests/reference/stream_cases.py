"""Small models, and the loop that a stream must equal."""

import torch

from bmojo import BMojoLM, presets
from bmojo.generate import Sampling

FIELDS = {"vocab_size": 50, "hidden_size": 32, "num_heads": 2, "num_layers": 2, "chunk_size": 8, "ssm_head_dim": 16}
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]


def new_model(name="bmojo", **changes):
    torch.manual_seed(0)
    window = {"window": 16} if name in ("bmojo", "hybrid") else {}
    return BMojoLM(presets.get(name, "tiny", **{**FIELDS, **window, **changes})).eval()


@torch.no_grad()
def naive(model, ids, count, **sampling):
    """`count` tokens after `ids`, each chosen by a forward pass over all that came before."""
    ids, choice = list(ids), Sampling(**sampling)
    for _ in range(count):
        logits, _ = model(torch.tensor([ids]))
        ids.append(choice.choose(logits[0, -1], len(ids)))
    return ids[len(ids) - count :]


@torch.no_grad()
def explains(model, ids, made, **sampling):
    """Whether a forward pass over `ids` chooses those at the positions `made`."""
    logits, choice = model(torch.tensor([ids]))[0][0], Sampling(**sampling)
    return all(choice.choose(logits[p - 1], p) == ids[p] for p in made)


def same_stream(a, b):
    """The snapshots of two streams hold the same, bit for bit."""
    a, b = a.snapshot(), b.snapshot()
    names = ("sampling", "length", "unread", "made")
    return all(getattr(a, name) == getattr(b, name) for name in names) and all(
        torch.equal(layer[name], other[name])
        for layer, other in zip(a.state.layers, b.state.layers, strict=True)
        for name in layer
    )
