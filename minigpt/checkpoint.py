"""Checkpoint directories as the hub serves them: where to look for one, weights in, weights out.

Weights are read from the memory-mapped file one tensor at a time and copied straight into the model's own
memory, on its device and in its dtype; there is never a second copy of the model.
"""

import hashlib
import json
import logging
import os
import re
import shlex
from pathlib import Path

import torch
from safetensors.torch import save_file

from minigpt.config import PUBLISHED
from minigpt.files import FLOATS, UserError, escape_control, open_tensors, read_object, reading, replacing
from minigpt.loss import padded_rows

DEMO = Path(__file__).parent / "demo"
WEIGHTS, INDEX, PICKLES = "model.safetensors", "model.safetensors.index.json", "pytorch_model*.bin"
FILES = ["config.json", "model*.safetensors*", "vocab.json", "merges.txt", "*token*.json"]  # of a repository
HEAD, EMBEDDING = "lm_head.weight", "wte.weight"  # one matrix, used twice
OWN = re.compile(r"(transformer|h|wte|wpe|ln_f|lm_head)\.")  # other names are heads of other tasks
MASK = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # buffers of the causal mask, which some checkpoints hold
CONVERT = (
    "import glob, torch, safetensors.torch as s; "
    f"w = dict(item for f in glob.glob('{PICKLES}') for item in torch.load(f, weights_only=True).items()); "
    f"s.save_file({{n: t.clone() for n, t in w.items()}}, '{WEIGHTS}', {{'format': 'pt'}})"
)


def find(name):
    """The directory of the checkpoint `name`: a directory, "demo", or a published name, which is looked for in
    $MINIGPT_HOME, then through huggingface_hub (its cache, else its download). Raises UserError with what to do."""
    if name == "demo":
        return DEMO
    if os.path.isdir(name):
        return Path(name)
    if (known := published(name)) is None:
        raise UserError(f"--model {name}: no such directory, and not one of demo, {', '.join(PUBLISHED)}")
    if directory := on_disk(known) or _from_hub(known, download=True):
        return directory
    raise UserError(
        f"{known} is not on this machine. To fetch it: pip install huggingface_hub && hf download {repository(known)} "
        f"config.json {WEIGHTS} vocab.json merges.txt --local-dir {shlex.quote(str(home() / known))}"
    )


def published(name):
    """The name in PUBLISHED that `name` means ("openai-community/gpt2" is "gpt2"), or None."""
    return next((known for known in PUBLISHED if str(name) in (known, repository(known))), None)


def default(tell):
    """The model to use if none is named: gpt2-xl if it is on disk, else the demo; `tell` gets a line that says so."""
    if on_disk("gpt2-xl"):
        return "gpt2-xl"
    tell("Using the small demo checkpoint: gpt2-xl is not on this machine (--model gpt2-xl fetches it, or says how)")
    return "demo"


def on_disk(name):
    """The directory of a published checkpoint if it can be had without the network, else None."""
    if _has_weights(directory := home() / name) or _has_weights(directory := _from_hub(name, download=False)):
        return directory


def _has_weights(directory):
    """False after a download that was cut short, or if only the tokenizer was ever asked for."""
    files = set(os.listdir(directory)) if directory and directory.is_dir() else set()
    return "config.json" in files and not files.isdisjoint([WEIGHTS, INDEX])


def home():
    return Path(os.environ.get("MINIGPT_HOME", "~/.cache/minigpt")).expanduser()


def repository(name):
    """What the hub calls a published checkpoint."""
    return f"distilbert/{name}" if name == "distilgpt2" else f"openai-community/{name}"


def _from_hub(name, download):
    """The directory in huggingface_hub's cache, or None where that package, or on its disk the checkpoint, is missing."""
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(repository(name), allow_patterns=FILES, local_files_only=not download))
    except ImportError:
        return None
    except Exception as error:  # the library's own errors and those of the network below it are many
        if download:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(f"{name}: huggingface_hub could not download it: {reason}") from error


@torch.no_grad()
def load_weights(model, directory, device, dtype):
    """Fill `model` (its parameters may be on the meta device) from `directory`. Every tensor is checked: missing,
    unexpected, of another shape or type, not finite are UserErrors that name it. Tensors of other tasks' heads are
    passed over, and a warning names them. Sets model.fingerprint."""
    files = {path: open_tensors(path) for path in _weight_files(Path(directory))}
    sources = _match(files, dict(model.named_parameters()), Path(directory))
    for module in model.modules():  # not by to_empty, for which torch imports a second's worth of sympy
        for name, p in module.named_parameters(recurse=False):
            rows = padded_rows(len(p)) if module is model.wte and torch.device(device).type == "cuda" else len(p)
            memory = torch.empty(rows, *p.shape[1:], dtype=dtype, device=device)
            memory[len(p) :] = 0
            setattr(module, name, torch.nn.Parameter(memory[: len(p)]))
    parameters, samples, ends = dict(model.named_parameters()), {}, []
    for name, (path, stored) in sources.items():
        tensor = files[path].get_tensor(stored)
        samples[name] = sample(tensor)
        parameters[name].copy_(tensor)
        ends.append(torch.stack([parameters[name].min(), parameters[name].max()]))  # NaN where there is one
    wrong = (~torch.stack(ends).isfinite()).any(dim=1).tolist()  # the one wait for the device
    if any(wrong):
        path, stored = list(sources.values())[wrong.index(True)]
        check_finite(path, stored, files[path].get_tensor(stored))
        raise UserError(f"{path}: tensor {stored} has numbers too large for {dtype}: use --dtype float32")
    model.fingerprint = fingerprint(samples)


def check_finite(path, name, tensor):
    if not tensor.isfinite().all():
        raise UserError(f"{path}: tensor {name} has numbers that are not finite (NaN or infinity)")


def sample(tensor):
    """64 values spread over a tensor, as float32 bytes."""
    flat = tensor.detach().flatten()
    return flat[:: max(1, flat.numel() // 64)][:64].float().cpu().numpy().tobytes()


def fingerprint(samples):
    """A short name for these very weights, from samples of every tensor: {name: bytes} -> 16 hex digits."""
    content = b"".join(name.encode() + samples[name] for name in sorted(samples))
    return hashlib.sha256(content).hexdigest()[:16]


def _weight_files(directory):
    """The safetensors files of a checkpoint: one, or the shards that the index names."""
    if (directory / WEIGHTS).exists():
        return [directory / WEIGHTS]
    if not (index := directory / INDEX).exists():
        if pickles := sorted(directory.glob(PICKLES)):
            command = f'cd {shlex.quote(str(directory.absolute()))} && python -c "{CONVERT}"'
            raise UserError(f"{pickles[0]} is a pickle, which could run code: it is not read. To convert it: {command}")
        raise UserError(f"{directory}: neither {WEIGHTS} nor {INDEX} is there")
    with reading(index, "an index of shards"):
        shards = sorted(set(read_object(index)["weight_map"].values()))
        if not all(os.path.isfile(directory / shard) for shard in shards):
            raise ValueError(f"it names {shards!r:.200}, not all of them files beside it")
        return [directory / shard for shard in shards]


def _match(files, wanted, directory):
    """{name in the model: (path, name in that file)}, one tensor for every parameter. Reads no more than the headers
    and the head, if there is one."""
    sources, passed_over = {}, []
    for path, file in files.items():
        for stored in file.keys():
            # torch.compile and DataParallel put names of their own in front.
            name = stored.replace("_orig_mod.", "").removeprefix("module.").removeprefix("transformer.")
            if not OWN.match(name):
                passed_over.append(stored)
            elif not MASK.fullmatch(name):
                _check_tensor(path, stored, file.get_slice(stored), wanted.get(EMBEDDING if name == HEAD else name))
                sources[name] = path, stored
    _tie(sources, files)
    if missing := sorted(set(wanted) - set(sources)):
        raise UserError(f"{directory}: {len(missing)} of {len(wanted)} tensors missing, the first {missing[0]}")
    if passed_over:
        told = f"{directory}: passed over, no part of the language model: {', '.join(passed_over):.300}"
        logging.getLogger(__name__).warning(escape_control(told))
    return sources


def _check_tensor(path, stored, info, parameter):
    if parameter is None:
        raise UserError(f"{path}: unexpected tensor {stored}")
    if info.get_dtype() not in FLOATS:
        raise UserError(f"{path}: tensor {stored} is {info.get_dtype()}, expected one of {', '.join(FLOATS)}")
    if (shape := info.get_shape()) != (expected := list(parameter.shape)):
        raise UserError(f"{path}: tensor {stored} has shape {shape}, config.json says {expected}")


def _tie(sources, files):
    """The head must be the token embedding: a checkpoint that trained them apart is another model."""
    if HEAD not in sources:
        return
    path, stored = sources.pop(HEAD)
    other_path, other = sources.setdefault(EMBEDDING, (path, stored))  # some keep only one of the two names
    head, wte = files[path].get_tensor(stored), files[other_path].get_tensor(other)
    if not torch.equal(head.float(), wte.float()):
        check_finite(path, stored, head)
        raise UserError(f"{path}: {stored} differs from {other}; only tied heads are implemented")


def save(model, directory, dtype=torch.float32):
    """Write config.json and model.safetensors, named as the hub names them."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: p.detach().to("cpu", dtype).contiguous() for name, p in model.named_parameters()}
    last = model.config.vocab_size - 1  # the end-of-text token, by GPT-2's custom
    config = model.config.to_dict() | {"bos_token_id": last, "eos_token_id": last}
    with replacing(directory / WEIGHTS) as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})
    with replacing(directory / "config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
