"""Parts as several processes would have saved them, put together by one."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from peft_dps import dps_adapter
from peft_dps.checkpoint import file as statefile
from peft_dps.checkpoint.parts import find_save, part_of, write_index, write_part
from peft_dps.errors import StateError
from peft_dps.masking.frozen_bits import checksum
from peft_dps.tuner.adapter import find_controllers
from tests.resuming import Plan, Training, assert_same

SAVE = "0123456789abcdef"
PLANS = [
    (Plan(), 2),
    (Plan(), 4),
    (Plan(variant="mix"), 2),
    (Plan(variant="mix", scope="model"), 4),
    (Plan(frozen="gradient"), 5),
    (Plan(lean=True), 8),
    (Plan(variant="mix", lean=True), 5),
    (Plan(granularity="row"), 4),
    (Plan(granularity="column", scope="model", variant="mix"), 4),
    (Plan(granularity="block", scope="model"), 4),
    (Plan(score_dtype="bfloat16"), 2),
]
# Rows of the weights (17 and 3 of them) that each process has; some have none.
CUTS = {
    "2": ([9, 8], [2, 1]),
    "3": ([6, 6, 5], [1, 1, 1]),
    "4, of which two have nothing of a weight": ([17, 0, 0, 0], [1, 1, 1, 0]),
    "5": ([4, 4, 4, 4, 1], [1, 1, 1, 0, 0]),
}


def cut(training, cuts):
    """What each process would have taken down of its rows."""
    state = training.model.dps_state_dict()
    for rank in range(len(cuts[0])):
        header, tensors = copy.deepcopy(state["header"]), {}
        weights = find_controllers(training.model)["default"].weights
        for weight, rows in zip(weights, cuts, strict=True):
            first, entry = sum(rows[:rank]), header["weights"][weight.name]
            part = weight.weight[first : first + rows[rank]]
            entry["shape"], entry["offset"] = list(part.shape), [first, 0]
            entry["values"] = checksum(part, first * part.shape[1])
            for kinds in (entry["rows"], entry["whole"]):
                for kind in kinds:
                    tensor = state["tensors"][f"{weight.name}.{kind}"]
                    tensor = tensor[first : first + rows[rank]] if kinds is entry["rows"] else tensor
                    tensors[f"{weight.name}.{kind}"], kinds[kind] = tensor, checksum(tensor)
        yield {"header": header, "tensors": tensors}


def save_cut(training, path, cuts):
    size = len(cuts[0])
    parts = list(cut(training, cuts))
    for rank, part in enumerate(parts):
        write_part(path, part, SAVE, rank, size)
    write_index(path, parts[0]["header"], SAVE, size)
    return path


@pytest.fixture
def trained():
    def train(plan, steps):
        training = Training(plan)
        training.run(steps)
        return training

    return train


@pytest.mark.parametrize(("plan", "stop"), PLANS, ids=str)
@pytest.mark.parametrize("cuts", CUTS)
def test_one_process_goes_on_to_the_bit_with_what_several_have_saved(trained, plan, stop, cuts, tmp_path):
    whole = trained(plan, stop)
    whole.save(tmp_path)
    save_cut(whole, tmp_path / "dps.safetensors", CUTS[cuts])
    expected = whole.trace()
    resumed = Training.resumed(tmp_path)
    for ours, theirs in zip(resumed.trace(), expected, strict=True):
        assert_same(ours, theirs)
    assert resumed.model.dps_status() == whole.model.dps_status()


def damaged(path, rank, size, change):
    """Change a part, and sign it anew."""
    part = part_of(path, SAVE, rank, size)
    with safe_open(part, framework="pt") as file:
        labels, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header = json.loads(labels["peft_dps"])
    change(header, tensors)
    signed = json.dumps(header)
    save_file(
        tensors, part, {**labels, "peft_dps": signed, "sha256": statefile._digest(signed, sorted(tensors.items()))}
    )


def refuse(training, path, match):
    before = training.everything()
    with pytest.raises(StateError, match=match):
        dps_adapter(training.model).load_state(path)
    assert_same(training.everything(), before)


def of(header, *path):
    for name in ("weights", "0", *path):
        header = header[name]
    return header


DAMAGE = {
    "rows that nobody has": (
        lambda h, t: of(h, "offset").__setitem__(0, 3),
        "lacks rows from 9 on of the weight of '0'",
    ),
    "another shape": (
        lambda h, t: of(h, "global_shape").__setitem__(0, 18),
        r"'0' is that of a weight with global_sh",
    ),
    "another dtype": (lambda h, t: of(h).update(dtype="torch.float64"), "'0' is that of a weight with dtype torch.fl"),
    "other values": (lambda h, t: of(h).update(values=1), "values of the weight of '0' are not those"),
    "values of another type": (lambda h, t: of(h).update(values="x"), "is damaged"),
    "no offset": (lambda h, t: of(h).update(offset=[]), "is damaged"),
    "no table": (lambda h, t: h["weights"].update({"0": None}), "is damaged"),
    "no facts": (lambda h, t: of(h).update(facts=7), "is damaged"),
    "another step": (lambda h, t: h["clock"].update(step=5), "is of another step than the files beside it"),
    "another setting": (lambda h, t: h["settings"].update(density=0.5), "`density=0.5`"),
    "another adapter": (lambda h, t: h.update(adapter="other"), "adapter 'other', not of 'default'"),
    "another number of entries": (lambda h, t: of(h, "facts").update(selected=3), "'0' is damaged: parts tell"),
    "nothing of a tensor": (
        lambda h, t: (of(h, "rows").pop("mask"), t.pop("0.mask")),
        "'0' is damaged: parts tell",
    ),
    "no tensor": (lambda h, t: t.pop("0.mask"), "is cut off or damaged"),
    "a tensor of another width": (lambda h, t: t.update({"0.mask": t["0.mask"][:, :1].clone()}), "is damaged"),
    "a tensor of more rows": (lambda h, t: t.update({"0.mask": torch.cat([t["0.mask"]] * 2)}), "is damaged"),
    "a tensor of fewer rows": (lambda h, t: t.update({"0.mask": t["0.mask"][:2].clone()}), "is damaged"),
    "an over-full mask": (lambda h, t: t["0.mask"].fill_(255), "'0' is damaged: its mask holds"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("rank", [0, 1])
def test_parts_that_do_not_fit_are_refused(trained, damage, rank, tmp_path):
    training = trained(Plan(), 4)
    path = save_cut(training, tmp_path / "cut", CUTS["2"])
    change, said = DAMAGE[damage]
    damaged(path, rank, 2, change)
    refuse(training, path, "training state" if rank == 0 else said)


def test_a_part_that_is_missing_or_cut_off_is_refused(trained, tmp_path):
    training = trained(Plan(), 4)
    path = save_cut(training, tmp_path / "cut", CUTS["3"])
    part = part_of(path, SAVE, 2, 3)
    whole = part.read_bytes()
    part.write_bytes(whole[:-5])
    refuse(training, path, "cut off or damaged")
    part.write_bytes(whole[:-5] + bytes(5))
    refuse(training, path, "is damaged")
    part.unlink()
    refuse(training, path, "There is no training state at")


def test_no_part_is_unpickled(trained, tmp_path, monkeypatch):
    def refuse_(*_, **__):
        raise AssertionError("something is unpickled")

    training = trained(Plan(variant="mix"), 4)
    path = save_cut(training, tmp_path / "cut", CUTS["3"])
    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse_)
    (tmp_path / ".metadata").write_bytes(b"what torch's own reader would unpickle")
    dps_adapter(training.model).load_state(path)
    assert find_save(path).name == SAVE
