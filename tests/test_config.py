"""A config.json gives the model that it describes, or an error that names the file and the setting."""

import json

import pytest

from minigpt import GPTConfig, UserError


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
@pytest.mark.parametrize("value", [0, -12, 12.0, True, "12", [12], {}])
def test_a_size_that_is_no_positive_whole_number_is_an_error_that_names_it(name, value, tmp_path):
    assert refusal(tmp_path, {name: value}) == f"{name} must be a positive whole number, not {value!r}"


@pytest.mark.parametrize("value", [0, -1e-5, 1, "1e-5", None, True, float("nan")])
def test_a_layer_norm_epsilon_that_makes_no_sense_is_an_error(value, tmp_path):
    assert refusal(tmp_path, {"layer_norm_epsilon": value}).startswith("layer_norm_epsilon must be a number between")


def test_heads_that_do_not_divide_the_width_are_an_error_with_both_numbers(tmp_path):
    assert refusal(tmp_path, {"n_embd": 1600, "n_head": 12}) == "n_embd 1600 is not a multiple of n_head 12"


@pytest.mark.parametrize("content", ["[1]", "null", '"gpt2"', "3"])
def test_a_config_that_is_no_object_is_an_error(content, tmp_path):
    assert refusal(tmp_path, content) == "expected a JSON object"


@pytest.mark.parametrize("content", ["", "<!DOCTYPE html>\n<html>", '{"n_head": 12', "[" * 100_000])
def test_a_config_that_is_no_json_is_an_error(content, tmp_path):
    assert refusal(tmp_path, content)


def test_a_missing_config_is_an_error(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}/config.json: No such file"):
        GPTConfig.from_file(tmp_path / "config.json")
