"""What bounds decoding, and how near that bound we and transformers' generate come.

A new token needs every weight of the blocks and of the head once, however many sentences share the step, and the keys
and values of each sentence's text. With few sentences a step cannot take less time than reading those bytes takes:

    weights     n_layer (4 d^2 + 2 d mlp_dim) + vocab_size d      d = n_embd; times the bytes of one weight
    cache       2 n_layer d for each token of text so far, of each sentence

"share" is that time, at the rate at which the machine reads a large tensor (measured at the start), over the time
taken. Prompts are real sentences of different lengths, and every one gets --new tokens, so that all rows do the same
work. transformers pads on the left; ratios are to its better row, with its own cache or a static one and torch.compile,
in float32 on a CPU.

    python tests/benchmarks/decode.py                     tokens/s at batches of 1, 8, 32, 128; time to the first token
    python tests/benchmarks/decode.py --shape gpt2-xl     ... on a GPU
    python tests/benchmarks/decode.py --only int8         ... in 8 bits, CTranslate2's beside ours where it is installed
    python tests/benchmarks/decode.py --what file         a file of 1,000 sentences by prefix, by 3 shots, by 5 beams,
                                                          with the demo checkpoint (or --model) and the demo prefix

The last line printed is one JSON object.
"""

import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from common import circumstances, clock, fresh, make_checkpoint, measure_row, multiplies_bf16, run_rows, timings

from minigpt import GPT, Tokenizer, checkpoint
from minigpt.config import PUBLISHED
from minigpt.generate import Prompt, generate
from minigpt.quantize import fastest_product, prepack, quantize
from prefix import Banks
from prefix.data import corpus as data
from prefix.data.rows import Skipped, read_rows
from prefix.evaluation.few_shot import draw_shots, few_shot, stop_ids
from prefix.init import random_banks
from prefix.run import DEMO_CORPUS, DEMO_PREFIX
from prefix.translation import Decoding, separator, translate

REAL_DATA, REAL_VOCABULARY = ROOT.parent / "shared/data/en-fr.csv", ROOT.parent / "shared/data/gpt2_tokenizer"
BATCHES = (1, 8, 32, 128)
SLOTS = 10  # in each of two banks


def main():
    args = parse_arguments()
    if args.row:
        measures = {name: measure for rows, _ in PARTS.values() for name, measure in rows(args).items()}
        return measure_row(measures.get(args.row, measure_bandwidth), args)
    result = {"circumstances": circumstances(args.device), "shape": args.shape, "data": args.data.name}
    with tempfile.TemporaryDirectory() as home:
        vocabulary = REAL_VOCABULARY if REAL_VOCABULARY.is_dir() else checkpoint.DEMO
        make_checkpoint(PUBLISHED[args.shape], vocabulary, home)
        rate = result["bandwidth"] = fresh("bandwidth", home)["bytes_per_second"]
        print(f"{result['circumstances']['device']}, {torch.get_num_threads()} CPU threads; "
              f"it reads {rate / 1e9:,.1f} GB/s; {args.data.name}")  # fmt: skip
        for what in args.what:
            rows, show = PARTS[what]
            result[what] = run_rows([name for name in rows(args) if args.only in name], home)
            show(args, result[what], rate)
    print(json.dumps(result))


def parse_arguments():
    parser = argparse.ArgumentParser(description="Measure the speed of decoding.")
    parser.add_argument("--what", nargs="+", choices=[*PARTS], default=["batches"])
    parser.add_argument("--shape", choices=[*PUBLISHED], default="gpt2", help="of --what batches; random weights")
    parser.add_argument("--model", default="demo", help="of --what file (the demo checkpoint)")
    parser.add_argument("--prefix", default=str(DEMO_PREFIX), help="of --what file (the demo prefix)")
    parser.add_argument("--data", type=Path, default=REAL_DATA if REAL_DATA.exists() else DEMO_CORPUS)
    parser.add_argument("--sentences", type=int, default=1000, help="of --what file (1000)")
    parser.add_argument("--new", type=int, default=48, help="tokens that each sentence gets (48)")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--only", default="", metavar="TEXT", help="only rows with this text in their names")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--row", help=argparse.SUPPRESS)  # how this script calls itself: one row, in its own process
    parser.add_argument("--home", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure_bandwidth(args):
    """A sum over 1 GiB: bytes read per second, the best of several."""
    tensor = torch.ones(1 << 28, device=args.device)
    return {"bytes_per_second": tensor.numel() * 4 / min(timings(tensor.sum, args.device, 2))}


# Tokens per second at several batch sizes


def batches(args):
    first = "bfloat16" if args.device == "cuda" else "float32"
    rows = {"transformers": partial(transformers_batches, dtype=first)}
    rows["transformers, static cache, compiled"] = partial(transformers_batches, dtype=first, static=True)
    rows["ours"] = partial(our_batches, dtype=first)
    if args.device == "cpu":
        if multiplies_bf16():
            rows["transformers, bfloat16"] = partial(transformers_batches, dtype="bfloat16")
            rows["ours, bfloat16"] = partial(our_batches, dtype="bfloat16")
        rows["ours, int8"] = partial(our_batches, dtype="float32", int8=True)
        rows |= {f"CTranslate2, {kind}": partial(ctranslate2_batches, kind=kind) for kind in ctranslate2_types()}
    return rows


def prompts_of(args, n):
    """n sources, each with the separator behind it: lists of ids of 8 to 64 tokens."""
    tokenizer, prompts = Tokenizer.from_pretrained(args.home), []
    for _, texts in read_rows([args.data], None, Skipped()):
        ids = tokenizer.encode(texts[0])
        if 8 <= len(ids) < 64:
            prompts.append([*ids, separator(tokenizer)])
        if len(prompts) == n:
            return prompts
    raise SystemExit(f"{args.data}: fewer than {n} sentences of 8 to 63 tokens")


def cells(args, run):
    """run(prompts, new) for each batch size: its seconds for one token and for all."""
    result = []
    for batch in args.batches:
        prompts = prompts_of(args, batch)
        first, all_new = (min(timings(lambda: run(prompts, new), args.device)) for new in (1, args.new))
        result.append({"batch": batch, "prompt_tokens": sum(map(len, prompts)), "first": first, "seconds": all_new})
    return {"cells": result}


def our_batches(args, dtype, int8=False):
    model = GPT.from_pretrained(args.home, args.device, getattr(torch, dtype))
    bytes_per_weight = 1 if int8 else model.dtype.itemsize
    if int8:
        quantize(model, fastest_product(model))
    elif args.device == "cpu":
        prepack(model)
    slots = random_banks(model.config, ["en", "fr"], SLOTS).to(args.device).slots().to(model.dtype)

    def run(prompts, new):
        prompts = [Prompt(ids, new, [2] * (len(ids) - 1) + [3]) for ids in prompts]
        found = generate(model, prompts, [], slots, batch_size=len(prompts))
        assert all(len(result.ids) == new for result in found)

    return cells(args, run) | {"bytes_per_weight": bytes_per_weight, "bytes_per_cached": model.dtype.itemsize}


def ctranslate2_types():
    """The 8-bit types that this CPU has in CTranslate2, where that is installed."""
    try:
        from ctranslate2 import get_supported_compute_types
    except ImportError:
        return []
    return sorted(kind for kind in get_supported_compute_types("cpu") if kind.startswith("int8_"))


def ctranslate2_batches(args, kind):
    """Its generator, without slots, on the same checkpoint; transformers reads that for it."""
    import ctranslate2

    with tempfile.TemporaryDirectory() as home:
        ctranslate2.converters.TransformersConverter(args.home).convert(home, quantization="int8", force=True)
        generator = ctranslate2.Generator(home, compute_type=kind, intra_threads=torch.get_num_threads())
    tokens = {i: token for token, i in json.loads(Path(args.home, "vocab.json").read_text()).items()}
    options = {"sampling_topk": 1, "include_prompt_in_result": False, "max_batch_size": 0}

    def run(prompts, new):
        texts = [[tokens[i] for i in ids] for ids in prompts]
        found = generator.generate_batch(texts, min_length=new, max_length=new, **options)
        assert all(len(result.sequences_ids[0]) == new for result in found)

    return cells(args, run) | {"bytes_per_weight": 1, "bytes_per_cached": 4}


def transformers_batches(args, dtype, static=False):
    """Plain generate: no slots, which would only cost it time."""
    model = load_transformers(args.home, args.device, dtype)
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options |= {"cache_implementation": "static"} if static else {}
    if static:
        mode = "reduce-overhead" if args.device == "cuda" else None
        model.forward = torch.compile(model.forward, dynamic=False, mode=mode)

    def run(prompts, new):
        found = model.generate(**left_padded(prompts, args.device), max_new_tokens=new, min_new_tokens=new, **options)
        assert found.size(1) == max(map(len, prompts)) + new

    itemsize = getattr(torch, dtype).itemsize
    return cells(args, run) | {"bytes_per_weight": itemsize, "bytes_per_cached": itemsize}


def load_transformers(directory, device, dtype):
    from transformers import AutoModelForCausalLM, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).to(device).eval()
    model.generation_config.eos_token_id = None
    return model


def left_padded(prompts, device):
    longest = max(map(len, prompts))
    ids, mask = torch.zeros(2, len(prompts), longest, dtype=torch.int64)
    for i, prompt in enumerate(prompts):
        ids[i, longest - len(prompt) :], mask[i, longest - len(prompt) :] = torch.tensor(prompt), 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def show_batches(args, rows, rate):
    c = PUBLISHED[args.shape]
    weights = c.n_layer * (4 * c.n_embd**2 + 2 * c.n_embd * c.mlp_dim) + c.vocab_size * c.n_embd
    print(f"\n{'':38}{'batch':>6}  tokens/s  of transformers'  first token, ms  share")
    for name, row in rows.items():
        for i, cell in enumerate(row.get("cells", [])):
            peers = [rows.get("transformers", {})]
            if args.device == "cpu":
                peers.append(rows.get("transformers, static cache, compiled", {}))
            theirs = [peer["cells"][i]["seconds"] for peer in peers if "cells" in peer]
            B, steps = cell["batch"], args.new - 1
            text = steps * (cell["prompt_tokens"] + B * args.new / 2)  # cached tokens read, in all steps
            least = steps * weights * row["bytes_per_weight"]
            least += text * 2 * c.n_layer * c.n_embd * row["bytes_per_cached"]
            cell["tokens_per_second"] = B * args.new / cell["seconds"]
            cell["over_transformers"] = min(theirs) / cell["seconds"] if theirs else None
            cell["share_of_bandwidth"] = least / rate / (cell["seconds"] - cell["first"])
            print(f"{name:38}{B:6}{cell['tokens_per_second']:10,.1f}{cell['over_transformers'] or 0:16.2f}x"
                  f"{1000 * cell['first']:17,.0f}{cell['share_of_bandwidth']:7.0%}")  # fmt: skip
        if "error" in row:
            print(f"{name:38}{row['error']}")


# A file of sentences, to the end


def file(args):
    return {f"{system}, {way}": partial(measure, way=way)
            for way in ("prefix", "3 shots", "5 beams")
            for system, measure in (("ours", our_file), ("transformers", transformers_file))}  # fmt: skip


def sentences(args, tokenizer):
    """(corpus, sources) of the file, in the order of the rows: those of the test split, and of others if they are few."""
    corpus = data.load([args.data], ["en", "fr"], tokenizer, max_tokens=96, home=args.home)
    rows = [*corpus.rows("test"), *corpus.rows("validation"), *corpus.rows("train")][: args.sentences]
    return corpus, [corpus.text(row, 1) for row in rows]


def our_file(args, way):
    model = GPT.from_pretrained(args.model, args.device, file_dtype(args))
    tokenizer = Tokenizer.from_pretrained(args.model)
    banks, (corpus, sources) = Banks.load(args.prefix, model), sentences(args, tokenizer)
    if way == "3 shots":
        shots, _ = draw_shots(corpus, "fr", "en", 3, seed=0)
        run = lambda texts: few_shot(model, tokenizer, shots, texts)
    else:
        beams = 5 if way == "5 beams" else 1
        run = lambda texts: translate(model, tokenizer, banks, texts, ("fr", "en"), Decoding(beams=beams))
    run(sources[:2])
    found, seconds = clock(lambda: run(sources), args.device)
    return {"seconds": seconds, "tokens": sum(len(tokenizer.encode(result.text)) for result in found)}


def transformers_file(args, way):
    """As its users do: batches of 32 sorted by length, padded on the left, until the last sentence of each has ended. Its
    prefix is peft's, with our slots in it, both banks open from the first token on."""
    model = load_transformers(checkpoint.find(args.model), args.device, str(file_dtype(args)).split(".")[1])
    tokenizer = Tokenizer.from_pretrained(args.model)
    corpus, sources = sentences(args, tokenizer)
    stop = [tokenizer.eot]
    if way == "3 shots":
        shots, stop = draw_shots(corpus, "fr", "en", 3, seed=0)[0].text, sorted(stop_ids(tokenizer))
        prompts = [tokenizer.encode(f"{shots}fr: {text}\nen:") for text in sources]
    else:
        prompts = [[*tokenizer.encode(text), separator(tokenizer)] for text in sources]
        model = with_peft(model, args)
    prompts.sort(key=len)

    def run(prompts):
        new = 0
        for i in range(0, len(prompts), 32):
            batch = prompts[i : i + 32]
            options = {"num_beams": 5 if way == "5 beams" else 1, "do_sample": False}
            source = max(map(len, batch)) - (len(tokenizer.encode(shots)) if way == "3 shots" else 0)
            found = model.generate(**left_padded(batch, args.device), max_new_tokens=2 * source + 16, eos_token_id=stop,
                                   pad_token_id=tokenizer.eot, **options)  # fmt: skip
            found = found[:, max(map(len, batch)) :]
            new += int((~torch.isin(found, torch.tensor(stop, device=found.device))).sum())
        return new

    run(prompts[:2])
    tokens, seconds = clock(lambda: run(prompts), args.device)
    return {"seconds": seconds, "tokens": tokens}


def with_peft(model, args):
    from peft import PrefixTuningConfig, get_peft_model

    banks = Banks.load(args.prefix, GPT.from_pretrained(args.model))
    slots = banks.slots()
    n = slots.bank.numel()
    peft = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=n)).eval()
    both = torch.stack([slots.key, slots.value], dim=1)  # (n_layer, 2, n_head, S, head_dim)
    with torch.no_grad():
        peft.prompt_encoder["default"].embedding.weight.copy_(both.permute(3, 0, 1, 2, 4).reshape(n, -1))
    check_prefix_counts(peft)
    return peft.to(args.device)


def check_prefix_counts(peft):
    """peft 0.21.2's generate ignores the prefix under transformers 5.24.0 (not under 5.23.0): measure no such thing."""
    ids = torch.arange(8)[None]
    options = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    options |= {"attention_mask": torch.ones_like(ids), "return_dict_in_generate": True}
    written = peft.generate(input_ids=ids, **options).logits[0]
    if not torch.allclose(written, peft(input_ids=ids).logits[:, -1], atol=1e-2):
        raise RuntimeError("peft's generate ignores the prefix with these versions: take transformers 5.23.0")


def file_dtype(args):
    return torch.bfloat16 if args.device == "cuda" else torch.float32


def show_file(args, rows, _):
    print(f"\n{args.sentences} sentences of {args.data.name}, {args.model}")
    print(f"{'':26}seconds  sentences/s  tokens/s  of transformers'")
    for name, row in rows.items():
        if "error" in row:
            print(f"{name:26}{row['error']}")
            continue
        theirs = rows.get(f"transformers, {name.split(', ')[1]}", {}).get("seconds")
        row["sentences_per_second"] = args.sentences / row["seconds"]
        row["tokens_per_second"] = row["tokens"] / row["seconds"]
        row["over_transformers"] = theirs / row["seconds"] if theirs else None
        print(f"{name:26}{row['seconds']:7.1f}{row['sentences_per_second']:13.1f}{row['tokens_per_second']:10,.0f}"
              f"{row['over_transformers'] or 0:16.2f}x")  # fmt: skip


PARTS = {"batches": (batches, show_batches), "file": (file, show_file)}


if __name__ == "__main__":
    main()
