from __future__ import annotations

import pytest

from peft_dps import register_score
from peft_dps.errors import ConfigError
from peft_dps.selection.scores import SCORES
from peft_dps.tensors.registry import Registry


@pytest.fixture
def registry() -> Registry:
    return Registry("shape")


def round_(radius):
    return radius


def square(side):
    return side


def test_what_is_registered_is_found_listed_and_forgotten(registry):
    assert registry.register("round")(round_) is round_
    registry.register("square")(square)
    assert registry.find("round") is round_
    assert list(registry) == ["round", "square"]
    registry.unregister("round")
    registry.unregister("round")
    assert list(registry) == ["square"]


@pytest.mark.parametrize("name", ["oval", "", None, 3, ["round"]])
def test_a_name_that_nothing_is_registered_under_is_refused_with_those_that_are_known(registry, name):
    registry.register("round")(round_)
    registry.register("square")(square)
    with pytest.raises(ConfigError) as error:
        registry.find(name)
    assert str(error.value) == f"`shape` must be one of 'round', 'square', got {name!r}."


@pytest.mark.parametrize("name", ["", None, 3])
def test_a_name_has_to_be_a_string_that_is_not_empty(registry, name):
    with pytest.raises(ConfigError, match=f"A name for `shape` must be a non-empty string, got {name!r}"):
        registry.register(name)


def test_what_cannot_be_called_is_refused(registry):
    with pytest.raises(ConfigError, match=r"`shape='round'` must stand for a class or function, got 3"):
        registry.register("round")(3)
    assert list(registry) == []


def test_a_name_is_taken_by_another_object_and_not_by_the_same_one_made_anew(registry):
    registry.register("round")(round_)
    registry.register("round")(round_)
    with pytest.raises(ConfigError, match=r"`shape='round'` is taken by .*round_; use another name"):
        registry.register("round")(square)
    assert registry.find("round") is round_


def test_scores_of_users_are_checked_when_they_are_registered():
    before = list(SCORES)
    with pytest.raises(ConfigError, match="non-empty string, got ''"):
        register_score("")
    with pytest.raises(ConfigError, match=r"`score='x'` must stand for a class or function, got 3"):
        register_score("x")(3)
    assert list(SCORES) == before
