"""MemXLNet: XLNet with token memory or differentiable memory. Importing it registers the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForQuestionAnswering

from memkern.models.memxlnet.configuration_memxlnet import MemXLNetConfig
from memkern.models.memxlnet.modeling_memxlnet import MemXLNetForQA

AutoConfig.register(MemXLNetConfig.model_type, MemXLNetConfig, exist_ok=True)
AutoModel.register(MemXLNetConfig, MemXLNetForQA, exist_ok=True)
AutoModelForQuestionAnswering.register(MemXLNetConfig, MemXLNetForQA, exist_ok=True)

__all__ = ["MemXLNetConfig", "MemXLNetForQA"]
