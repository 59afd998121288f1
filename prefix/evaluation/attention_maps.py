"""What the slots learned, to look at: where attention goes, and which tokens a slot resembles.

python -m prefix.evaluation.attention_maps prefix/demo "Il pleut."                     as text
python -m prefix.evaluation.attention_maps runs/x "Il pleut." --out attention.svg      and as a picture (.png takes matplotlib)

The sentence is followed by <sep> and the model's own translation, so that both banks are open in it.

Attention mass. In each layer and head a token's attention is one softmax over the slots that it sees and the text
before it, so it sums to one. The mass of a bank is the sum over its slots.

Nearest tokens. A slot has a key but no token, so we look for the tokens whose keys are like it: those that the frozen
model itself computes, in that layer, for the tokens of the sequences that the slot's file learned from, with all banks
closed. A token that comes several times counts where it is nearest. What all keys have in common moves all scores of a
query alike, and a softmax does not see it; so the mean of the text's keys is subtracted first, from the text's and from
the slots'. Heads attend apart from each other, so the similarity is the mean over heads of the cosine.
"""

import importlib.util
import math
from dataclasses import dataclass
from html import escape
from pathlib import Path

import torch
import torch.nn.functional as F

from minigpt.attention import attend
from minigpt.errors import UserError
from minigpt.files import replacing
from prefix import cli, run
from prefix.banks import Banks
from prefix.cli import int_at_least
from prefix.data import corpus as data
from prefix.data import rows
from prefix.distributed import log, printable
from prefix.sequences import pack_pairs, separator
from prefix.translation import translate

TEXT_ROWS, TEXT_TOKENS = 1000, 4096  # of the training data, at most: the text whose keys slots are held against


@dataclass
class Attention:
    """Where the T tokens of one sequence look. tokens: their labels; banks: the names; seen: (T, n_banks) bool, True
    where a bank is open; mass: (n_layer, n_head, T, n_banks + 1), on each bank and, last, on the text."""

    tokens: list
    banks: list
    seen: torch.Tensor
    mass: torch.Tensor

    def by_head(self, bank):
        """(n_layer, n_head): the mean over the tokens at which this bank is open."""
        return self.mass[:, :, self.seen[:, bank], bank].mean(dim=2)

    def by_token(self, bank):
        """(n_layer, tokens at which this bank is open): the mean over heads."""
        return self.mass[:, :, self.seen[:, bank], bank].mean(dim=1)

    @property
    def open_banks(self):
        """The numbers of the banks that are open anywhere."""
        return self.seen.any(dim=0).nonzero()[:, 0].tolist()


@torch.no_grad()
def attention_mass(model, banks, ids, bank_mask):
    """ids (T,), opened (T,) bank masks -> (n_layer, n_head, T, n_banks + 1): the share of its attention that each token
    gives to each bank, in order, and last to the text. A closed bank gets exactly 0. Raises UserError where the
    sequence is longer than the context."""
    c, T, n_banks = model.config, len(ids), len(banks.names)
    if T + banks.position_offset > c.n_positions:
        raise UserError(f"{T + banks.position_offset} positions are more than this model's context of {c.n_positions}")
    slots = banks.slots().to(model.dtype)
    bank_mask = torch.as_tensor(bank_mask, device=model.device)
    text = torch.ones(T, T, dtype=torch.bool, device=model.device).tril()
    visible = torch.cat([slots.visible_slots(bank_mask), text], dim=1)  # (T, S + T)
    text_number = torch.full((T,), n_banks, device=model.device)
    belongs = F.one_hot(torch.cat([slots.bank.long(), text_number]), n_banks + 1).float()  # (S + T, n_banks + 1)
    mass = torch.empty(c.n_layer, c.n_head, T, n_banks + 1)

    def attn_fn(i, qkv):
        q, k, v = qkv.unflatten(-1, (3, c.n_head, -1)).permute(1, 2, 0, 3)  # each (n_head, T, head_dim)
        k, v = torch.cat([slots.key[i], k], dim=1), torch.cat([slots.value[i], v], dim=1)  # (n_head, S + T, head_dim)
        scores = (q @ k.transpose(-2, -1)).float() / math.sqrt(c.head_dim)
        weights = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)  # (n_head, T, S + T)
        mass[i] = weights @ belongs
        return (weights.to(v.dtype) @ v).transpose(0, 1).flatten(1)  # (T, n_embd)

    position = torch.arange(T, device=model.device) + banks.position_offset
    model.blocks(model.embed(ids.to(model.device), position), attn_fn)
    return mass


def look_at(model, tokenizer, banks, text, source, target, answer=None):
    """The Attention of a translation: text <sep> answer. answer: by default the model's own."""
    if answer is None:
        result = translate(model, tokenizer, banks, [text], source, target)[0]
        if result.fault:
            raise UserError(result.fault)
        answer = result.text
    ids, answer = (tokenizer.encode(rows.clean(side)) for side in (text, answer))
    if not ids:
        raise UserError("the sentence is empty: there is nothing to look at")
    room = model.config.n_positions - banks.position_offset - len(ids) - 1
    numbers = [banks.names.index(name) for name in (source, target)]
    batch = pack_pairs([(ids, answer[: max(room, 0)], *numbers)], separator(tokenizer), tokenizer.eot)
    seen = (batch.packed.bank_mask[:, None] >> torch.arange(len(banks.names))) & 1 == 1
    mass = attention_mass(model, banks, batch.ids, batch.packed.bank_mask)
    return Attention([label(tokenizer, i) for i in batch.ids], banks.names, seen, mass)


def label(tokenizer, i):
    """A token as it can be shown: a space as ␣, what does not print as its escape."""
    text = tokenizer.decode([i]).replace(" ", "␣")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# The nearest tokens


@torch.no_grad()
def nearest_tokens(model, banks, ids, packed, n):
    """The tokens of a packed text, ids (N,), whose keys are most like those of each slot -> for each layer (cosine,
    token id), both (S, n), the nearest first. n at most the number of different tokens."""
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


def training_text(corpus, tokenizer, device):
    """The first training sequences of a corpus, TEXT_TOKENS tokens at most, packed with all banks closed."""
    examples, n_tokens = [], 0
    for row, source, target in corpus.examples("train"):
        sides = corpus.ids(row, source), corpus.ids(row, target)
        n_tokens += sum(map(len, sides)) + 1
        if examples and n_tokens > TEXT_TOKENS:
            break
        examples.append((*sides, int(source), int(target)))
    if not examples:
        raise UserError(f"none of the {len(corpus)} usable pairs falls into the training split: give more data")
    return pack_pairs(examples, separator(tokenizer), tokenizer.eot, device)


# As text


def mass_lines(attention):
    """The mass in per cent: layers and heads for each bank, then token by token."""
    lines = []
    for bank in attention.open_banks:
        n, by_head = int(attention.seen[:, bank].sum()), attention.by_head(bank)
        lines += [f"bank {attention.banks[bank]}: % of attention, mean over the {n} tokens at which it is open"]
        lines += ["  layer |" + "".join(f"{f'h{head}':>5}" for head in range(by_head.size(1))) + " |  mean"]
        for i, row in enumerate(by_head):
            lines += [f"  {i:5} |" + "".join(f"{100 * x:5.0f}" for x in row) + f" |{100 * row.mean():6.1f}"]
        lines.append("")
    width = max(map(len, attention.tokens))
    lines += ["token by token: % of attention, mean over layers and heads (-: closed)"]
    names = [attention.banks[bank] for bank in attention.open_banks] + ["text"]
    lines += [f"  {'':{width}}" + "".join(f"{name:>8}" for name in names)]
    for token, row, seen in zip(attention.tokens, attention.mass.mean(dim=(0, 1)), attention.seen):
        cells = [f"{100 * row[bank]:8.1f}" if seen[bank] else f"{'-':>8}" for bank in attention.open_banks]
        lines += [f"  {token:{width}}" + "".join(cells) + f"{100 * row[-1]:8.1f}"]
    return lines


def nearest_lines(found, banks, tokenizer):
    """What nearest_tokens found, slot by slot in each layer."""
    slots = [(name, slot) for name, n in zip(banks.names, banks.prefix_len) for slot in range(n)]
    lines = ["nearest token keys: mean over heads of the cosine, after the text's mean key has been subtracted"]
    for (name, slot), *layers in zip(slots, *(zip(cosine, ids) for cosine, ids in found)):
        lines.append(f"bank {name}, slot {slot}")
        for i, (cosine, ids) in enumerate(layers):
            tokens = "   ".join(f"{label(tokenizer, t)} {c:.2f}" for c, t in zip(cosine, ids))
            lines.append(f"  layer {i:2}   {tokens}")
    return lines


# As a picture


@dataclass
class Panel:
    """A grid of shares between 0 and 1: values (rows, columns), with a label for each row and column."""

    title: str
    rows: list
    columns: list
    values: torch.Tensor


def panels(attention):
    """Two Panels for each open bank, over the tokens at which it is open: layers and heads, layers and tokens."""
    drawn, layers = [], [f"layer {i}" for i in range(len(attention.mass))]
    for bank in attention.open_banks:
        name, by_head = attention.banks[bank], attention.by_head(bank)
        heads = [f"head {i}" for i in range(by_head.size(1))]
        drawn.append(Panel(f"bank {name}, by head: % of attention", layers, heads, by_head))
        tokens = [token for token, seen in zip(attention.tokens, attention.seen[:, bank]) if seen]
        tokens = [token if len(token) <= 12 else f"{token[:11]}…" for token in tokens]
        drawn.append(Panel(f"bank {name}, by token: % of attention", layers, tokens, attention.by_token(bank)))
    return drawn


CELL, LEFT = (28, 20), 60  # pixels: a cell, the space for the labels of rows
STYLE = """<style>
.mass { font: 11px system-ui, sans-serif; fill: #1b1b1b }
.mass .title { font-size: 13px; font-weight: 600 }
.mass .paper { fill: #ffffff }
.mass .cell { fill: #3b82c4 }
@media (prefers-color-scheme: dark) { .mass { fill: #e8e8e8 } .mass .paper { fill: #16181c } }
</style>"""


def svg_panel(panel, most, y=0):
    """A Panel as an <svg> of its own -> (text, width, height). Each cell says its number; the shade, full at `most`,
    only helps."""
    (n_rows, n_columns), (w, h) = panel.values.shape, CELL
    top = 34 + 5 * max(map(len, panel.columns))
    width, height = max(LEFT + n_columns * w + 60, 8 * len(panel.title)), top + n_rows * h + 8
    parts = [f'<text class="title" x="4" y="16">{escape(panel.title)}</text>']
    for c, name in enumerate(panel.columns):
        place = f"translate({LEFT + c * w + w / 2 + 4} {top - 6}) rotate(-50)"
        parts.append(f'<text transform="{place}">{escape(name)}</text>')
    for r, (name, row) in enumerate(zip(panel.rows, panel.values.tolist())):
        y_cell, y_text = top + r * h, top + r * h + 14
        parts.append(f'<text x="{LEFT - 6}" y="{y_text}" text-anchor="end">{escape(name)}</text>')
        for x, value in zip(range(LEFT, width, w), row):
            shade = 0.65 * value / most  # so light that the number stays readable
            at = f'x="{x}" y="{y_cell}" width="{w - 1}" height="{h - 1}" fill-opacity="{shade:.3f}"'
            parts.append(f'<rect class="cell" {at}/>')
            parts.append(f'<text x="{x + w / 2}" y="{y_text}" text-anchor="middle">{100 * value:.0f}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" class="mass" y="{y}" width="{width}" height="{height}"'
    head += f' viewBox="0 0 {width} {height}" role="img" aria-label="{escape(panel.title)}">'
    return "\n".join([head, *parts, "</svg>"]), width, height


def most_of(panels):
    """The largest share in any of these panels, which are all shaded by it."""
    return max(panel.values.max().item() for panel in panels) or 1.0


def svg(panels):
    """All panels, one below the other, as an SVG file."""
    drawn, width, y = [], 0, 0
    for panel in panels:
        text, w, h = svg_panel(panel, most_of(panels), y)
        drawn, width, y = [*drawn, text], max(width, w), y + h + 16
    head = f'<svg xmlns="http://www.w3.org/2000/svg" class="mass" width="{width}" height="{y}">'
    return "\n".join([head, STYLE, '<rect class="paper" width="100%" height="100%"/>', *drawn, "</svg>\n"])


def draw(panels, path):
    """Write the panels to an .svg file, or by matplotlib to a .png."""
    with replacing(path) as temporary:
        if Path(path).suffix.lower() == ".svg":
            temporary.write_text(svg(panels), encoding="utf-8")
        else:
            _matplotlib_figure(panels).savefig(temporary, format="png", dpi=100)


def _matplotlib_figure(panels):
    """The same picture: cells of a quarter of an inch, panels one below the other."""
    from matplotlib.figure import Figure  # an optional extra: only for a .png

    height = bottom = sum(map(_inches, panels))
    width, most = 2.5 + max(len(panel.columns) for panel in panels) / 4, most_of(panels)
    figure = Figure(figsize=(width, height))
    for panel in panels:
        n_rows, n_columns = panel.values.shape
        bottom -= _inches(panel)
        axes = figure.add_axes((0.8 / width, (bottom + 0.8) / height, n_columns / 4 / width, n_rows / 4 / height))
        light = dict(cmap="Blues", vmin=0, vmax=2 * most)  # so light that the numbers stay readable
        axes.imshow(panel.values.numpy(), aspect="auto", **light)
        axes.set_title(panel.title, loc="left", fontsize=9)
        axes.set_xticks(range(n_columns), panel.columns, rotation=50, ha="right", fontsize=7, parse_math=False)
        axes.set_yticks(range(n_rows), panel.rows, fontsize=7)
        for r, row in enumerate(panel.values.tolist()):
            for c, value in enumerate(row):
                axes.text(c, r, f"{100 * value:.0f}", ha="center", va="center", fontsize=7)
    return figure


def _inches(panel):
    return len(panel.rows) / 4 + 1.3


# The command


def parse_arguments():
    parser = cli.Parser(prog="python -m prefix.evaluation.attention_maps", description="Look at what the slots of a prefix learned.")
    parser.add_argument("prefix", nargs="+", metavar="RUN", help="run or prefix file; of several, the banks of all")
    parser.add_argument("text", help="the sentence")
    parser.add_argument("--from", dest="source", metavar="BANK", help="source language (the prefix's second bank)")
    parser.add_argument("--to", dest="target", metavar="BANK", help="target language (the prefix's first bank)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="draw the attention, too: .svg, or .png by matplotlib")
    parser.add_argument("--nearest", type=int_at_least(0), default=5, metavar="N", help="tokens to list for each slot (5)")
    parser.add_argument("--model", help="where the base lies, if not where the prefix file says")
    parser.add_argument(
        "--data", nargs="+", metavar="FILE", help="text for the nearest tokens (what each file learned from)"
    )
    cli.add_machine_options(parser)
    parser.set_defaults(weights=None)  # as they are: nobody waits for one sentence
    args = parser.parse_args()
    if args.out:
        if args.out.suffix.lower() not in (".svg", ".png") or not args.out.absolute().parent.is_dir():
            parser.error(f"--out {args.out}: not an .svg or .png file in a folder that is there")
        if args.out.suffix.lower() == ".png" and not importlib.util.find_spec("matplotlib"):
            parser.error("--out: a .png takes matplotlib (pip install matplotlib); an .svg takes nothing")
    return args


def main():
    args = parse_arguments()
    model, tokenizer, banks, prefixes = cli.load_with_base(args)
    source, target = cli.direction(args, banks)
    texts = texts_for_nearest(args, prefixes, model, tokenizer, banks) if args.nearest else []
    attention = look_at(model, tokenizer, banks, args.text, source, target)
    if args.out:
        draw(panels(attention), args.out)
        log(f"Drew {args.out}")
    print(printable("\n".join([f"{source} -> {target}: {' '.join(attention.tokens)}", "", *mass_lines(attention)])))
    for part, text in texts:
        n = min(args.nearest, len(text.ids.unique()))
        found = nearest_tokens(model, part, text.ids, text.packed, n)
        print(printable("\n".join(["", *nearest_lines(found, part, tokenizer)])))


def texts_for_nearest(args, prefixes, model, tokenizer, banks):
    """[(Banks, the packed text to hold them against)]: all banks and --data or, of each prefix file, its banks and what
    they learned from."""
    if args.data:
        parts = [(banks, args.data)]
    else:
        parts = [(Banks.load(path, model), cli.data_of([path])) for path in prefixes]
    longest, texts = min(384, model.config.n_positions - banks.position_offset), []
    for part, files in parts:
        paths, columns = rows.columns_for(run.data_paths(files), part.names)
        corpus = data.load(paths, columns, tokenizer, TEXT_ROWS, longest)
        texts.append((part, training_text(corpus, tokenizer, model.device)))
    return texts


if __name__ == "__main__":
    with cli.cli_errors():
        main()
