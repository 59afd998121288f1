"""A config.json gives the model that it describes, or an error that names the file and the setting."""

import json
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minigpt import GPT, GPTConfig, UserError
from minigpt.config import PUBLISHED
from minigpt.errors import visible


def read(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return GPTConfig.from_file(path)


def refusal(tmp_path, content):
    """The one line that says why the config does not load, less the path that it begins with."""
    with pytest.raises(UserError) as caught:
        read(tmp_path, content)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path}/config.json: ")
    return str(caught.value).removeprefix(f"{tmp_path}/config.json: ")


def test_what_is_written_is_read_back(tmp_path):
    config = GPTConfig(vocab_size=7, n_positions=5, n_embd=6, n_layer=4, n_head=3, n_inner=2, layer_norm_epsilon=0.25)
    assert read(tmp_path, config.to_dict()) == config


def test_settings_that_do_not_change_the_function_are_passed_over(tmp_path):
    old = {"model_type": "gpt2", "n_ctx": 1024, "resid_pdrop": 0.1, "task_specific_params": {"text-generation": {}}}
    assert read(tmp_path, old) == GPTConfig()


@pytest.mark.parametrize(
    "name, value",
    [
        ("model_type", "llama"),
        ("tie_word_embeddings", False),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("add_cross_attention", True),
    ],
)
def test_a_setting_that_is_not_implemented_is_an_error_that_names_it(name, value, tmp_path):
    assert refusal(tmp_path, {name: value}).startswith(f"{name} = {value!r} is not implemented: only ")


@pytest.mark.parametrize("value", ["quick_gelu", "", None, ["gelu_new"], 3])
def test_an_unknown_activation_is_an_error_that_names_it_and_the_known_ones(value, tmp_path):
    reason = refusal(tmp_path, {"activation_function": value})
    assert reason.startswith(f"activation_function {value!r} is not implemented (known: gelu_new, ")


@pytest.mark.parametrize("name", ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"])
@pytest.mark.parametrize("value", [0, -12, 12.0, True, "12", [12], {}, 2**31, 10**30])
def test_a_size_that_is_no_positive_whole_number_is_an_error_that_names_it(name, value, tmp_path):
    assert refusal(tmp_path, {name: value}) == f"{name} must be a whole number from 1 to 2,147,483,647, not {value!r}"


@pytest.mark.parametrize("value", [0, -1e-5, 1, "1e-5", None, True, 10**400, "\x1b[2J"])
def test_a_layer_norm_epsilon_that_makes_no_sense_is_an_error(value, tmp_path):
    assert refusal(tmp_path, {"layer_norm_epsilon": value}).startswith("layer_norm_epsilon must be a number between")


def test_heads_that_do_not_divide_the_width_are_an_error_with_both_numbers(tmp_path):
    assert refusal(tmp_path, {"n_embd": 1600, "n_head": 12}) == "n_embd 1600 is not a multiple of n_head 12"


@pytest.mark.parametrize("content", ["[1]", "null", '"gpt2"', "3"])
def test_a_config_that_is_no_object_is_an_error(content, tmp_path):
    assert refusal(tmp_path, content) == f"expected a JSON object, found {json.loads(content)!r}"


@pytest.mark.parametrize("content", ["", '{"n_head": 12', "[" * 100_000, "\ufeff{}", '{"n_head": 1' + "0" * 5000 + "}"])
def test_a_config_that_is_no_json_is_an_error(content, tmp_path):
    assert refusal(tmp_path, content).startswith("not JSON: ")


@pytest.mark.parametrize("content", ['{"x": NaN}', '{"x": [-Infinity]}'])
def test_numbers_that_json_does_not_have_are_an_error(content, tmp_path):
    assert refusal(tmp_path, content).endswith("is not a JSON number")


def test_a_key_that_stands_twice_is_an_error(tmp_path):
    assert refusal(tmp_path, '{"n_head": 12, "n_head": 1}') == "not JSON: an object has a key twice"


@pytest.mark.parametrize(
    "content, what",
    [("<!DOCTYPE html>\n<html>", "a web page"), ("version https://git-lfs.github.com/spec/v1\n", "a git LFS pointer")],
)
def test_a_file_that_is_something_else_is_an_error_that_says_what(content, what, tmp_path):
    assert f"({what} in place of the file: " in refusal(tmp_path, content)


def test_a_config_that_is_not_utf_8_or_far_too_large_is_an_error(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b'{"n_head": "\xff"}')
    with pytest.raises(UserError, match="config.json: not UTF-8 text: invalid start byte at byte 12"):
        GPTConfig.from_file(path)
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # a hole: a terabyte that takes no room
    with pytest.raises(UserError, match="config.json: larger than 16,777,216 bytes"):
        GPTConfig.from_file(path)


def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(UserError, match="config.json: not a regular file"):
        GPTConfig.from_file(tmp_path / "config.json")


def test_what_a_message_quotes_from_a_file_is_harmless_and_short(tmp_path):
    reason = refusal(tmp_path, {"model_type": "\x1b[2J\u202e\n" + "x" * 100_000})
    assert reason.startswith(r"model_type = '\x1b[2J\u202e\nxxx") and reason.endswith(
        "is not implemented: only 'gpt2' is"
    )
    assert len(reason) < 1100


@given(text=st.text(st.characters() | st.sampled_from("\x1b\x9b\x07\u202e\u2066\ud800")))
def test_an_error_is_one_line_without_control_characters_whatever_it_quotes(text):
    assert visible(str(UserError(text))) == str(UserError(text)) == str(UserError(text)).encode().decode()
    assert len(str(UserError(text)).splitlines()) == bool(text)


@pytest.mark.parametrize("shape", [*PUBLISHED.values(), GPTConfig(7, 5, 6, 4, 3, 2)], ids=lambda c: f"{c.n_params:,}")
def test_the_number_of_parameters_is_that_of_the_model(shape):
    with torch.device("meta"):
        assert shape.n_params == sum(p.numel() for p in GPT(shape).parameters())


def test_a_missing_config_is_an_error(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}/config.json: No such file"):
        GPTConfig.from_file(tmp_path / "config.json")
