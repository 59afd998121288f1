"""What several test files share: fresh random numbers, random models and checkpoints, transformers'
GPT-2 as the reference, and a way to run the commands."""

import csv
import io
import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import train
from minigpt import GPT, GPTConfig, Tokenizer, UserError, checkpoint
from prefix import cli, distributed
from prefix.banks import Banks
from prefix.batches import BatchLoader
from prefix.data import corpus as data
from prefix.data.splits import split_of
from prefix.init import random_banks
from prefix.run import DEMO_PREFIX
from prefix.trainer import Settings, Trainer

os.environ["OMP_NUM_THREADS"] = "1"  # two processes of tests share two cores, and start others
torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported: they then run on the CPU

CONTEXT = 200  # positions of the checkpoints in `place`
TRAIN = ["--steps", "3", "--batch-size", "4", "--prefix-len", "3", "--device", "cpu", "--dtype", "float32"]


@pytest.fixture(autouse=True)
def the_same_for_every_test(request, monkeypatch):
    """Other inputs in every run (pytest prints the seed of a test that fails), notices that are new, exact tokens and bits
    on the CPU also where there is a GPU, and no picture of each loss, which takes longer than the smallest runs train."""
    print(f"torch.manual_seed({torch.seed()})")
    distributed.log_once.cache_clear()
    if request.path.name not in ("test_kernels.py", "test_decode_kernel.py", "test_backends.py"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    if request.path.name not in ("test_attention_maps.py", "test_pictures.py"):
        for name in ("matplotlib", "matplotlib.figure"):
            monkeypatch.setitem(sys.modules, name, None)


def random_model(config, std=0.3):
    """A frozen GPT, all of whose parameters are far from their neutral beginnings."""
    model = GPT(config).requires_grad_(False)
    for p in model.parameters():
        p.normal_(std=std)
    return model


def save_random_checkpoint(directory, n_positions=200):
    """A small model with the demo's vocabulary, saved; it is returned, too."""
    model = small_model(Tokenizer.from_pretrained("demo"), n_positions=n_positions)
    checkpoint.save(model, directory)
    copy_tokenizer(checkpoint.DEMO, directory)
    return model


def copy_tokenizer(source, directory):
    for file in ("vocab.json", "merges.txt"):
        shutil.copy(source / file, directory)


def random_text(most=7):
    """1 to `most` words of four letters."""
    letters = torch.randint(26, (int(torch.randint(1, most + 1, ())), 4)) + ord("a")
    return " ".join("".join(map(chr, word)) for word in letters)


def random_rows(split, n, columns=2):
    """n rows that belong to this split."""
    rows = []
    while len(rows) < n:
        row = [random_text() for _ in range(columns)]
        rows += [row] if split_of(row[0]) == split else []
    return rows


def write_table(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


@pytest.fixture
def reference(tmp_path):
    """A function: settings -> transformers' GPT-2 with random weights, which it has saved in tmp_path."""
    from transformers import GPT2Config, GPT2LMHeadModel  # takes seconds: only for those who ask

    tiny = dict(vocab_size=100, n_positions=16, n_embd=32, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None)

    def build(**settings):
        model = GPT2LMHeadModel(GPT2Config(**tiny | settings, attn_implementation="eager")).eval().requires_grad_(False)
        for p in model.parameters():  # far from their neutral beginnings, so that a wrong bias or norm shows
            p += torch.randn_like(p) * (0.1 if p.dim() == 1 else len(p) ** -0.5)
        model.save_pretrained(tmp_path)
        return model

    yield build
    for file in tmp_path.glob("*.safetensors"):  # pytest keeps the rest of the folder
        file.unlink()


@pytest.fixture
def run(monkeypatch, capsys):
    """A function: a script's module and its arguments -> (exit code, standard output, standard error)."""

    def run(script, *arguments, stdin=b""):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
        file = tempfile.TemporaryFile(buffering=0)
        file.write(stdin)
        file.seek(0)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(file))
        capsys.readouterr()
        try:
            with cli.cli_errors():
                script.main()
            code = 0
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


def assert_refused(result, *words):
    """One line on standard error that has these words, nothing on standard output, exit code 2."""
    code, out, err = result
    assert (code, out, err.count("\n")) == (2, "", 1), err
    for word in words:
        assert str(word) in err


def refusal(read, *arguments):
    """The message of the UserError that a call ends with: one line, and a short one."""
    with pytest.raises(UserError) as caught:
        read(*arguments)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1100
    return str(caught.value)


def why_refused(read, path, *more):
    """The message of that UserError, less the path that it begins with."""
    message = refusal(read, path, *more)
    assert message.startswith(str(path))
    return message.removeprefix(str(path)).lstrip("/: ")


def edit_json(path, change):
    """change(content) changes a JSON file's content in place."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with checkpoints `base`, `other`, tables en-fr.csv, en-fr-de.csv, and the trained runs `run`, `run3`."""
    place = tmp_path_factory.mktemp("place")
    for name in ("base", "other"):
        save_random_checkpoint(place / name, CONTEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIGPT_HOME", str(place / "home"))
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setitem(sys.modules, "matplotlib", None)
        for out, columns in (("run", ["en", "fr"]), ("run3", ["en", "fr", "de"])):
            table = place / f"{'-'.join(columns)}.csv"
            rows = random_rows("train", 12, len(columns)) + random_rows("validation", 2, len(columns))
            write_table(table, [columns, *rows, *random_rows("test", 5, len(columns))])
            options = ["--model", place / "base", "--data", table, "--columns", *columns, "--out", place / out]
            patch.setattr(sys, "argv", ["train.py", *map(str, options), *TRAIN])
            train.main()
    return place


@pytest.fixture
def workplace(tmp_path, monkeypatch, place):
    """The command runs in an empty folder."""
    monkeypatch.setenv("MINIGPT_HOME", str(place / "home"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def demo():
    """The demo's model, tokenizer and banks."""
    model = GPT.from_pretrained("demo")
    return model, Tokenizer.from_pretrained("demo"), Banks.load(DEMO_PREFIX, model)


@pytest.fixture
def write(tmp_path):
    """A function: a name, str or bytes -> the path of a file that holds them."""

    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.from_pretrained("demo")


def small_model(tokenizer, dtype=torch.float32, n_positions=128):
    """Two layers of two heads of 16 for this vocabulary, with random weights, frozen."""
    config = GPTConfig(vocab_size=tokenizer.n_vocab, n_positions=n_positions, n_embd=32, n_layer=2, n_head=2)
    return random_model(config, std=0.4).to(dtype)


@pytest.fixture
def model(tokenizer):
    return small_model(tokenizer)


@pytest.fixture
def load(tmp_path, tokenizer):
    """A function: rows -> the Corpus of a table of them."""

    def load(rows, names=("en", "fr")):
        return data.load([str(write_table(tmp_path / "data.csv", [names, *rows]))], names, tokenizer, home=tmp_path)

    return load


@pytest.fixture(scope="session")
def cats(tokenizer, tmp_path_factory):
    """The Corpus of 60 pairs that differ in a number."""
    home = tmp_path_factory.mktemp("cats")
    rows = [(f"The cat number {i} sleeps.", f"Le chat numéro {i} dort.") for i in range(60)]
    return data.load([write_table(home / "pairs.csv", [("en", "fr"), *rows])], None, tokenizer, home=home)


@pytest.fixture
def corpus(load):
    return load(random_rows("train", 20) + random_rows("validation", 4))


@pytest.fixture
def trainer(model, tokenizer, corpus, tmp_path):
    """A function: settings -> a Trainer of random banks of 3 slots (or those in `slots`), with a run directory."""

    def build(out="run", slots=None, model=model, corpus=corpus, banks=None, micro=None, directions=None, **settings):
        (tmp_path / out).mkdir(exist_ok=True)
        banks = banks or random_banks(model.config, corpus.columns, 3, int(torch.randint(1 << 30, ())))
        if slots:
            banks.load_state_dict(slots)
        settings = Settings(**dict(steps=6, lr=0.05, batch_size=8, warmup=2, eval_every=0) | settings)
        loader = BatchLoader(corpus, tokenizer, settings, model.device, directions, micro)
        return Trainer(model, banks, loader, settings, tmp_path / out)

    return build


def metrics(out):
    """(lines of steps, lines of validations) of a run's directory, without their seconds, which never fall."""
    lines = [json.loads(line, parse_constant=pytest.fail) for line in open(Path(out, "metrics.jsonl"))]
    steps = [line for line in lines if "loss" in line]
    seconds = [line.pop("seconds") for line in steps]
    assert seconds == sorted(seconds)
    return steps, [line for line in lines if "val_loss" in line]


def content_of_all(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def one_step(trainer):
    """The line of metrics of a trainer's next step."""
    return trainer.optimizer_step(trainer.loader.step(trainer.progress.step))


def stop_after(trainer, step):
    """Have this process signalled at the end of a step."""
    watch(trainer, "optimizer_step", lambda *_: trainer.progress.step == step and os.kill(os.getpid(), signal.SIGINT))


def slots_of(trainer):
    return {name: p.detach().clone() for name, p in trainer.banks.named_parameters()}


def flat(banks):
    """Keys and values of each bank in turn, as they are now."""
    return [x.detach().clone() for pair in banks.key_values() for x in pair]


def saved_prefix(trainer):
    """What the prefix file of a run holds, as slots_of."""
    banks = Banks.load(trainer.out / "prefix.safetensors", trainer.model)
    return {name: p.detach() for name, p in banks.named_parameters()}


def same(one, other):
    """Are two dicts of tensors equal, bit for bit?"""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def projected(model, compute):
    """What c_attn puts out in every layer while compute() runs: (n_layer, N, 3, n_head, head_dim), queries first."""
    found = []
    hooks = [block.attn.c_attn.register_forward_hook(lambda *call: found.append(call[-1].detach())) for block in model.h]
    compute()
    for hook in hooks:
        hook.remove()
    return torch.stack(found).unflatten(-1, (3, model.config.n_head, -1))


def watch(owner, attribute, note):
    """From now on, call note(arguments, result) after each call of a method."""
    method = getattr(owner, attribute)

    def watched(*arguments, **named):
        result = method(*arguments, **named)
        note(arguments, result)
        return result

    setattr(owner, attribute, watched)
