"""The record of a fit: what of a strategy is written down."""

import json

from peft import LoraConfig

from lit_sparse.callbacks.recorder import fields_of
from lit_sparse.strategies import PEFT, SMT


def test_fields_of_strategies_are_plain_values():
    adapter = fields_of(PEFT(LoraConfig(r=2, target_modules=["v_proj", "q_proj"])))
    assert json.loads(json.dumps(adapter))["config"]["target_modules"] == ["q_proj", "v_proj"]
    assert fields_of(SMT(block_size=(2, 4)))["block_size"] == [2, 4]
