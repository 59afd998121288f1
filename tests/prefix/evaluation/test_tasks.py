"""Banks are not about two languages: more columns, rows that lack some, labels, several references, several files."""

import csv
import itertools
import json
from pathlib import Path

import pytest
import torch
from conftest import random_model, save_random_checkpoint

import evaluate
import train
import translate
from minigpt import GPT, GPTConfig, Tokenizer, UserError
from minigpt.generate import Prompt, generate
from minigpt.scoring import likeliest_answer, log_p
from prefix.banks import Banks
from prefix.data.corpus import load
from prefix.data.rows import columns_for
from prefix.data.splits import split_of
from prefix.evaluation import compare as evaluation
from prefix.evaluation import metrics
from prefix.init import random_banks
from prefix.translation import translate as translate_texts

CONFIG = GPTConfig(vocab_size=61, n_positions=48, n_embd=24, n_layer=2, n_head=3)
WORDS = [a + b for a in "blmnrst" for b in ("a", "e", "i", "o")]
SEEN = set()
TRAIN = ["--steps", "2", "--batch-size", "6", "--prefix-len", "2", "--device", "cpu", "--dtype", "float32"]


@pytest.fixture
def model():
    return random_model(CONFIG)


def sentence(split=None):
    """A new one, of this split."""
    while True:
        text = " ".join(WORDS[i] for i in torch.randint(len(WORDS), (5,)))
        if text not in SEEN and split in (None, split_of(text)):
            SEEN.add(text)
            return text


def write(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the checkpoints `base` and `other`."""
    place = tmp_path_factory.mktemp("place")
    for name in ("base", "other"):
        save_random_checkpoint(place / name, n_positions=100)
    return place


@pytest.fixture
def trained(run, place, tmp_path, monkeypatch):
    """A function: the name of a run, its data and further options -> the run's folder. All is in an empty folder."""
    monkeypatch.setenv("MINIGPT_HOME", str(place / "home"))
    monkeypatch.chdir(tmp_path)

    def trained(name, table, *options, base="base"):
        arguments = ["--model", place / base, "--data", table, "--out", name, *TRAIN, *options]
        code, _, err = run(train, *arguments)
        assert code == 0, err
        return Path(name)

    return trained


def banks_of(folder):
    return Banks.read(folder / "prefix.safetensors")


@pytest.fixture
def evaluated(run):
    """A function: options -> (what --json wrote, standard output, standard error)."""

    def evaluated(*options):
        code, out, err = run(evaluate, "--json", "result.json", "--device", "cpu", *options)
        assert code == 0, err
        return json.loads(Path("result.json").read_text(encoding="utf-8")), out, err

    return evaluated


# More than two columns


LACKING = [(0, 1, 2), (0, 1), (1, 2), (0, 2)]  # the columns that a row has


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_three_columns_train_three_banks_in_six_directions_and_rows_may_lack_one(trained, kind):
    names, rows = ["en", "fr", "de"], []
    for split, has in itertools.product(["train"] * 3 + ["validation"], LACKING):
        first = sentence(split)
        texts = [first, *(sentence() for _ in has[1:])]
        rows.append({names[column]: text for column, text in zip(has, texts)})
    if kind == "csv":
        table = write("table.csv", [names, *([row.get(name, "") for name in names] for row in rows)])
    else:
        table = Path("table.jsonl")
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    banks = banks_of(trained("run", table, "--columns", *names, "--init", "random"))
    assert banks.names == names
    start = random_banks(GPTConfig(n_embd=32, n_layer=2, n_head=2), names, 2, seed=0)
    for learned, first in zip(banks.parameters(), start.parameters()):
        assert (learned != first).any(dim=(1, 3)).all()  # every slot of every layer has moved
    corpus = load([table], names, Tokenizer.from_pretrained("demo"))
    found = [tuple(example) for example in corpus.examples("train").tolist()]
    six = list(itertools.permutations(range(3), 2))
    assert found == [(row, s, t) for row, has in enumerate(LACKING * 3) for s, t in six if {s, t} <= {*has}]
    assert {(s, t) for _, s, t in found} == {*six}


@pytest.fixture
def three(trained):
    """A run on a table of three columns, in which each column's sentence alone would fall into another split."""
    rows = []
    for split in ["train"] * 6 + ["validation"] * 2 + ["test"] * 5:
        other = {"train": "test", "test": "train", "validation": "validation"}[split]
        rows.append([sentence(split), sentence(other), sentence(other)])
    return trained("three", write("three.csv", [["en", "fr", "de"], *rows]), "--columns", "en", "fr", "de"), rows


def test_some_columns_are_evaluated_on_the_sentences_that_training_held_out(three, evaluated):
    folder, rows = three
    result, _, _ = evaluated("--prefix", folder, "--columns", "de", "fr", "--draws", 0)
    assert [(report["source"], report["target"]) for report in result["directions"]] == [("de", "fr"), ("fr", "de")]
    assert result["directions"][0]["sources"] == [row[2] for row in rows[-5:]]
    result, _, _ = evaluated("--prefix", folder, "--from", "fr", "--draws", 0)
    assert [(report["source"], report["target"]) for report in result["directions"]] == [("fr", "en"), ("fr", "de")]
    result, _, _ = evaluated("--prefix", folder, "--from", "fr", "--to", "de", "--split", "all", "--draws", 0)
    assert [report["sources"] for report in result["directions"]] == [[row[1] for row in rows]]


def test_a_direction_that_the_head_of_a_file_lacks_is_sought_in_all_of_it(three, evaluated, monkeypatch):
    monkeypatch.setattr(evaluation, "rows_to_read", lambda split, limit: 4)
    folder, _ = three
    rows = [[sentence("test"), sentence(), ""] for _ in range(6)]
    rows += [[sentence("test"), "", sentence()] for _ in range(3)]
    table = write("sparse.csv", [["en", "fr", "de"], *rows])
    options = ["--prefix", folder, "--data", table, "--limit", 2, "--draws", 0]
    result, _, _ = evaluated(*options, "--from", "fr", "--to", "en")
    assert {*result["directions"][0]["sources"]} < {row[1] for row in rows[:4]}  # there, the head is enough
    result, _, _ = evaluated(*options, "--from", "de")
    (report,) = result["directions"]
    assert report["target"] == "en" and len(report["sources"]) == 2
    assert {*report["sources"]} < {row[2] for row in rows[6:]}
    result, _, _ = evaluated(*options)
    ends = [(report["source"], report["target"], report["sentences"]) for report in result["directions"]]
    assert ends == [("fr", "en", 2), ("de", "en", 2), ("en", "fr", 2), ("en", "de", 2)]


def test_a_file_may_lack_a_column_that_has_a_bank(three, evaluated):
    folder, rows = three
    table = write("two.csv", [["de", "fr"], *(row[:0:-1] for row in rows)])
    result, _, _ = evaluated("--prefix", folder, "--data", table, "--split", "train", "--draws", 0)
    assert [report["sources"] for report in result["directions"]] == [[row[i] for row in rows[-5:]] for i in (2, 1)]


@pytest.mark.parametrize(
    "files, columns, expected",
    [
        (["x.de", "x.en"], None, (["x.en", "x.de"], ["en", "de"])),
        (["a.txt", "b.txt"], ["de", "en"], (["b.txt", "a.txt"], ["en", "de"])),
        (["a.txt", "b.txt", "c.txt"], None, (["a.txt", "b.txt", "c.txt"], ["en", "fr", "de"])),
        (["x.en", "x.fr", "x.de"], ["de", "fr"], (["x.en", "x.fr", "x.de"], ["en", "fr", "de"])),
        (["t.csv"], None, (["t.csv"], ["en", "fr"])),
        (["t.csv"], ["fr", "en"], (["t.csv"], ["en", "fr"])),
        (["t.csv"], ["fr", "de"], "t.csv: has no column 'de'"),
        (["none.csv"], None, "none.csv: has no column 'en'"),
        (["a.txt", "b.txt"], None, "2 text files, but 3 columns"),
        (["x.de", "x.en"], ["fr"], "has no column 'fr'"),
    ],
)
def test_columns_are_read_in_the_order_that_they_had_in_training(tmp_path, monkeypatch, files, columns, expected):
    monkeypatch.chdir(tmp_path)
    for file in files:
        Path(file).write_text("fr,x,en\na,b,c\n" if file == "t.csv" else "x,y\na,b\n")
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            columns_for(files, ["en", "fr", "de"], columns)
    else:
        paths, names = columns_for(files, ["en", "fr", "de"], columns)
        assert ([str(path) for path in paths], names) == expected


# Labels


@torch.no_grad()
def written_out(model, prompt, answer, banks):
    """log p of an answer, token by token, without packing."""
    total = 0.0
    for i in range(len(answer)):
        ids = torch.tensor([prompt.ids + answer[:i]])
        total += float(banks.logits(model, ids, open=["a", "b"])[0, -1].log_softmax(-1)[answer[i]])
    return total


def test_an_answer_scores_the_probability_of_its_tokens_and_of_its_end(model):
    banks = random_banks(CONFIG, ["a", "b"], 3)
    prompts = [Prompt(torch.randint(60, (n,)).tolist(), 5, [3] * n) for n in (4, 1, 7)]
    answers = [torch.randint(60, (n,)).tolist() + [60] for n in (1, 3, 2, 0)]
    pairs = list(itertools.product(prompts, answers))
    expected = [written_out(model, prompt, answer, banks) for prompt, answer in pairs]
    torch.testing.assert_close(log_p(model, pairs, banks.slots()), torch.tensor(expected), rtol=1e-4, atol=1e-4)
    best = [max(answers, key=lambda a: written_out(model, prompt, a, banks)) for prompt in prompts]
    for batch_size in (1, 3, 32):
        chosen = likeliest_answer(model, prompts, answers, banks.slots(), batch_size=batch_size)
        assert [result.ids for result in chosen] == [answer[:-1] for answer in best]
        assert all(result.finished for result in chosen)


def test_the_probabilities_of_all_answers_of_one_token_sum_to_one(model):
    prompt = Prompt([1, 2, 3], 5)
    scores = log_p(model, [(prompt, [token]) for token in range(61)])
    torch.testing.assert_close(scores.exp().sum(), torch.tensor(1.0))


LABELS = ["joy", "anger", "fear of tests"]


@pytest.fixture
def classifier(trained):
    """A run on tweets and their labels, and its rows."""
    rows = []
    for split, label in itertools.product(["train"] * 4 + ["validation"] + ["test"] * 3, LABELS):
        rows.append([sentence(split), label])
    return trained("tweets", write("tweets.csv", [["tweet", "label"], *rows])), rows


def test_a_classifier_answers_with_labels_seen_in_training_and_its_accuracy_is_the_exact_matches(classifier, evaluated):
    folder, rows = classifier
    options = ["--prefix", folder, "--from", "tweet", "--to", "label", "--shots", 1, "--draws", 2]
    result, out, _ = evaluated(*options, "--choices")
    (report,) = result["directions"]
    assert report["sources"] == [row[0] for row in rows[-9:]] and report["references"] == [row[1] for row in rows[-9:]]
    few = report["few_shot"]
    for outputs, score in [(report["outputs"], report["prefix"]), *zip(few["outputs"], few["draws"])]:
        assert set(outputs) <= set(LABELS)
        assert score["exact"] == pytest.approx(100 * sum(map(str.__eq__, outputs, report["references"])) / 9)
        assert (score["empty"], score["cut"]) == (0, 0)
    assert "likeliest choice" in out and out.splitlines()[1].split() == ["exact", "%", "empty", "cut", "seconds"]
    assert f"median draw: {few['difference']['delta']:+.2f} exact %" in out and "BLEU" not in out and "chrF" not in out
    accuracies = [draw["exact"] for draw in few["draws"]]
    better = max(accuracies)  # of two
    assert few["difference"]["delta"] == pytest.approx(report["prefix"]["exact"] - better)
    assert accuracies[few["difference"]["draw"]] == better
    free, out, _ = evaluated(*options)
    assert not set(free["directions"][0]["outputs"]) <= set(LABELS) and out.splitlines()[1].split()[0] == "BLEU"


def test_the_labels_of_training_are_those_of_the_whole_file(classifier, evaluated, monkeypatch):
    monkeypatch.setattr(evaluation, "rows_to_read", lambda split, limit: 6)
    folder, _ = classifier
    splits = ["train"] * 4 + ["test"] * 2
    rows = [[sentence(split), label] for label in ("joy", "anger") for split in splits]
    table, chosen, likeliest_answer = write("sorted.csv", [["tweet", "label"], *rows]), [], evaluation.translate
    translate = lambda *args, **options: chosen.append(options["choices"]) or likeliest_answer(*args, **options)
    monkeypatch.setattr(evaluation, "translate", translate)
    options = ["--prefix", folder, "--data", table, "--from", "tweet", "--to", "label", "--limit", 2, "--draws", 0]
    evaluated(*options, "--choices")
    assert chosen == [["anger", "joy"]]


def test_choices_that_are_named_are_the_only_answers(classifier, evaluated, run):
    folder, rows = classifier
    options = ["--prefix", folder, "--from", "tweet", "--to", "label", "--choices", "joy", "worry about it"]
    result, _, _ = evaluated(*options, "--draws", 0)
    outputs = result["directions"][0]["outputs"]
    assert set(outputs) <= {"joy", "worry about it"}
    texts = [row[0] for row in rows[-9:]]
    code, out, _ = run(translate, *texts, *options)
    assert (code, out.splitlines()) == (0, outputs)


def test_of_all_rows_none_is_a_shot_or_a_choice_but_what_the_prefix_was_trained_on(classifier, evaluated):
    folder, rows = classifier
    table = write("new.csv", [["tweet", "label"], *([sentence(), "unheard of"] for _ in range(4))])
    options = ["--from", "tweet", "--to", "label", "--shots", 2, "--draws", 1, "--choices", "--split", "all"]
    result, _, err = evaluated("--prefix", folder, "--data", table, *options)
    (report,) = result["directions"]
    assert report["sentences"] == 4 and set(report["outputs"]) <= set(LABELS) and "trained on" not in err
    shots = [line.split(": ", 1)[1] for line in report["few_shot"]["prompts"][0].splitlines()]
    assert len(shots) == 4 and {*zip(shots[::2], shots[1::2])} <= {tuple(row) for row in rows[:12]}
    _, _, err = evaluated("--prefix", folder, "--split", "all", "--draws", 0)
    assert "among these sentences are those that the prefix was trained on" in err


def test_a_text_without_room_for_the_longest_choice_is_a_fault(place):
    model, tokenizer = GPT.from_pretrained(place / "base"), Tokenizer.from_pretrained(place / "base")
    banks, choices = random_banks(model.config, ["a", "b"], 2), ["x", "one two three four five six seven"]
    longest = max(len(tokenizer.encode(choice)) for choice in choices)
    text = "x"
    while len(tokenizer.encode(text)) + 1 + longest < 100:
        text += " x"
    fits, does_not = translate_texts(model, tokenizer, banks, [text, text + " x"], "a", "b", choices=choices)
    assert fits.text in choices and not fits.fault
    assert does_not.text == "" and "no room to answer" in does_not.fault


@pytest.mark.parametrize(
    "script, options, words",
    [
        (evaluate, ["--choices", "joy"], "--choices goes with --to"),
        (evaluate, ["--to", "label", "--beam", 2, "--choices", "joy"], "without --beam"),
        (evaluate, ["--to", "label", "--choices", " "], "an answer is empty"),
        (evaluate, ["--to", "mood"], "no bank 'mood'"),
        (evaluate, ["--columns", "tweet"], "--columns tweet: name two or more, each of them once"),
        (evaluate, ["--columns", "tweet", "tweet"], "--columns tweet tweet: name two or more"),
        (evaluate, ["--columns", "tweet", "label", "tweet"], "--columns tweet label tweet: name two or more"),
        (evaluate, ["--from", "label", "--to", "label"], "--from label --to label: no direction"),
        (evaluate, ["--to", "tweet", "--choices"], "--choices: 12 different texts in column 'tweet', not 1 to 5"),
        (translate, ["x", "--beam", 2, "--choices", "joy"], "--choices does not go with --beam"),
        (translate, ["x", "--top-k", 2, "--choices", "joy"], "--choices does not go with --beam"),
        (translate, ["x", "--choices", ""], "an answer is empty"),
    ],
    ids=lambda value: " ".join(map(str, value))[:30] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_exit_code_2(classifier, run, monkeypatch, script, options, words):
    monkeypatch.setattr(evaluation, "MAX_CHOICES", 5)
    code, out, err = run(script, "--prefix", classifier[0], *options)
    assert (code, out, err.count("\n")) == (2, "", 1) and words in err, err


# Several references


def test_rows_with_the_same_source_can_be_one_sentence_with_several_references(trained, evaluated):
    sources = [sentence("test") for _ in range(3)]
    rows = [[sentence("train"), sentence()] for _ in range(4)] + [[sentence("validation"), sentence()]]
    rows += [[source, f"{source} {i}"] for i in range(3) for source in sources[: 3 - i]]  # 3, 2 and 1 references
    folder = trained("mr", write("mr.csv", [["mr", "text"], *rows]))
    options = ["--prefix", folder, "--from", "mr", "--draws", 0]
    one, _, _ = evaluated(*options)
    assert one["directions"][0]["sentences"] == 6 and one["signatures"]["bleu"].startswith("nrefs:1|")
    result, out, _ = evaluated(*options, "--references", "all", "--examples", 1)
    (report,) = result["directions"]
    assert report["sources"] == sources
    assert report["references"] == [[f"{s} {i}" for i in range(n)] for s, n in zip(sources, (3, 2, 1))]
    assert report["prefix"]["bleu"] == metrics.corpus_bleu(report["outputs"], report["references"])
    assert result["signatures"]["bleu"].startswith("nrefs:var|") and "nrefs:var|" in out
    assert all(reference in out for reference in report["references"][0])
    (two,) = evaluated(*options, "--references", "all", "--limit", 2)[0]["directions"]
    assert two["sentences"] == 2
    assert [len(refs) for refs in two["references"]] == [3 - sources.index(text) for text in two["sources"]]


def test_an_exact_match_is_any_of_the_references():
    assert metrics.exact_match(["a b", "b", "c", ""], [["x", "a b"], "b", ["c."], "c"]) == 50
    assert metrics.exact_match([], []) == 0


# Several prefix files


def test_a_batch_may_mix_banks_of_several_files_and_each_sentence_is_what_it_would_be_alone(model):
    parts = [random_banks(CONFIG, names, n, seed=n) for names, n in ((["en", "fr"], 4), (["de"], 2), (["es", "it"], 5))]
    whole = Banks.joined([(f"{i}.safetensors", part) for i, part in enumerate(parts)])
    assert whole.names == ["en", "fr", "de", "es", "it"] and whole.prefix_len == [4, 4, 2, 5, 5]
    prompts, expected = [], []
    for source, target in [("fr", "en"), ("it", "es"), ("en", "fr"), ("de", "de"), ("es", "it")] * 2:
        part = next(part for part in parts if source in part.names)
        ids = torch.randint(60, (int(torch.randint(2, 9, ())),)).tolist()
        masks = lambda banks: [banks.mask([source])] * (len(ids) - 1) + [banks.mask([source, target])]
        prompts.append(Prompt(ids, 8, masks(whole)))
        expected += generate(model, [Prompt(ids, 8, masks(part))], [60], part.slots())
    for batch_size in (1, 4, 32):
        assert generate(model, prompts, [60], whole.slots(), batch_size=batch_size) == expected
    mixed = Prompt([1, 2, 3], 8, [whole.mask(["it"])] * 2 + [whole.mask(["it", "de"])])  # of two files
    assert generate(model, [mixed, *prompts], [60], whole.slots())[1:] == expected


def test_both_commands_take_the_banks_of_several_files(trained, evaluated, run):
    rows = [[sentence(split) for _ in range(4)] for split in ["train"] * 5 + ["validation"] + ["test"] * 3]
    names = ["en", "fr", "es", "it"]
    table = write("four.csv", [names, *rows])
    for name, columns in (("one", names[:2]), ("two", names[2:])):
        trained(name, table, "--columns", *columns)
    both, texts = ["--prefix", "one", "--prefix", "two"], [row[3] for row in rows]
    for source, target, alone in (("fr", "en", "one"), ("it", "es", "two")):
        direction = ["--from", source, "--to", target, *texts]
        assert run(translate, *both, *direction) == run(translate, "--prefix", alone, *direction)
    assert run(translate, *both, "--from", "it", "--to", "fr", *texts)[0] == 0
    result, _, _ = evaluated(*both, "--draws", 0, "--split", "all")
    assert len(result["directions"]) == 12
    alone, _, _ = evaluated("--prefix", "two", "--draws", 0, "--split", "all")
    outputs = lambda result: {(r["source"], r["target"]): r["outputs"] for r in result["directions"]}
    assert outputs(alone).items() <= outputs(result).items()


def test_files_that_do_not_go_together_are_refused_in_one_line(trained, run):
    rows = [[sentence(split) for _ in range(2)] for split in ["train"] * 4 + ["validation"]]
    tables = [write("t.csv", [["en", "fr"], *rows]), write("u.csv", [["es", "it"], *rows])]
    for name, table, *options in (
        ("one", tables[0]),
        ("again", tables[0]),
        ("shifted", tables[1], "--position-offset", "prefix"),
    ):
        trained(name, table, *options)
    trained("stranger", tables[1], base="other")
    for name, *words in (
        ("one", "bank 'en' is there twice, in one/prefix.safetensors and in one/prefix.safetensors"),
        ("again", "bank 'en' is there twice, in one/prefix.safetensors and in again/prefix.safetensors"),
        ("shifted", "same position: 2 in shifted/prefix.safetensors, 0 in one/prefix.safetensors"),
        ("stranger", "stranger/prefix.safetensors was trained on", "this model is"),
    ):
        for script, text in ((translate, ["Bonjour"]), (evaluate, [])):
            code, out, err = run(script, "--prefix", "one", "--prefix", name, *text)
            assert (code, out, err.count("\n")) == (2, "", 1) and all(word in err for word in words)


def test_files_trained_on_different_text_need_text_to_be_evaluated_on(trained, run, evaluated):
    rows = [[sentence(split) for _ in range(2)] for split in ["train"] * 4 + ["validation"] + ["test"] * 2]
    for name, columns in (("one", ["en", "fr"]), ("two", ["es", "it"])):
        trained(name, write(f"{name}.csv", [columns, *rows]))
    both = ["--prefix", "one", "--prefix", "two"]
    code, _, err = run(evaluate, *both)
    assert code == 2 and "two/prefix.safetensors was trained on other text" in err and "--data" in err
    result, _, _ = evaluated(*both, "--data", "two.csv", "--draws", 0)
    assert {(r["source"], r["target"]) for r in result["directions"]} == {("es", "it"), ("it", "es")}
