from __future__ import annotations

import pytest
from peft import get_peft_model

from peft_dps import DPSConfig
from peft_dps.errors import ConfigError

FIELDS = {
    "variant": "mxi",
    "density": 7,
    "stage_steps": 0,
    "score": "squares",
    "score_dtype": "float16",
    "granularity": "layer",
    "frozen": None,
    "lean": "yes",
    "seed": -1,
    "total_steps": 1,
}


@pytest.mark.parametrize(("field", "value"), FIELDS.items(), ids=FIELDS)
def test_a_field_that_was_set_after_the_config_was_made_is_checked(make_net, field, value):
    net, config = make_net(), DPSConfig(target_modules=["layers.0"], stage_steps=2)
    setattr(config, field, value)
    before = list(net.named_modules())
    with pytest.raises(ConfigError, match=rf"`{field}`.* {value!r}"):
        get_peft_model(net, config)
    assert list(net.named_modules()) == before
    setattr(config, field, getattr(DPSConfig(stage_steps=2), field))
    assert list(get_peft_model(net, config).dps_status().layers) == ["layers.0"]


def test_a_second_adapter_is_checked_too(make_model):
    model, config = make_model(), DPSConfig(target_modules=["layers.0"], stage_steps=2)
    config.variant = "mxi"
    with pytest.raises(ConfigError, match="`variant` must be one of 'dense', 'mix', got 'mxi'"):
        model.add_adapter("other", config)
    assert list(model.peft_config) == ["default"]
    assert list(model.base_model.model.layers[0].dps_weight) == ["default"]
