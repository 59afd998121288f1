"""Banks to and from the adapters of peft's prefix tuning, bit by bit.

    python -m prefix.peft export RUN --bank fr --out DIR
    python -m prefix.peft import DIR --bank fr --model M --out FILE

An adapter is a folder of two files: adapter_config.json, and adapter_model.safetensors with the one tensor
`prompt_embeddings` (prefix_len, 2 * n_layer * n_embd). A slot is a row; in it stand, all heads side by side,

    key in layer 0 | value in layer 0 | key in layer 1 | value in layer 1 | ...

peft knows one bank, open from the first token on, and counts its slots as positions: text starts at prefix_len, where
ours starts at the bank's position_offset, 0 as a rule. So a bank gives the same logits there only if it was trained
with `train.py --position-offset prefix`; an imported one keeps peft's positions here. An exported bank's own offset
goes along in the metadata of adapter_model.safetensors, which peft does not read, so that the way back keeps it.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from minigpt import GPT, UserError, checkpoint
from minigpt.config import PUBLISHED
from minigpt.files import FLOATS, open_tensors, read_object, replacing
from prefix import cli
from prefix.banks import Banks
from prefix.distributed import log
from prefix.run import model_name

CONFIG, WEIGHTS, TENSOR = "adapter_config.json", "adapter_model.safetensors", "prompt_embeddings"


def to_rows(key, value):
    """Two of (n_layer, n_head, prefix_len, head_dim) -> prompt_embeddings (prefix_len, 2 * n_layer * n_embd)."""
    both = torch.stack([key, value], dim=1)  # (n_layer, 2, n_head, prefix_len, head_dim)
    return both.permute(3, 0, 1, 2, 4).flatten(1).contiguous()


def from_rows(rows, config):
    """The inverse of to_rows -> (key, value)."""
    both = rows.view(len(rows), config.n_layer, 2, config.n_head, config.head_dim)
    key, value = both.permute(2, 1, 3, 0, 4).contiguous()  # each (n_layer, n_head, prefix_len, head_dim)
    return key, value


def export_bank(banks, name, directory):
    """Write the bank `name` of a Banks as an adapter into `directory`, which is made."""
    banks.mask([name])  # it is there
    key, value = (side.detach().cpu() for side in banks.pairs()[banks.names.index(name)])
    n_layer, n_head, prefix_len, head_dim = key.shape
    if not prefix_len:
        raise UserError(f"bank {name!r} has no slots to export")
    config = {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": _base_name(banks.training_record.get("model")),
        "inference_mode": True,
        "num_virtual_tokens": prefix_len,
        "token_dim": n_head * head_dim,
        "num_transformer_submodules": 1,
        "num_attention_heads": n_head,
        "num_layers": n_layer,
        "encoder_hidden_size": n_head * head_dim,
        "prefix_projection": False,
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with replacing(directory / WEIGHTS) as temporary:
        metadata = {"format": "pt", "position_offset": str(banks.position_offset)}
        save_file({TENSOR: to_rows(key, value)}, temporary, metadata)
    with replacing(directory / CONFIG) as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _base_name(model):
    """What transformers calls the base that a training record names; None where it names none."""
    if not isinstance(model, str):
        return None
    if model == "demo":
        return str(checkpoint.DEMO)
    return checkpoint.repository(model) if model in PUBLISHED else model


def import_bank(directory, name, model):
    """The adapter in `directory` as a Banks with the one bank `name`, for `model`. Raises UserError where it is no
    adapter of prefix tuning, or not for a model of this shape."""
    directory, config = Path(directory), model.config
    adapter = read_object(directory / CONFIG)
    if adapter.get("peft_type") != "PREFIX_TUNING":
        raise UserError(f"{directory}: peft_type is {adapter.get('peft_type')!r}; only PREFIX_TUNING has slots")
    for setting, ours in (
        ("num_layers", config.n_layer),
        ("num_attention_heads", config.n_head),
        ("token_dim", config.n_embd),
    ):
        if adapter.get(setting) != ours:
            raise UserError(f"{directory}: {setting} is {adapter.get(setting)!r}, but {ours} in this model")
    rows, offset = _read_rows(directory / WEIGHTS, config)
    offset = len(rows) if offset is None else offset
    if offset >= config.n_positions:
        raise UserError(f"{directory}: text would start at {offset}, past the {config.n_positions} positions there are")
    return Banks({name: from_rows(rows, config)}, offset)


def _read_rows(path, config):
    """prompt_embeddings in float32, and the position_offset in the metadata or None."""
    pickle, width = path.with_suffix(".bin"), 2 * config.n_layer * config.n_embd
    if pickle.exists() and not path.exists():
        raise UserError(f"{pickle} is a pickle, which could run code: save the adapter as safetensors from peft")
    with open_tensors(path) as file:
        names, offset = list(file.keys()), (file.metadata() or {}).get("position_offset")
        if TENSOR not in names:
            there = ", ".join(names) or "nothing"
            raise UserError(f"{path}: expected {TENSOR}, as peft's save_pretrained writes them, found {there}")
        info = file.get_slice(TENSOR)
        shape, dtype = info.get_shape(), info.get_dtype()
        if len(shape) != 2 or shape[0] < 1 or shape[1] != width:
            raise UserError(f"{path}: {TENSOR} has shape {shape}, expected [prefix length, {width}]")
        if dtype not in FLOATS:
            raise UserError(f"{path}: {TENSOR} is {dtype}, expected one of {', '.join(FLOATS)}")
        rows = file.get_tensor(TENSOR).float()
    checkpoint.check_finite(path, TENSOR, rows)
    if offset is not None and not (offset.isascii() and offset.isdigit() and len(offset) < 10):
        raise UserError(f"{path}: position_offset is {offset!r}, not a position")
    return rows, None if offset is None else int(offset)


def parse_arguments():
    parser = cli.Parser(prog="python -m prefix.peft", description="Banks to and from peft's prefix tuning.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{export,import}")
    out = commands.add_parser("export", help="write a bank as an adapter that peft loads")
    out.add_argument("run", metavar="RUN", help="a run directory or a prefix file")
    out.add_argument("--out", type=Path, required=True, metavar="DIR", help="the adapter's folder, a new one")
    back = commands.add_parser("import", help="make a prefix file of an adapter that peft saved")
    back.add_argument("adapter", type=Path, metavar="DIR", help="the folder with adapter_config.json")
    back.add_argument("--model", required=True, metavar="M", help="the base that it was trained on")
    back.add_argument("--out", type=Path, required=True, metavar="FILE", help="the prefix file, a new one")
    for direction in (out, back):
        direction.add_argument("--bank", required=True, metavar="NAME")
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"--out {args.out}: already there; name another")
    return args


def main():
    args = parse_arguments()
    if args.command == "export":
        banks = Banks.read(cli.find_prefix(args.run))
        export_bank(banks, args.bank, args.out)
        log(f"{args.out}: {_positions(banks, args.bank)}")
    else:
        # Of the base, its shape and the names of its weights are all that is needed.
        model = GPT.from_pretrained(args.model, "cpu", torch.bfloat16)
        banks = import_bank(args.adapter, args.bank, model)
        banks.training_record = {"model": model_name(args.model)}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        banks.save(args.out, model)
        log(f"{args.out}: {banks.prefix_len[0]} slots; text starts at position {banks.position_offset}")


def _positions(banks, name):
    """What an export says: whether peft will give the same logits."""
    ours, theirs = banks.position_offset, banks.prefix_len[banks.names.index(name)]
    if ours == theirs:
        return f"text starts at position {ours} in both: peft gives the same logits"
    remedy = "train with --position-offset prefix for a bank that gives the same in both"
    return f"text starts at position {ours} here but at {theirs} in peft, so logits there will differ; {remedy}"


if __name__ == "__main__":
    with cli.cli_errors():
        main()
