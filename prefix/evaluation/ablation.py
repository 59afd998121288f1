"""What slots are for, tried by closing some: the output and the BLEU without one bank, or without one layer's slots."""

import copy
import sys
from dataclasses import dataclass

from tqdm import tqdm

from minigpt.attention import Slots
from prefix.evaluation.compare import Plan, sentences
from prefix.evaluation.metrics import METRICS
from prefix.translation import translate


@dataclass
class Ablation:
    """closed: "nothing", "bank NAME" or "layer N". output: what becomes of one sentence. bleu: of so many others."""

    closed: str
    output: str
    bleu: float
    sentences: int


@dataclass
class ClosedLayer(Slots):
    """Slots that one layer does not see."""

    closed: int = 0

    def layers(self):
        layers = super().layers()
        layers[self.closed] = None
        return layers


def without(banks, bank=None, layer=None):
    """These banks with one of them closed everywhere, or with all slots of one layer closed."""
    closed, slots = copy.copy(banks), banks.slots()
    closed.mask = lambda names: banks.mask([name for name in names if name != bank])
    if layer is not None:
        closed.slots = lambda: ClosedLayer(slots.key, slots.value, slots.bank, layer)
    return closed


def ablate(model, tokenizer, banks, text, corpus, ends):
    """What becomes of `text`, and of the BLEU of 200 test sentences of a corpus -> a list of Ablation: nothing closed,
    each bank of `ends` (source, target), each layer."""
    sources, references = sentences(corpus, Plan(limit=200), *ends)
    closed = {"nothing": banks} | {f"bank {name}": without(banks, bank=name) for name in ends}
    closed |= {f"layer {i}": without(banks, layer=i) for i in range(model.config.n_layer)}
    found = []
    for name, part in tqdm(closed.items(), desc="closing", disable=not sys.stderr.isatty(), file=sys.stderr):
        output, *outputs = (result.text for result in translate(model, tokenizer, part, [text, *sources], *ends))
        found.append(Ablation(name, output, METRICS["bleu"](outputs, references), len(sources)))
    return found
