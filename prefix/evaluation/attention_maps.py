"""What the slots learned: where attention goes, which tokens a slot is like, what closing some does to the output.

python -m prefix.evaluation.attention_maps runs/x "Il pleut." --out attention.svg     as text and as a picture
python -m prefix.evaluation.attention_maps runs/x "Il pleut." --ablate                and what closing slots does

The sentence is followed by <sep> and the model's own translation, so both banks are open in it. A token's attention is one
softmax over the slots that it sees and the text before it. A bank's mass is the sum over its slots; all masses of a token
sum to one.

A slot's nearest tokens are those with the most similar keys, which the frozen model computes in that layer for training
text with all banks closed; a token counts where it is nearest. The similarity is the mean over heads of the cosine. The
mean key of the text is subtracted first: it moves all scores of a query alike, and a softmax does not see it.
"""

import copy
import sys
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from minigpt.attention import Slots
from minigpt.backends import attend
from minigpt.files import UserError, escape_control
from prefix.data import corpus as data
from prefix.data import rows
from prefix.distributed import log, printable
from prefix.evaluation import pictures
from prefix.evaluation.compare import sentences
from prefix.evaluation.metrics import METRICS
from prefix.evaluation.report import aligned
from prefix.sequences import pack_pairs, pairs_of, separator
from prefix.translation import translate

TEXT_PAIRS = 250  # of the training data: the text whose keys slots are compared with
SENTENCES = 200  # of the test split, for the BLEU of an ablation


@dataclass
class Attention:
    """Attention of the T tokens of one sequence."""

    tokens: list  # as they are shown
    banks: list  # the names
    seen: torch.Tensor  # (T, n_banks) bool: where a bank is open
    mass: torch.Tensor  # (n_layer, n_head, T, n_banks + 1): on each bank and, last, on the text

    def tables(self):
        """[(title, lines of cells)], in per cent: layers and heads for each open bank, then token by token."""
        found, shown = [], self.seen.any(dim=0).nonzero()[:, 0].tolist()
        cells = lambda values: [f"{100 * x:.1f}" for x in values.tolist()]
        for bank in shown:
            by_head = self.mass[:, :, self.seen[:, bank], bank].mean(dim=2)  # (n_layer, n_head)
            head = ["layer", *(f"h{i}" for i in range(by_head.size(1))), "mean"]
            layers = [[str(i), *cells(torch.cat([heads, heads.mean()[None]]))] for i, heads in enumerate(by_head)]
            title = f"bank {self.banks[bank]}: % of attention, mean over the {int(self.seen[:, bank].sum())} tokens"
            found.append((f"{title} at which it is open", [head, *layers]))
        by_token = self.mass.mean(dim=(0, 1))[:, [*shown, -1]]
        tokens = [[token, *cells(mass)] for token, mass in zip(self.tokens, by_token)]
        head = ["token", *(self.banks[bank] for bank in shown), "text"]
        return [*found, ("token by token: % of attention, mean over layers and heads", [head, *tokens])]


@torch.no_grad()
def attention_mass(model, banks, ids, packed):
    """ids (N,), packed -> (n_layer, n_head, N, n_banks + 1): the share of its attention that each token gives to each bank,
    in order, and last to the text. A closed bank gets exactly 0.

    What attention puts out is a mean of values, weighted by attention. So let number b of a value be 1 for the slots of
    bank b and 0 for all else: number b of the output is then the bank's share."""
    n_head, n_banks, mass = model.config.n_head, len(banks.names), []
    slots = banks.slots().to(model.dtype)
    which = F.one_hot(slots.bank.long(), model.config.head_dim).to(model.dtype)  # (S, head_dim)
    layers, marked = slots.layers(), replace(slots, value=which.expand_as(slots.value)).layers()

    def attn_fn(i, qkv):
        q, k, v = qkv.float().chunk(3, dim=1)  # each (N, n_embd)
        shares = attend(torch.cat([q, k, 0 * v], dim=1), n_head, packed, marked[i], "plain")  # (N, n_embd)
        shares = shares.unflatten(1, (n_head, -1))[..., :n_banks].transpose(0, 1)  # (n_head, N, n_banks)
        mass.append(torch.cat([shares, 1 - shares.sum(dim=-1, keepdim=True)], dim=-1))
        return attend(qkv, n_head, packed, layers[i], model.attention)

    model.blocks(model.embed(ids, packed.position + banks.position_offset), attn_fn)
    return torch.stack(mass).cpu()


def look_at(model, tokenizer, banks, text, direction, answer=None):
    """The Attention of text <sep> answer. direction: (source, target) names of banks. answer: None: the model's own."""
    if answer is None:
        (result,) = translate(model, tokenizer, banks, [text], direction)
        if result.fault:
            raise UserError(result.fault)
        answer = result.text
    room = model.config.n_positions - banks.position_offset - 1  # what does not fit is left out
    ids = tokenizer.encode(rows.clean(text))[:room]
    if not ids:
        raise UserError("the sentence is empty: there is nothing to look at")
    answer = tokenizer.encode(rows.clean(answer))[: room - len(ids)]
    pair = ids, answer, *map(banks.names.index, direction)
    batch = pack_pairs([pair], separator(tokenizer), tokenizer.eot, model.device)
    seen = (batch.packed.bank_mask[:, None].cpu() >> torch.arange(len(banks.names))) & 1 == 1
    mass = attention_mass(model, banks, batch.ids, batch.packed)
    return Attention([label(tokenizer, i) for i in batch.ids.tolist()], banks.names, seen, mass)


def label(tokenizer, i):
    """A token as it can be shown: a space as ␣, a control character as its escape."""
    return escape_control(tokenizer.decode([i])).replace(" ", "␣")


@torch.no_grad()
def nearest_tokens(model, banks, ids, packed, n):
    """The tokens of a packed text, ids (N,), nearest to each slot -> for each layer (cosine, token id), both (S, n), the
    nearest first. n at most the number of different tokens."""
    slots, n_head, found = banks.slots(), model.config.n_head, []

    def attn_fn(i, qkv):
        key = qkv.unflatten(-1, (3, n_head, -1))[:, 1].transpose(0, 1).float()  # (n_head, N, head_dim)
        mean = key.mean(dim=1, keepdim=True)
        key, slot = F.normalize(key - mean, dim=-1), F.normalize(slots.key[i] - mean, dim=-1)
        cosine = (slot @ key.transpose(-2, -1)).mean(dim=0).cpu()  # (S, N)
        best = torch.full((len(cosine), model.config.vocab_size), -2.0)
        best.scatter_reduce_(1, ids.cpu().expand(len(cosine), -1), cosine, "amax")
        found.append(best.topk(n))
        return attend(qkv, n_head, packed, backend=model.attention)

    model.blocks(model.embed(ids, packed.position + banks.position_offset), attn_fn)
    return found


def nearest_lines(model, tokenizer, banks, corpus, n):
    """Slot by slot, the n nearest tokens in each layer, of the first TEXT_PAIRS training pairs of a corpus."""
    examples = corpus.examples("train")[:TEXT_PAIRS]
    if not len(examples):
        raise UserError(f"none of the {len(corpus)} usable pairs falls into the training split: give more data")
    text = pack_pairs(pairs_of(corpus, examples), separator(tokenizer), tokenizer.eot, model.device)
    found = nearest_tokens(model, banks, text.ids, text.packed, min(n, len(text.ids.unique())))
    slots = [(name, slot) for name, n_slots in zip(banks.names, banks.prefix_len) for slot in range(n_slots)]
    lines = ["nearest token keys: mean over heads of the cosine, after the text's mean key has been subtracted"]
    for (name, slot), *layers in zip(slots, *(zip(cosine, ids) for cosine, ids in found)):
        lines.append(f"bank {name}, slot {slot}")
        for i, (cosine, ids) in enumerate(layers):
            tokens = "   ".join(f"{label(tokenizer, t)} {c:.2f}" for c, t in zip(cosine, ids))
            lines.append(f"  layer {i:2}   {tokens}")
    return lines


@dataclass
class ClosedLayer(Slots):
    """Slots that one layer does not see."""

    closed: int = 0

    def layers(self):
        return [None if i == self.closed else layer for i, layer in enumerate(super().layers())]


def without(banks, bank=None, layer=None):
    """These banks with one of them closed, or with all slots of one layer closed."""
    closed, slots = copy.copy(banks), banks.slots()
    closed.mask = lambda names: banks.mask([name for name in names if name != bank])
    if layer is not None:
        closed.slots = lambda: ClosedLayer(slots.key, slots.value, slots.bank, layer)
    return closed


def ablate(model, tokenizer, banks, texts, references, direction, attention):
    """Translate `texts` with nothing closed, without each bank of `direction`, without each layer's slots -> a table: the
    BLEU of all texts but the first; for layers, the share of `attention` on their slots; the output of the first text."""
    parts = {"nothing": banks} | {f"bank {name}": without(banks, bank=name) for name in direction}
    parts |= {f"layer {i}": without(banks, layer=i) for i in range(model.config.n_layer)}
    on_slots = 100 * (1 - attention.mass[..., -1]).mean(dim=(1, 2))  # (n_layer,)
    shares = {f"layer {i}": f"{share:.1f}" for i, share in enumerate(on_slots.tolist())}
    table, whole = [["closed", "BLEU", "change", "% on slots", ""]], None
    for name, part in tqdm(parts.items(), desc="closing", disable=not sys.stderr.isatty()):
        first, *outputs = (result.text for result in translate(model, tokenizer, part, texts, direction))
        bleu = METRICS["bleu"](outputs, references)
        whole = bleu if whole is None else whole
        table.append([name, f"{bleu:.2f}", f"{bleu - whole:+.2f}", shares.get(name, ""), first])
    return table


def parse_arguments():
    from prefix import cli

    parser = cli.Parser(prog="python -m prefix.evaluation.attention_maps", description="Look at what slots learned.")
    option = parser.add_argument
    option("prefix", nargs="+", metavar="RUN", help="run or prefix file; of several, the banks of all")
    option("text", help="the sentence")
    option("--from", dest="source", metavar="BANK", help="source language (the prefix's second bank)")
    option("--to", dest="target", metavar="BANK", help="target language (the prefix's first bank)")
    option("--ablate", action="store_true", help=f"close each bank and layer: the output, BLEU on {SENTENCES} sentences")
    option("--out", type=Path, metavar="FILE", help="draw the attention, or what closing does: .svg or .png")
    option("--nearest", type=cli.int_at_least(0), default=5, metavar="N", help="tokens to list for each slot (5)")
    option("--model", help="where the base lies, if not where the prefix file says")
    option("--data", nargs="+", metavar="FILE", help="text for nearest tokens and BLEU (what it learned from)")
    cli.add_machine_options(parser)
    parser.set_defaults(weights=None)  # as they are: quantizing takes longer than one sentence
    args = parser.parse_args()
    if args.out and (args.out.suffix.lower() not in (".svg", ".png") or not args.out.absolute().parent.is_dir()):
        parser.error(f"--out {args.out}: not an .svg or .png file in a folder that is there")
    return args


def main():
    from prefix import cli

    args = parse_arguments()
    model, tokenizer, banks, prefixes = cli.load_with_base(args)
    direction = cli.direction(args, banks)
    if args.nearest or args.ablate:
        paths, columns, limit = cli.text_of(args, prefixes)
        columns = rows.columns_for(paths, banks.names, columns)
        longest = min(384, model.config.n_positions - banks.position_offset)
        corpus = data.load(paths, columns, tokenizer, limit, longest)
    attention = look_at(model, tokenizer, banks, args.text, direction)
    tables, lines = attention.tables(), [f"{' -> '.join(direction)}: {' '.join(attention.tokens)}"]
    for title, table in tables:
        lines += ["", title, *aligned(table)]
    if args.nearest:
        lines += ["", *nearest_lines(model, tokenizer, banks, corpus, args.nearest)]
    if args.ablate:
        there = {*direction} <= {*corpus.columns}
        sources, references = sentences(corpus, "test", SENTENCES, *direction) if there else ([], [])
        if not sources:
            raise UserError(f"{paths[0]}: no test sentences from {' to '.join(direction)}: name some text with --data")
        table = ablate(model, tokenizer, banks, [args.text, *sources], references, direction, attention)
        lines += ["", f"what closing does: BLEU on {len(sources)} sentences, and the output", *aligned(table)]
    if args.out and not find_spec("matplotlib"):
        log(f"{args.out}: not drawn: that takes matplotlib (pip install matplotlib)")
    elif args.out:
        pictures.save(pictures.ablation_figure(table) if args.ablate else pictures.attention_figure(tables), args.out)
    print(printable("\n".join(lines)))  # last: its reader may go away


if __name__ == "__main__":
    from prefix import cli

    with cli.cli_errors():
        main()
