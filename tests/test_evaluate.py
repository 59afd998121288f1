"""evaluate.py: prefix and k-shot on the sentences that training held out, scored as the options ask."""

import csv
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import CONTEXT, assert_refused, random_rows, random_text, save_random_checkpoint, write_table

import evaluate
import translate
from minigpt import GPT, Tokenizer
from prefix.banks import Banks
from prefix.data.splits import split_of
from prefix.evaluation import compare, metrics
from prefix.evaluation.attention_maps import look_at
from prefix.evaluation.metrics import METRICS
from prefix.init import random_banks
from prefix.translation import Decoding, Translation
from prefix.translation import translate as translate_texts

LABELS = ["joy", "anger", "fear of tests"]
pytestmark = pytest.mark.usefixtures("workplace")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the checkpoint `base`, tables, and a prefix file of random slots for each of them."""
    place = tmp_path_factory.mktemp("place")
    model = save_random_checkpoint(place / "base", CONTEXT)
    splits = [("train", 12), ("validation", 2), ("test", 5)]
    for names in (["en", "fr"], ["en", "fr", "de"], ["tweet", "label"], ["mr", "text"]):
        rows = [row for split, n in splits for row in random_rows(split, n, len(names))]
        if "label" in names:
            rows = [[text, LABELS[i % 3 if i < 14 else i % 2]] for i, (text, _) in enumerate(rows)]
        if "mr" in names:  # three test sentences of 3, 2 and 1 references
            rows = rows[:-2] + [[rows[-i][0], f"again {j}"] for i, j in ((5, 1), (4, 1), (5, 2))]
        table = write_table(place / f"{'-'.join(names)}.csv", [names, *rows])
        banks = random_banks(model.config, names, prefix_len=3, seed=1)
        banks.training_record = {"model": str(place / "base"), "data": [str(table)], "columns": names, "init": "random"}
        banks.training_record["settings"] = {"lr": 0.03, "steps": 7, "seed": 5}
        banks.save(place / f"{'-'.join(names)}.safetensors", model)
    return place


def rows_of(place, name, n=5):
    """The last n rows of a table: those of its test split."""
    with open(place / f"{name}.csv", encoding="utf-8") as file:
        return list(csv.reader(file))[1:][-n:]


@pytest.fixture
def evaluated(run, place):
    """A function: a table's name, options -> (standard output, standard error, the directions that --json wrote)."""

    def evaluated(name, *options):
        arguments = ["--prefix", place / f"{name}.safetensors", "--limit", 5, "--shots", 1, "--draws", 2]
        code, out, err = run(evaluate, *arguments, "--json", "result.json", *options)
        assert code == 0, err
        return out, err, json.loads(Path("result.json").read_text(encoding="utf-8"))["directions"]

    return evaluated


def loaded(place, name="en-fr"):
    model = GPT.from_pretrained(place / "base")
    return model, Tokenizer.from_pretrained(place / "base"), Banks.load(place / f"{name}.safetensors", model)


def ends(directions):
    return [(direction["source"], direction["target"]) for direction in directions]


def test_an_evaluation_scores_the_outputs_that_it_keeps_in_both_directions(place, evaluated):
    names = ["chrf", "bleu", "rouge-stem", "exact", "sentence_bleu"]
    out, err, directions = evaluated("en-fr", "--metrics", *names, "--examples", 1)
    for direction, (source, target) in zip(directions, ((1, 0), (0, 1)), strict=True):
        rows, references = rows_of(place, "en-fr"), direction["references"]
        assert direction["sources"] == [row[source] for row in rows]
        assert references == [[row[target]] for row in rows]
        for system in [direction["prefix"], *direction["draws"]]:
            scored = {metric.label: metric(system["outputs"], references) for metric in metrics.named(names)}
            assert system["scores"] == scored and [*scored] == [*direction["signatures"]]
            assert system["counts"]["empty"] == system["outputs"].count("")
        scores = [draw["scores"]["chrF2"] for draw in direction["draws"]]
        assert scores[direction["median"]] == max(scores)
        delta = direction["prefix"]["scores"]["BLEU"] - direction["draws"][direction["median"]]["scores"]["BLEU"]
        assert direction["difference"]["BLEU"]["delta"] == pytest.approx(delta)
        assert all(f"{label} {signature}" in out for label, signature in direction["signatures"].items())
    assert ends(directions) == [("fr", "en"), ("en", "fr")] and "fr -> en, 5 sentences" in out and "%|" not in err


@pytest.mark.parametrize("right, median, shown", [((4, 1, 3), 2, "53.33 ± 24.9"), ((4, 1, 3, 2), 2, "50.00 ± 22.4")])
def test_the_prefix_is_compared_with_the_median_draw_or_the_better_of_two(place, evaluated, monkeypatch, right, median, shown):
    draws, references = iter(right), [row[0] for row in rows_of(place, "en-fr")]

    def some_right(*_):
        n = next(draws)
        return [Translation(text if i < n else "") for i, text in enumerate(references)]

    monkeypatch.setattr(compare, "few_shot", some_right)
    out, _, (direction,) = evaluated("en-fr", "--from", "fr", "--draws", len(right), "--metrics", "exact")
    assert [draw["scores"]["exact %"] for draw in direction["draws"]] == [20 * n for n in right]
    assert [draw["counts"]["empty"] for draw in direction["draws"]] == [5 - n for n in right]
    assert direction["median"] == median and shown in out
    delta = direction["prefix"]["scores"]["exact %"] - 20 * right[median]
    assert direction["difference"]["exact %"]["delta"] == pytest.approx(delta)


def test_an_evaluation_translates_as_translate_does_and_is_repeatable(place, evaluated, run):
    less = ["--from", "fr", "--draws", 1]
    once, again = evaluated("en-fr", *less)[2], evaluated("en-fr", *less, "--batch-size", 1)[2]
    for direction, other in zip(once, again):
        options = ["--prefix", place / "en-fr.safetensors", "--from", direction["source"]]
        _, out, _ = run(translate, *options, *direction["sources"])
        assert out == "".join(text + "\n" for text in direction["prefix"]["outputs"])
        for result in (direction, other):
            for system in [result["prefix"], *result["draws"]]:
                del system["counts"]["seconds"]
            del result["table"]
        assert direction == other


def test_each_draw_prompts_with_other_training_pairs_that_are_not_evaluated_in_the_form_that_suits_the_model(place, evaluated):
    training = {tuple(row) for row in rows_of(place, "en-fr", 19)[:12]}
    for direction in evaluated("en-fr", "--split", "train", "--limit", 8, "--shots", 3)[2]:
        assert direction["form"] == max(direction["form_log_p"], key=direction["form_log_p"].get)
        prompts = [draw["prompt"] for draw in direction["draws"]]
        lines = list(filter(None, prompts[0].splitlines()))
        if direction["form"] == "names":
            assert [line.split(": ")[0] for line in lines] == [direction["source"], direction["target"]] * 3
            lines = [line.split(": ", 1)[1] for line in lines]
        pairs = {(a, b) if direction["source"] == "en" else (b, a) for a, b in zip(lines[::2], lines[1::2])}
        assert prompts[0] != prompts[1] and len(pairs) == 3 and pairs <= training and len(direction["sources"]) == 8
        assert not any(source in prompt for prompt in prompts for source in direction["sources"])


def test_no_shots_have_one_draw_and_no_draws_have_none(evaluated):
    out, _, (direction,) = evaluated("en-fr", "--from", "fr", "--shots", 0)
    assert [draw["prompt"] for draw in direction["draws"]] == [""] and "±" not in out
    out, _, (direction,) = evaluated("en-fr", "--from", "fr", "--draws", 0)
    assert direction["draws"] == [] and "shot " not in out


def test_columns_in_any_order_are_evaluated_on_the_sentences_that_training_held_out(place, evaluated):
    rows = rows_of(place, "en-fr-de")
    _, _, directions = evaluated("en-fr-de", "--draws", 0, "--columns", "de", "fr")
    assert ends(directions) == [("de", "fr"), ("fr", "de")] and directions[0]["sources"] == [row[2] for row in rows]
    assert len(evaluated("en-fr-de", "--limit", 1, "--draws", 0)[2]) == 6
    assert ends(evaluated("en-fr-de", "--from", "fr", "--draws", 0)[2]) == [("fr", "en"), ("fr", "de")]
    table = write_table("two.csv", [["de", "fr"], *(row[:0:-1] for row in rows)])
    _, _, directions = evaluated("en-fr-de", "--data", table, "--split", "all", "--draws", 0)
    assert [direction["sources"] for direction in directions] == [[row[i] for row in rows] for i in (2, 1)]


def test_the_rows_that_training_read_are_evaluated_and_of_other_data_all(place, evaluated):
    rows = rows_of(place, "en-fr")
    model, banks = GPT.from_pretrained(place / "base"), Banks.load(place / "en-fr.safetensors")
    banks.training_record["limit"] = 17  # of 19 rows
    banks.save(place / "limited.safetensors", model)
    other = shutil.copy(place / "en-fr.csv", "other.csv")
    for options, n in ([], 3), (["--data", place / "en-fr.csv"], 3), (["--data", other], 5):
        (direction,) = evaluated("limited", "--from", "fr", "--draws", 0, *options)[2]
        assert direction["sources"] == [row[1] for row in rows[:n]]


def test_rows_with_the_same_source_can_be_one_sentence_with_several_references(place, evaluated):
    rows = rows_of(place, "mr-text", 6)
    one = evaluated("mr-text", "--from", "mr", "--limit", 9)[2][0]
    assert one["sources"] == [row[0] for row in rows] and one["signatures"]["BLEU"].startswith("nrefs:1|")
    _, _, (direction,) = evaluated("mr-text", "--from", "mr", "--references", "all")
    together = {source: [text for other, text in rows if other == source] for source, _ in rows}
    assert dict(zip(direction["sources"], direction["references"])) == together
    assert sorted(map(len, direction["references"])) == [1, 2, 3]
    score = METRICS["bleu"](direction["prefix"]["outputs"], direction["references"])
    assert direction["prefix"]["scores"]["BLEU"] == score
    assert direction["signatures"]["BLEU"].startswith("nrefs:var|")


def test_other_data_another_split_beams_and_lengths_are_what_the_options_ask_for(place, evaluated):
    rows = [(fr, en) for en, fr in random_rows("validation", 3)]
    options = ["--data", write_table("mine.csv", [("fr", "en"), *rows]), "--split", "validation", "--draws", 0]
    _, _, (direction, _) = evaluated("en-fr", *options, "--beam", 2, "--max-new-tokens", 5)
    outputs = translate_texts(*loaded(place), [row[0] for row in rows], ("fr", "en"), Decoding(max_new=5, beams=2))
    assert direction["prefix"]["outputs"] == [output.text for output in outputs]


def test_a_source_is_cut_at_its_end_only_if_asked_and_the_cuts_are_counted(place, evaluated, monkeypatch):
    asked = []
    monkeypatch.setattr(compare, "translate", lambda *all: asked.extend(all[3]) or translate_texts(*all))
    tokenizer = Tokenizer.from_pretrained(place / "base")
    rows = random_rows("train", 14) + random_rows("test", 3)
    while split_of(rows[-1][0]) != "test" or len(rows[-1][0]) < 1000:
        rows[-1][0] = random_text() + " and so on" * 100
    options = ["--data", write_table("long.csv", [("en", "fr"), *rows]), "--from", "en"]
    _, err, (direction,) = evaluated("en-fr", *options)
    assert len(direction["sources"]) == 2 and "too long" in err and "were cut" not in err
    out, err, (direction,) = evaluated("en-fr", *options, "--truncate-source", "--max-new-tokens", 20)
    assert direction["sources"] == [row[0] for row in rows[-3:]]
    assert "prefix: 1 of 3 sources were cut at their end to fit the context" in err and "sources cut" in out
    assert [system["counts"]["sources cut"] for system in [direction["prefix"], *direction["draws"]]] == [1, 1, 1]
    assert asked[-1] == tokenizer.decode(tokenizer.encode(rows[-1][0])[: CONTEXT - 20 - 1])


def test_a_source_that_would_be_cut_to_nothing_is_an_error_and_one_that_is_divided_or_has_no_answer_is_told(place, run, evaluated):
    options = ["--prefix", place / "en-fr.safetensors", "--from", "en", "--draws", 0]
    refused = run(evaluate, *options, "--truncate-source", "--max-new-tokens", CONTEXT - 1)
    assert_refused(refused, "prefix: nothing would be left of a source: lower --max-new-tokens")
    tokenizer = Tokenizer.from_pretrained(place / "base")
    of_length = lambda n: tokenizer.decode(tokenizer.encode("go on " * n)[:n])
    half, long = of_length(CONTEXT // 5), of_length(7 * CONTEXT // 10)  # a long one leaves no room for a fair answer
    table = write_table("two.csv", [("en", "fr"), (f"{half}. {half}.", "a"), (long, "b"), ("go", "c")])
    out, err, (direction,) = evaluated("en-fr", "--data", table, "--split", "all", "--from", "en", "--draws", 0)
    assert direction["prefix"]["counts"]["sources divided"] == 1 and "sources divided" in out, err
    assert "prefix: 1 of 3 sources have no answer: " in err and "leave no room to answer" in err


def test_what_is_written_is_there_also_where_nobody_reads_the_rest(place, run, monkeypatch):
    monkeypatch.setattr(evaluate, "printable", lambda text: 1 / 0)
    options = ["--prefix", place / "en-fr.safetensors", "--from", "en", "--draws", 0]
    with pytest.raises(ZeroDivisionError):
        run(evaluate, *options, "--json", "result.json", "--hypotheses", "all.tsv")
    assert Path("result.json").exists() and Path("all.tsv").exists()


def test_the_text_of_the_training_has_the_columns_of_the_training(place, run):
    banks, rows = loaded(place)[2], rows_of(place, "en-fr", 19)
    for name, lines in zip(("a.txt", "b.txt"), zip(*rows)):
        Path(name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    banks.training_record["data"] = [str(Path(name).resolve()) for name in ("a.txt", "b.txt")]
    banks.save("p.safetensors", GPT.from_pretrained(place / "base"))
    code, _, err = run(evaluate, "--prefix", "p.safetensors", "--draws", 0, "--json", "result.json")
    first = json.loads(Path("result.json").read_text(encoding="utf-8"))["directions"][0]
    assert code == 0 and (first["source"], first["sources"]) == ("fr", [fr for _, fr in rows[-5:]]), err


def test_columns_that_training_named_keep_their_places(place, evaluated):
    """In a table without a header --columns gives new names to what is there."""
    model, _, banks = loaded(place, "en-fr-de")
    rows = rows_of(place, "en-fr-de", 19)
    banks.training_record["data"] = [str(write_table("bare.csv", [["A first sentence.", "Une phrase.", "Ein Satz."], *rows]))]
    banks.save(place / "bare.safetensors", model)
    _, _, (direction,) = evaluated("bare", "--columns", "en", "de", "--to", "de", "--draws", 0)
    assert direction["references"] == [[row[2]] for row in rows[-5:]]


def test_prefixes_that_held_out_other_sentences_are_evaluated_one_by_one(place, run):
    model = GPT.from_pretrained(place / "base")
    for names in (["en", "fr"], ["de", "it"]):
        banks = random_banks(model.config, names, 3)
        banks.training_record = {"model": str(place / "base"), "data": [str(place / "en-fr-de.csv")], "columns": names}
        banks.save(f"{names[0]}.safetensors", model)
    assert_refused(run(evaluate, "--prefix", "en.safetensors", "--prefix", "de.safetensors"), "held out other sentences")


def test_of_all_rows_none_is_an_example_but_what_the_prefix_was_trained_on(place, evaluated):
    table = write_table("new.csv", [["tweet", "label"], *([random_text(), "unheard of"] for _ in range(4))])
    options = ["--from", "tweet", "--to", "label", "--choices", "--split", "all"]
    _, _, (direction,) = evaluated("tweet-label", "--data", table, *options)
    assert len(direction["sources"]) == 4 and {*direction["prefix"]["outputs"]} <= {*LABELS}
    assert any(row[0] in direction["draws"][0]["prompt"] for row in rows_of(place, "tweet-label", 19)[:12])


def test_a_classifier_answers_with_labels_of_training_and_is_scored_by_them(evaluated):
    out, _, (direction,) = evaluated("tweet-label", "--from", "tweet", "--to", "label", "--choices")
    references = [refs[0] for refs in direction["references"]]
    assert direction["choices"] == sorted(LABELS) == direction["classes"]
    for system in [direction["prefix"], *direction["draws"]]:
        right = sum(map(str.__eq__, system["outputs"], references))
        assert {*system["outputs"]} <= {*LABELS} and system["counts"]["empty"] == system["counts"]["truncated"] == 0
        assert [*system["scores"]] == ["accuracy", "macro-F1"] and system["scores"]["accuracy"] == pytest.approx(20 * right)
        assert sum(system["confusion"][i][i] for i in range(3)) == right and sum(map(sum, system["confusion"])) == 5
    assert f"{direction['difference']['accuracy']['delta']:+.2f} accuracy" in out and "BLEU" not in out
    assert "likeliest choice" in out and "would have accuracy 60.00" in out


def test_several_tasks_are_scored_in_one_run_in_the_directions_that_were_trained_each_by_its_own_metric(place, run):
    banks = random_banks(GPT.from_pretrained(place / "base").config, ["tweet", "label", "article", "summary"], 3, seed=2)
    tweets = [[text, LABELS[i % 2], "", ""] for i, (text, _) in enumerate(random_rows("train", 9) + random_rows("test", 4))]
    rows = tweets + [["", "", *pair] for pair in random_rows("train", 9) + random_rows("test", 6)]
    table = write_table("tasks.csv", [banks.names, *rows])
    banks.training_record = {"model": str(place / "base"), "data": [str(table)], "columns": banks.names}
    banks.training_record["pairs"] = ["tweet:label", "article:summary"]
    banks.save("tasks.safetensors", GPT.from_pretrained(place / "base"))
    options = ["--prefix", "tasks.safetensors", "--shots", 1, "--draws", 1, "--json", "tasks.json"]
    code, out, err = run(evaluate, *options, "--metrics", "label=accuracy", "summary=rouge", "--hypotheses", "tasks.tsv")
    assert code == 0, err
    labels, summaries = json.loads(Path("tasks.json").read_text())["directions"]
    assert ends([labels, summaries]) == [("tweet", "label"), ("article", "summary")]
    assert [*labels["signatures"]] == ["accuracy", "macro-F1"] and {*labels["prefix"]["outputs"]} <= {*LABELS[:2]}
    assert [*summaries["signatures"]] == ["ROUGE-1", "ROUGE-2", "ROUGE-L"] and summaries["choices"] is None
    assert [len(one["sources"]) for one in (labels, summaries)] == [4, 6]
    assert len(Path("tasks.tsv").read_text().splitlines()) == 11
    assert all(f"{label} {text}" in out for one in (labels, summaries) for label, text in one["signatures"].items())
    assert run(evaluate, *options, "--draws", 0, "--from", "label")[0] == 0  # which was not trained
    assert ends(json.loads(Path("tasks.json").read_text())["directions"]) == [("label", "tweet")]


def test_choices_that_are_named_are_the_only_answers(place, evaluated, run):
    options = ["--from", "tweet", "--to", "label", "--choices", "joy", " worry about it", "worry\nabout it"]
    _, _, (direction,) = evaluated("tweet-label", "--draws", 0, *options)
    outputs = direction["prefix"]["outputs"]
    assert direction["choices"] == ["joy", "worry about it"] and {*outputs} <= {*direction["choices"]} and "anger" in direction["classes"]  # it is among the references
    code, out, _ = run(translate, *direction["sources"], "--prefix", place / "tweet-label.safetensors", *options)
    assert (code, out.splitlines()) == (0, outputs)


def test_the_page_the_table_and_the_settings_are_written(place, evaluated):
    out, _, (first, _) = evaluated("en-fr", "--report", "page.html", "--hypotheses", "out.tsv", "--examples", 1)
    page, table = (Path(name).read_text(encoding="utf-8") for name in ("page.html", "out.tsv"))
    settings = json.loads(Path("result.json").read_text(encoding="utf-8"))["settings"]
    assert settings["base"] == GPT.from_pretrained(place / "base").fingerprint and settings["base"] in page
    assert (settings["torch"], settings["columns"], settings["beam"]) == (torch.__version__, ["en", "fr"], 1)
    assert settings["date"] in page and out.splitlines()[1].split() == ["prefix", "1-shot", "ratio"]
    lines = table.splitlines()
    assert len(lines) == 11 and lines[1].split("\t")[:2] == [first["sources"][0], *first["references"][0]]
    for title, rows in look_at(*loaded(place), first["sources"][0], ("fr", "en")).tables():
        assert title in page and all(f">{cell}</td>" in page for _, *cells in rows[1:] for cell in cells)


def test_on_a_terminal_each_system_has_a_bar_that_moves_by_batches_to_its_end(place, run, monkeypatch):
    arguments = ["--prefix", place / "en-fr.safetensors", "--from", "fr", "--limit", 5, "--shots", 1, "--draws", 1]
    arguments += ["--batch-size", 2]
    monkeypatch.setattr(compare, "BATCHES", 1)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    err = run(evaluate, *arguments)[2]
    assert re.search("fr -> en prefix.* 3/3 ", err) and re.search("fr -> en 1-shot.* 3/3 ", err)


@pytest.mark.parametrize("name, options, words", [
    ("en-fr", ["--shots", 12, "--limit", 1], ["12 shots of", f"context of {CONTEXT}"]),
    ("en-fr", ["--shots", 13], ["13 shots, but 12 training pairs", "--draws 0"]),
    ("en-fr", ["--json", "nowhere/result.json"], ["--json nowhere/result.json"]),
    ("en-fr", ["--report", "."], ["--report ."]),
    ("en-fr", ["--metrics", "meteor"], ["--metrics meteor", "rouge"]),
    ("en-fr", ["--metrics", "de=bleu"], ["no bank 'de'"]),
    ("en-fr", ["--data", "nothing.csv"], ["nothing.csv: No such file"]),
    ("en-fr", ["--columns", "en", "de"], ["no bank 'de'"]),
    ("en-fr", ["--limit", 0], ["--limit"]),
    ("en-fr", ["--data", "train.csv"], ["none of the 3 usable pairs", "test split"]),
    ("tweet-label", ["--choices", "joy"], ["--choices goes with --to"]),
    ("tweet-label", ["--to", "label", "--beam", 2, "--choices", "joy"], ["without --beam"]),
    ("tweet-label", ["--to", "label", "--choices", " "], ["an answer is empty"]),
    ("tweet-label", ["--columns", "tweet", "tweet"], ["no direction is left", "name two --columns"]),
    ("tweet-label", ["--from", "label", "--to", "label"], ["no direction is left between tweet and label"]),
    ("en-fr-de", ["--data", "train.csv", "--to", "de"], ["train.csv: no direction to evaluate", "en and fr"]),
    ("tweet-label", ["--to", "tweet", "--choices"], ["12 different texts in column 'tweet', not 1 to 5"]),
])  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(run, place, monkeypatch, name, options, words):
    monkeypatch.setattr(compare, "MAX_CHOICES", 5)
    write_table("train.csv", [("en", "fr"), *random_rows("train", 3)])
    assert_refused(run(evaluate, "--prefix", place / f"{name}.safetensors", *options), *words)
