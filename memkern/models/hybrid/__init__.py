"""The hybrid memory transformer: internal fast weights, an external bank, and a gate that learns when to retrieve."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from memkern.models.hybrid.configuration_hybrid import HybridTransformerConfig
from memkern.models.hybrid.external_memory import ExternalMemoryBank
from memkern.models.hybrid.hybrid_attention import HybridMemoryAttention
from memkern.models.hybrid.internal_memory import InternalMemoryModule, update_internal_memory
from memkern.models.hybrid.modeling_hybrid import HybridOutput, HybridTransformerModel

__all__ = [
    "ExternalMemoryBank",
    "HybridMemoryAttention",
    "HybridOutput",
    "HybridTransformerConfig",
    "HybridTransformerModel",
    "InternalMemoryModule",
    "update_internal_memory",
]

AutoConfig.register(HybridTransformerConfig.model_type, HybridTransformerConfig, exist_ok=True)
AutoModel.register(HybridTransformerConfig, HybridTransformerModel, exist_ok=True)
AutoModelForCausalLM.register(HybridTransformerConfig, HybridTransformerModel, exist_ok=True)
