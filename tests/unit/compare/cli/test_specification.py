from __future__ import annotations

import pytest

from peft_dps.compare.cli.command import _parser
from peft_dps.compare.cli.flags import specification_of
from peft_dps.compare.cli.specification import read_specification, to_comparison
from peft_dps.compare.data.user_data import OwnData
from peft_dps.compare.methods.choice import Choice
from peft_dps.compare.methods.table import FAMILY
from peft_dps.compare.runs.comparison import METHODS, Comparison
from peft_dps.compare.settings import Settings

TOML = """
output = "runs/mine.jsonl"
model = "some/model"
tasks = ["glue/rte"]
train_sizes = [500, "all"]
seeds = ["0-2", 7]
epochs = 5
learning_rates = { full = [1e-5] }
methods = ["full", 'lora:{"r": 4}', { method = "dps-dense", options = { density = 0.3 }, title = "sparse" }]

[[data]]
source = "mine.csv"
text_columns = ["a", "b"]
others = { far = "far.csv" }
"""


def from_flags(*arguments):
    return to_comparison(specification_of(_parser().parse_args(["compare", *arguments])))


def test_a_file(tmp_path):
    (tmp_path / "s.toml").write_text(TOML)
    comparison = to_comparison(read_specification(tmp_path / "s.toml"))
    assert list(comparison.methods) == [
        Choice("full", {}, (1e-5,)),
        Choice("lora", {"r": 4}),
        Choice("dps-dense", {"density": 0.3}, None, "sparse"),
    ]
    assert comparison.own == [OwnData("mine.csv", text_columns=["a", "b"], others={"far": "far.csv"})]
    assert (comparison.train_sizes, comparison.seeds) == ([500, None], [0, 1, 2, 7])
    assert (comparison.model, comparison.settings) == ("some/model", Settings(epochs=5))
    assert comparison.task_names == ["glue/rte", "mine"]
    comparison.check()


def test_flags_go_before_the_file(tmp_path):
    (tmp_path / "s.toml").write_text(TOML)
    comparison = from_flags("--file", str(tmp_path / "s.toml"), "--seeds", "3", "--epochs", "1", "--methods", "full")
    assert (comparison.seeds, comparison.settings.epochs, comparison.model) == ([3], 1.0, "some/model")
    assert [choice.method for choice in comparison.methods] == ["full"]


def test_rates_by_flag_replace_those_that_a_file_gives_one_method(tmp_path):
    method = '{ method = "dps-dense", learning_rates = [1e-4], title = "mine" }'
    (tmp_path / "s.toml").write_text(f'methods = ["lora", "family", {method}]')
    named = from_flags("--file", str(tmp_path / "s.toml"), "--learning-rates", "dps-dense=1e-5,3e-5").methods
    assert named[-1] == Choice("dps-dense", {}, (1e-5, 3e-5), "mine")
    assert [choice.learning_rates for choice in named[:-1]] == [None] * (1 + len(FAMILY))
    for_all = from_flags("--file", str(tmp_path / "s.toml"), "--learning-rates", "1e-3").methods
    assert {choice.learning_rates for choice in for_all} == {(1e-3,)}
    other = from_flags("--file", str(tmp_path / "s.toml"), "--learning-rates", "lora=1e-3").methods
    assert [other[0].learning_rates, other[-1].learning_rates] == [(1e-3,), (1e-4,)]


def test_seeds_may_be_a_number(tmp_path):
    (tmp_path / "s.toml").write_text("seeds = 3\ntuning_seeds = 2")
    comparison = from_flags("--file", str(tmp_path / "s.toml"))
    assert (comparison.seeds, comparison.tuning_seeds) == ([3], 2)


def test_family_stands_for_every_recipe():
    methods = from_flags("--output", "x", "--methods", "full", "family", "lora").methods
    assert [choice.method for choice in methods] == ["full", *FAMILY, "lora"]
    assert "recipe:dps_dense" in FAMILY


def test_flags_alone():
    comparison = from_flags(
        *("--data", "mine.csv", "--text-column", "a", "--text-column", "b", "--label-column", "c"),
        *("--test", "test.csv", "--other", "far=far.csv", "--metrics", "accuracy", "f1"),
        *("--train-size", "10", "all", "--learning-rates", "lora=1e-3,1e-2", "--jobs", "2", "--no-timing"),
        *("--reference", "lora", "--group-column", "author", "--data-config", "films"),
    )
    others, metrics = {"far": "far.csv"}, ["accuracy", "f1"]
    assert comparison.own == [OwnData("mine.csv", "test.csv", ["a", "b"], "c", "author", "films", others, metrics)]
    assert [choice.method for choice in comparison.methods] == list(METHODS)
    rates = {choice.method: choice.learning_rates for choice in comparison.methods}
    assert (rates["lora"], rates["full"]) == ((1e-3, 1e-2), None)
    assert (comparison.jobs, comparison.timing, comparison.train_sizes) == (2, False, [10, None])
    assert (str(comparison.output), comparison.reference) == ("runs/compare.jsonl", "lora")
    comparison.check()


def test_one_list_of_learning_rates_is_for_all():
    comparison = from_flags("--tasks", "sentiment", "--learning-rates", "1e-4", "1e-3")
    assert {choice.learning_rates for choice in comparison.methods} == {(1e-4, 1e-3)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"task": ["a"]}, "the specification must have only .* got 'task'"),
        ({"methods": [{"name": "full"}]}, "`methods` must hold names, or tables with `method`"),
        ({"methods": [{"method": "full", "rates": 1}]}, "a method must have only .* got 'rates'"),
        ({"methods": [{"method": "full", "options": 3}]}, "`options` of method 'full' must be a table, got 3"),
        ({"seeds": ["a"]}, "`seeds` must be whole numbers, got 'a'"),
        ({"seeds": [1.5]}, "`seeds` must be whole numbers, got 1.5"),
        ({"train_sizes": ["many"]}, "`train_sizes` must be whole numbers, got 'many'"),
        ({"data": ["a.csv"]}, "`data` must hold tables with `source`"),
        ({"data": [{"source": "a.csv", "column": "b"}]}, "`data` must have only .* got 'column'"),
        ({"data": [{"source": "a.csv", "others": ["b.csv"]}]}, "`others` must be a table of names and data"),
        ({"data": [{"source": "a.csv", "others": {"b": 3}}]}, "`others` must be text, got 3"),
        ({"data": [{"source": "a.csv", "test": 3}]}, "`test` must be text, got 3"),
        ({"data": [{"source": "a.csv", "config": 3}]}, "`config` must be text, got 3"),
        ({"learning_rates": {"lorra": [1e-3]}}, "`learning_rates` must be of methods that are compared, got lorra"),
        ({"tasks": None}, "`tasks` must be a list, got None"),
    ],
)
def test_what_cannot_be_understood_is_named(content, message):
    with pytest.raises(ValueError, match=message):
        to_comparison({"output": "x", **content})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tasks": []}, "`tasks` must name a task"),
        ({"methods": []}, "`methods` must name at least one"),
        ({"seeds": []}, "`seeds` must name at least one"),
        ({"seeds": [1, 1]}, "`seeds` must all be different, got 1 more than once"),
        ({"seeds": [-1]}, "`seeds` must be an integer of at least 0, got -1"),
        ({"methods": [Choice("full"), Choice("full")]}, "`methods` must all be different"),
        ({"train_sizes": [1]}, "`train_sizes` must be an integer of at least 2, got 1"),
        ({"jobs": 0}, "`jobs` must be an integer of at least 1, got 0"),
        ({"tuning_seeds": 0}, "`tuning_seeds` must be"),
        ({"tuning_seeds": []}, "`tuning_seeds` must be"),
        ({"tuning_seeds": [7, 7]}, "`tuning_seeds` must all be different, got 7 more than once"),
        ({"probes": ["stsb", "stsb"]}, "`probes` must all be different, got 'stsb' more than once"),
        ({"own": [OwnData("sentiment.csv")]}, "`data` 'sentiment.csv' must not be called as the task 'sentiment'"),
        ({"settings": Settings(epochs=0)}, "`epochs` must be a number in"),
        ({"settings": Settings(epochs="3")}, "`epochs` must be a number in .* got '3'"),
        ({"settings": Settings(batch_size=1.5)}, "`batch_size` must be an integer of at least 1, got 1.5"),
        ({"settings": Settings(test_size=0)}, "`test_size` must be"),
        ({"settings": Settings(warmup=1)}, "`warmup` must be below 1"),
        ({"settings": Settings(attention="flash")}, "`attention` must be 'eager' or 'sdpa', got 'flash'"),
        ({"settings": Settings(precision="fp16")}, "`precision` must be 'fp32' or 'bf16', got 'fp16'"),
    ],
)
def test_values_that_cannot_work_are_named(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Comparison(tmp_path / "x", **{"tasks": ["sentiment"], **fields}).check()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("s.json", "{}", "must be a .toml file, got 's.json'"),
        ("s.toml", "a = ", "is not well formed"),
    ],
)
def test_files_that_cannot_be_read_are_named(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_specification(tmp_path / name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--other", "far=far.csv"], "`--other` goes with `--data`"),
        (["--text-column", "a", "--metrics", "f1"], "`--text-column`, `--metrics` goes with `--data`"),
        (["--data", "a.csv", "--other", "far"], "`--other` must be NAME=DATA"),
        (["--learning-rates", "high"], "`--learning-rates` must be numbers, or METHOD=NUMBER"),
        (["--learning-rates", "full=1e-4", "1e-3"], "`--learning-rates` must be"),
    ],
)
def test_flags_that_cannot_work_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        from_flags(*arguments)
