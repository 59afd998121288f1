"""A config.json gives the model that it describes, or an error that names the file and the setting."""

import json
import os

import pytest
from conftest import refusal, why_refused
from hypothesis import given
from hypothesis import strategies as st

from minigpt import GPTConfig, UserError
from minigpt.config import ALIASES
from minigpt.files import escape_control


def put(write, content):
    return write("config.json", content if isinstance(content, bytes) else json.dumps(content))


@pytest.fixture
def read(write):
    """A function: the content of a config.json -> GPTConfig."""
    return lambda content: GPTConfig.from_file(put(write, content))


@pytest.fixture
def why(write):
    """A function: the content of a config.json -> why it is refused, less the path."""
    return lambda content: why_refused(GPTConfig.from_file, put(write, content))


def test_what_is_written_is_read_back(read):
    config = GPTConfig(vocab_size=7, n_positions=5, n_embd=6, n_layer=4, n_head=3, n_inner=2, layer_norm_epsilon=0.25)
    assert read(config.to_dict()) == config


def test_settings_that_do_not_change_the_function_are_passed_over(read):
    settings = {"model_type": "gpt2", "n_ctx": 512, "resid_pdrop": 0.1, "use_cache": False, "summary_type": "mean"}
    settings |= {"reorder_and_upcast_attn": True, "pruned_heads": {}, "n_inner": None, "hidden_act": "relu"}
    settings |= {"quantization_config": None, "dtype": "bfloat16", "architectures": ["GPT2ForSequenceClassification"]}
    assert read(settings) == GPTConfig()


def test_transformers_other_names_of_a_setting_are_read(read, why):
    from transformers import GPT2Config

    assert ALIASES == GPT2Config.attribute_map
    for alias, name in ALIASES.items():
        assert read({alias: 24}) == read({name: 24, alias: 24}) == GPTConfig(**{name: 24})
        assert why({name: 24, alias: 48}) == f"{name} is 24 but {alias}, its other name, is 48"


NOT_IMPLEMENTED = {
    "model_type": "llama",
    "scale_attn_weights": False,
    "scale_attn_by_inverse_layer_idx": True,
    "quantization_config": {"load_in_4bit": True},
    "pruned_heads": {"0": [1]},
    "auto_map": {"AutoModelForCausalLM": "modeling.Other"},
}


@pytest.mark.parametrize("name", NOT_IMPLEMENTED)
def test_a_setting_that_is_not_implemented_is_an_error_that_names_it(name, why):
    value = NOT_IMPLEMENTED[name]
    assert why({name: value}).startswith(f"{name} = {value!r} is not implemented: only ")


SIZES = ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"]


@pytest.mark.parametrize("name, value, told", [
    *((name, v, "must be a whole number from 1 on, not ") for name in SIZES for v in (0, "12")),
    *(("n_embd", v, "must be a whole number from 1 on") for v in (-12, 12.0, True, None, 10**30)),
    *(("activation_function", v, f"{v!r} is none of gelu_new, ") for v in ("quick_gelu", None, 3)),
    *(("layer_norm_epsilon", v, "must be a number, not ") for v in ("1e-5", None, 10**400)),
])  # fmt: skip
def test_a_value_that_makes_no_sense_is_an_error_that_names_the_setting(name, value, told, why):
    assert f"{name} {told}" in why({name: value})
    assert why({"n_embd": 1600, "n_head": 12}) == "n_embd 1600 is not a multiple of n_head 12"


@pytest.mark.parametrize("content, told", [
    (b"[1]", "expected a JSON object, found [1]"),
    *((content, "not JSON: ") for content in (b"", b'{"n_head": 12', b"[" * 100_000, "\ufeff{}".encode())),
    (b'{"n_head": "\xff"}', "not UTF-8 text: 'utf-8' codec can't decode byte 0xff in position 12"),
    (b"<!DOCTYPE html>\n<html>", "not JSON: Expecting value: line 1 column 1 (char 0) (a web page in place of the"),
], ids=lambda content: str(content)[:20])  # fmt: skip
def test_a_file_that_is_something_else_is_an_error_that_says_what(content, told, why):
    assert told in why(content)


def test_a_config_that_is_a_pipe_or_missing_is_an_error(tmp_path):
    path = tmp_path / "config.json"
    assert refusal(GPTConfig.from_file, path) == f"{path}: No such file or directory"
    os.mkfifo(path)  # to read from it would wait for ever
    assert refusal(GPTConfig.from_file, path) == f"{path}: not a regular file"


def test_what_a_message_quotes_from_a_file_is_harmless_and_short(why):
    reason = why({"model_type": "\x1b[2J\u202e\n" + "x" * 100_000})
    assert reason.startswith(r"model_type = '\x1b[2J\u202e\nxxx")
    assert reason.endswith("is not implemented: only 'gpt2' is")


@given(text=st.text(st.characters() | st.sampled_from("\x1b\x9b\x07\u202e\u2066\ud800")))
def test_an_error_is_one_line_without_control_characters_whatever_it_quotes(text):
    assert escape_control(str(UserError(text))) == str(UserError(text)) == str(UserError(text)).encode().decode()
    assert len(str(UserError(text)).splitlines()) == bool(text)
