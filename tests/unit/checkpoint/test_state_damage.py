from __future__ import annotations

import copy

import pytest
import torch
from torch.optim import AdamW

from peft_dps import dps_adapter
from peft_dps.errors import StateError
from peft_dps.masking.frozen_bits import checksum
from tests.resuming import assert_same
from tests.unit.conftest import controller_of, train, trainable, weights_of

FIELDS = {"sizes": (16, 16, 16), "stage_steps": 3, "density": 0.3}  # two weights of one shape
KINDS = {
    "dense, ACCUMULATE": ({}, 2),
    "dense, SUBNETWORK": ({}, 4),
    "mix, ACCUMULATE": ({"variant": "mix"}, 2),
    "mix, SUBNETWORK": ({"variant": "mix"}, 4),
    "lean, second ACCUMULATE": ({"lean": True}, 8),
    "fraction of known steps": ({"stage_steps": 0.25, "total_steps": 40}, 15),
}


def refused(model, state, match):
    """Nothing may have changed when a state is refused."""
    before = copy.deepcopy(dps_adapter(model).state_dict())
    with pytest.raises(StateError, match=match):
        dps_adapter(model).load_state_dict(state)
    after = dps_adapter(model).state_dict()
    assert after["header"] == before["header"]
    assert_same(after["tensors"], before["tensors"])


@pytest.fixture
def at(make_model, batches):
    """Make a training that has made some steps: its model and optimizer."""

    def make(fields, steps):
        model = make_model(**{**FIELDS, **fields})
        optimizer = AdamW(trainable(model), lr=1e-2)
        train(model, optimizer, batches(steps, features=16, classes=16))
        return model, optimizer

    return make


JUNK = (None, "x", "9", -4, 0, 7, 10**30, 0.5, float("nan"), True, False, [], [1], ["x"], {}, {"x": 1}, object())


def damaged_copies(header):
    """Yield the path of a value, names of which an error has to say one, what is put there, and the header with it."""

    def walk(node, path):
        for key, value in node.items():
            yield (*path, key), value
            if isinstance(value, dict):
                yield from walk(value, (*path, key))

    for path, value in list(walk(header, ())):
        for junk in (*JUNK, "missing"):
            other = copy.deepcopy(header)
            node = other
            for key in path[:-1]:
                node = node[key]
            if junk == "missing":
                del node[path[-1]]
            elif type(junk) is type(node[path[-1]]) and junk == node[path[-1]]:
                continue
            else:
                node[path[-1]] = junk
            parts = [*(value if isinstance(value, dict) else ()), *(junk if isinstance(junk, dict) else ())]
            yield path, [path[-1], *parts], junk, other
        other = copy.deepcopy(header)
        node = other
        for key in path[:-1]:
            node = node[key]
        node["surplus"] = 1
        yield (*path[:-1], "surplus"), ["surplus"], 1, other


# Of what another value may be as good, since nothing else in a state contradicts it.
PLAUSIBLE = {
    "total_steps": (int, type(None)),
    "scored_steps": (int,),
    "unscored_steps": (int,),
    "in_round": (list,),
    "observed": (int,),
    "selected": (int, type(None)),
    "moved": (bool,),
    "share": (float,),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_value_that_makes_no_sense_is_named_and_nothing_has_happened(kind, at, batches):
    fields, steps = KINDS[kind]
    model, optimizer = at(fields, steps)
    state = copy.deepcopy(model.dps_state_dict())
    controller, refusals, unnamed, accepted = controller_of(model), 0, [], {}
    clock, parts = controller.clock, [(w.gathered, w.noise, w.frozen) for w in controller.weights]
    for path, names, junk, header in damaged_copies(state["header"]):
        try:
            model.load_dps_state_dict({**state, "header": header})
        except StateError as error:
            refusals += 1
            if not any(name in str(error) for name in names):
                unnamed.append((path, junk, str(error)))
        else:
            accepted.setdefault(path[-1], []).append(junk)
            model.load_dps_state_dict(state)
            clock, parts = controller.clock, [(w.gathered, w.noise, w.frozen) for w in controller.weights]
        assert controller.clock is clock
        for weight, (gathered, noise, frozen) in zip(controller.weights, parts, strict=True):
            assert weight.gathered is gathered
            assert weight.noise is noise
            assert weight.frozen is frozen
    assert not unnamed
    assert refusals > 300
    assert set(accepted) <= set(PLAUSIBLE)
    assert all(type(value) in PLAUSIBLE[name] for name, values in accepted.items() for value in values)
    twin, its_optimizer = at(fields, steps)
    data = batches(14, features=16, classes=16)[steps:]
    train(model, optimizer, data)
    train(twin, its_optimizer, data)
    assert all(torch.equal(a, b) for a, b in zip(weights_of(model), weights_of(twin), strict=True))


def exchanged(tensors, kind):
    one, two = f"layers.0.{kind}", f"layers.1.{kind}"
    return {**tensors, one: tensors[two], two: tensors[one]}


def changed(tensors, kind, change):
    tensor = tensors[f"layers.1.{kind}"].clone()
    change(tensor)
    return {**tensors, f"layers.1.{kind}": tensor}


NAN = float("nan")
DAMAGED_TENSORS = [
    ("dense, SUBNETWORK", "mask", lambda tensors: exchanged(tensors, "mask")),
    ("mix, SUBNETWORK", "snapshot", lambda tensors: exchanged(tensors, "snapshot")),
    ("dense, ACCUMULATE", "total", lambda tensors: exchanged(tensors, "total")),
    ("dense, SUBNETWORK", "mask", lambda tensors: changed(tensors, "mask", lambda mask: mask.fill_(255))),
    ("dense, SUBNETWORK", "mask", lambda tensors: changed(tensors, "mask", lambda mask: mask.zero_())),
    ("mix, ACCUMULATE", "participation", lambda tensors: changed(tensors, "participation", lambda f: f.neg_())),
    ("mix, ACCUMULATE", "participation", lambda tensors: changed(tensors, "participation", lambda f: f.fill_(NAN))),
    ("dense, ACCUMULATE", "total", lambda tensors: changed(tensors, "total", lambda total: total.neg_())),
    ("mix, ACCUMULATE", "total", lambda tensors: changed(tensors, "total", lambda total: total.fill_(NAN))),
    ("lean, second ACCUMULATE", "moment", lambda tensors: changed(tensors, "moment", lambda v: v.neg_())),
]
DAMAGED_TENSORS += [
    (kind, name, lambda tensors, name=name, junk=junk: {**tensors, f"layers.1.{name}": junk})
    for kind, name in (("dense, ACCUMULATE", "total"), ("mix, SUBNETWORK", "mask"), ("mix, SUBNETWORK", "snapshot"))
    for junk in (
        None,
        "x",
        [1.0],
        torch.zeros(0),
        torch.zeros(16, 16, dtype=torch.float64),
        torch.zeros(16, 16, dtype=torch.complex64),
        torch.zeros(16, 16, device="meta"),
        torch.zeros(16, 16).to_sparse(),
    )
]


@pytest.mark.parametrize(("kind", "name", "damage"), DAMAGED_TENSORS)
def test_every_tensor_that_makes_no_sense_is_named_and_training_goes_on(kind, name, damage, at, batches):
    fields, steps = KINDS[kind]
    (model, optimizer), (twin, its_optimizer) = at(fields, steps), at(fields, steps)
    state = copy.deepcopy(model.dps_state_dict())
    refused(model, {**state, "tensors": damage(state["tensors"])}, rf"'layers\.\d\.{name}'")
    data = batches(steps + 4, features=16, classes=16)[steps:]
    train(model, optimizer, data)
    train(twin, its_optimizer, data)
    assert all(torch.equal(a, b) for a, b in zip(weights_of(model), weights_of(twin), strict=True))


def with_checksums(state):
    """The state as whoever has changed its tensors would sign it."""
    state = copy.deepcopy(state)
    for name, entry in state["header"]["weights"].items():
        for kinds in (entry["rows"], entry["whole"]):
            kinds.update({kind: checksum(state["tensors"][f"{name}.{kind}"]) for kind in kinds})
    return state


@pytest.mark.parametrize(
    ("kind", "damage", "said"),
    [
        (
            "dense, SUBNETWORK",
            lambda t: changed(t, "mask", lambda mask: mask.fill_(255)),
            "256 entries, and `selected`",
        ),
        ("dense, SUBNETWORK", lambda t: changed(t, "mask", lambda mask: mask.zero_()), "0 entries, and `selected`"),
        ("mix, ACCUMULATE", lambda t: changed(t, "participation", lambda f: f.neg_()), "'participation'"),
        ("mix, ACCUMULATE", lambda t: changed(t, "participation", lambda f: f.fill_(NAN)), "'participation'"),
        ("mix, ACCUMULATE", lambda t: changed(t, "total", lambda total: total.neg_()), "'total'"),
        ("dense, ACCUMULATE", lambda t: changed(t, "total", lambda total: total.fill_(NAN)), "'total'"),
        ("lean, second ACCUMULATE", lambda t: changed(t, "moment", lambda v: v.neg_()), "'moment'"),
        ("mix, SUBNETWORK", lambda t: {**t, "layers.1.mask": torch.zeros(3, 2)}, r"'mask' is torch.float32 \[3, 2\]"),
        (
            "mix, SUBNETWORK",
            lambda t: {**t, "layers.1.snapshot": torch.zeros(16, 16).half()},
            "'snapshot' is torch.fl",
        ),
        ("dense, ACCUMULATE", lambda t: {**t, "layers.1.total": torch.zeros(16)}, r"'total' is torch.float32 \[16\]"),
    ],
)
def test_values_are_checked_also_where_checksums_go_with_them(kind, damage, said, at):
    model, _ = at(*KINDS[kind])
    state = copy.deepcopy(model.dps_state_dict())
    refused(model, with_checksums({**state, "tensors": damage(state["tensors"])}), rf"'layers\.1'.*{said}")


@pytest.mark.parametrize(
    "junk", [None, "x", 3, [], {}, {"header": {}}, {"tensors": {}}, {"header": [], "tensors": {}}]
)
def test_what_is_no_state_is_refused(at, junk):
    model, _ = at({}, 4)
    refused(model, junk, "training state")
    refused(model, {"header": junk, "tensors": {}}, "training state")


@pytest.mark.parametrize("tensors", [None, 3, "x", [], [1]])
def test_what_are_no_tensors_is_refused(at, tensors):
    model, _ = at({}, 4)
    refused(model, {**model.dps_state_dict(), "tensors": tensors}, "training state")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"step": 2}, "entered"),  # of ACCUMULATE, in a state of SUBNETWORK
        ({"step": 7}, "entered"),
        ({"step": 0}, "entered"),
        ({"entered": 0}, "entered"),
        ({"entered": 2}, "entered"),
        ({"entered": None}, "entered"),
        ({"schedule": {"stage_steps": 4}}, "schedule"),
        ({"schedule": {}}, "schedule"),
        ({"schedule": None}, "schedule"),
        ({"schedule": {"stage_steps": 3, "score_steps": 8}}, "schedule"),
        ({"total_steps": -4}, "total_steps"),
        ({"total_steps": "9"}, "total_steps"),
        ({"total_steps": 1}, "total_steps"),
        ({"scored_steps": 5}, "scored_steps"),
        ({"in_round": ["layers.2"]}, "in_round"),
    ],
)
def test_a_clock_that_contradicts_itself_is_refused(change, named, at):
    model, _ = at({}, 4)
    state = copy.deepcopy(model.dps_state_dict())
    state["header"]["clock"].update(change)
    refused(model, state, rf"adapter 'default' \(`clock`\) is damaged: .*`{named}`")


@pytest.mark.parametrize("selected", ["x", 257, -1, 2.0, None, 76, 78])
def test_selected_entries_are_no_more_than_there_are_and_as_many_as_the_mask_holds(selected, at):
    model, _ = at({}, 4)
    state = copy.deepcopy(model.dps_state_dict())
    assert state["header"]["weights"]["layers.1"]["facts"]["selected"] == 77
    state["header"]["weights"]["layers.1"]["facts"]["selected"] = selected
    refused(model, state, rf"'layers\.1' is damaged: .*`selected` is {selected!r}")


@pytest.mark.parametrize(
    ("settings", "named"), [({"sparsity": 0.3}, "sparsity"), ({"density": "0.3"}, "density"), ({"lean": 0}, "lean")]
)
def test_a_setting_that_is_unknown_or_of_another_type_is_refused_by_name(settings, named, at):
    model, _ = at({}, 4)
    state = copy.deepcopy(model.dps_state_dict())
    state["header"]["settings"].update(settings)
    refused(model, state, named)


@pytest.mark.parametrize("name", ["density", "evidence", "lean"])
def test_a_setting_that_is_missing_is_refused_by_name(name, at):
    model, _ = at({}, 4)
    state = copy.deepcopy(model.dps_state_dict())
    del state["header"]["settings"][name]
    refused(model, state, rf"\(`settings`\) is damaged: it lacks '{name}'")
