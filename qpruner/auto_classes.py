"""Importing this lets ``AutoModelForCausalLM`` load compressed folders, without trust in the code that lies in them.

The classes are those of the file that `qpruner.remote_code` puts into each folder, as this installation has it.
"""

from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from qpruner.anatomy import COMPRESSED, FAMILIES
from qpruner.modeling_compressed import config_class, model_class
from qpruner.remote_code import body_class

for _name, _family in FAMILIES.items():
    _config: Any = config_class(_family.config_class)
    _config.register_for_auto_class()  # so that what is saved again has the file with it
    AutoConfig.register(COMPRESSED + _name, _config, exist_ok=True)
    AutoModel.register(_config, model_class(body_class(_name)), exist_ok=True)
    _model: Any = model_class(_family.model_class)
    _model.register_for_auto_class("AutoModelForCausalLM")
    AutoModelForCausalLM.register(_config, _model, exist_ok=True)
