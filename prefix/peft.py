"""Banks to and from the adapters of peft's prefix tuning, bit by bit.

    python -m prefix.peft export RUN --bank fr --out DIR
    python -m prefix.peft import DIR --bank fr --model M --out FILE

An adapter is a folder of two files: adapter_config.json, and adapter_model.safetensors with the one tensor
`prompt_embeddings` (prefix_len, 2 * n_layer * n_embd). Each row is a slot; in it stand, all heads side by side,

    key in layer 0 | value in layer 0 | key in layer 1 | value in layer 1 | ...

peft knows one bank, open from the first token on, and counts its slots as positions: text starts at prefix_len, where
ours starts at the bank's position_offset, 0 as a rule. So a bank gives the same logits there only if it was trained
with `train.py --position-offset prefix`; an imported one keeps peft's positions here. The
metadata of adapter_model.safetensors, which peft does not read, keeps the offset of a bank of ours for the way back.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from minigpt import GPT, UserError, checkpoint
from minigpt.files import FLOATS, open_tensors, read_object, reading, replacing
from prefix.banks import Banks
from prefix.distributed import log
from prefix.prefix_file import check
from prefix.run import model_name

CONFIG, WEIGHTS, TENSOR = "adapter_config.json", "adapter_model.safetensors", "prompt_embeddings"


def to_embeddings(key, value):
    """Two of (n_layer, n_head, prefix_len, head_dim) -> prompt_embeddings (prefix_len, 2 * n_layer * n_embd)."""
    both = torch.stack([key, value], dim=1)  # (n_layer, 2, n_head, prefix_len, head_dim)
    return both.permute(3, 0, 1, 2, 4).flatten(1).contiguous()


def from_embeddings(embeddings, config):
    """The inverse of to_embeddings -> (key, value)."""
    both = embeddings.view(len(embeddings), config.n_layer, 2, config.n_head, config.head_dim)
    key, value = both.permute(2, 1, 3, 0, 4).contiguous()  # each (n_layer, n_head, prefix_len, head_dim)
    return key, value


def export_bank(banks, name, directory):
    """Write the bank `name` of a Banks as an adapter into `directory`, which is made."""
    banks.mask([name])  # it is there
    key, value = (side.detach().cpu() for side in banks.key_values()[banks.names.index(name)])
    n_layer, n_head, prefix_len, head_dim = key.shape
    if not prefix_len:
        raise UserError(f"bank {name!r} has no slots to export")
    base = banks.training_record.get("model")
    if known := checkpoint.published(base):
        base = checkpoint.repository(known)  # as transformers calls it
    config = {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(checkpoint.DEMO) if base == "demo" else base,
        "inference_mode": True,
        "num_virtual_tokens": prefix_len,
        "num_transformer_submodules": 1,
        "token_dim": n_head * head_dim,
        "num_attention_heads": n_head,
        "num_layers": n_layer,
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with replacing(directory / WEIGHTS) as temporary:
        metadata = {"format": "pt", "position_offset": str(banks.position_offset)}
        save_file({TENSOR: to_embeddings(key, value)}, temporary, metadata)
    with replacing(directory / CONFIG) as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def import_bank(directory, bank, model):
    """The adapter in `directory` as a Banks with the one bank `bank`, for `model`. Raises UserError if it is no adapter
    of prefix tuning, or not for a model of this shape."""
    path, c, expected = Path(directory) / WEIGHTS, model.config, "an adapter for this model"
    shape = {"num_layers": c.n_layer, "num_attention_heads": c.n_head, "token_dim": c.n_embd}
    adapter = read_object(path.with_name(CONFIG))
    with reading(path.with_name(CONFIG), expected):
        for name, ours in {"peft_type": "PREFIX_TUNING", **shape}.items():
            check(adapter.get(name) == ours, f"{name} is {adapter.get(name)!r}, expected {ours!r}")
    if not path.exists() and (pickle := path.with_suffix(".bin")).exists():
        raise UserError(f"{pickle} is a pickle, which could run code: save it as safetensors from peft")
    with open_tensors(path) as file, reading(path, expected):
        check(TENSOR in file.keys(), f"expected {TENSOR}, found {', '.join(file.keys()) or 'nothing'}")
        info, width = file.get_slice(TENSOR), 2 * c.n_layer * c.n_embd
        shape, dtype = info.get_shape(), info.get_dtype()
        sound = len(shape) == 2 and shape[0] and shape[1] == width and dtype in FLOATS
        fitting = f"[prefix length, {width}] in one of {', '.join(FLOATS)}"
        check(sound, f"{TENSOR} is {shape} in {dtype}, expected {fitting}")
        offset = int((file.metadata() or {}).get("position_offset", shape[0]))
        check(0 <= offset < c.n_positions, f"text would start at {offset}, not one of {c.n_positions} positions")
        embeddings = file.get_tensor(TENSOR).float()
    checkpoint.check_finite(path, TENSOR, embeddings)
    return Banks({bank: from_embeddings(embeddings, c)}, offset)


def parse_arguments():
    from prefix import cli  # for the command alone

    parser = cli.Parser(prog="python -m prefix.peft", description="Banks to and from peft's prefix tuning.")
    add = parser.add_argument
    add("command", choices=["export", "import"], help="write a bank as an adapter, or read it back")
    add("source", type=Path, metavar="RUN_OR_DIR", help="a run or prefix file; an adapter's folder")
    add("--bank", required=True, metavar="NAME", help="the bank's name here")
    add("--model", metavar="M", help="of an import: the base that the adapter was trained on")
    add("--out", type=Path, required=True, metavar="DIR_OR_FILE", help="a new folder; a new prefix file")
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"--out {args.out}: already there; name another")
    if (args.command == "import") != bool(args.model):
        parser.error("--model goes with import, which needs it")
    return args


def main():
    args = parse_arguments()
    if args.command == "export":
        banks = Banks.load(args.source)
        export_bank(banks, args.bank, args.out)
        ours, theirs = banks.position_offset, banks.prefix_len[banks.names.index(args.bank)]
        same = "the same logits" if ours == theirs else "other logits (train with --position-offset prefix for the same)"
        said = f"text starts at position {ours} here, at {theirs} in peft: {same}"
    else:
        model = GPT.from_pretrained(args.model, "cpu", torch.bfloat16)  # only its shape and its weights' names matter
        banks = import_bank(args.source, args.bank, model)
        banks.training_record = {"model": model_name(args.model)}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        banks.save(args.out, model)
        said = f"{banks.prefix_len[0]} slots; text starts at position {banks.position_offset}"
    log(f"{args.out}: {said}")


if __name__ == "__main__":
    from prefix.cli import cli_errors

    with cli_errors():
        main()
