"""Self-RAG: a causal LM that retrieves by its own embeddings; and the small transformer to build one on.

Here "Self-RAG" means retrieval by the model's own embeddings, not the method with reflection tokens of Asai et al.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from memkern.models.self_rag.augmentation import Augmented
from memkern.models.self_rag.configuration_self_rag import PRESETS, SelfRAGConfig
from memkern.models.self_rag.contrastive import info_nce
from memkern.models.self_rag.modeling_self_rag import SelfRAGModel, SelfRAGOutput
from memkern.models.self_rag.modeling_transformer import SelfRAGTransformer

__all__ = [
    "PRESETS",
    "Augmented",
    "SelfRAGConfig",
    "SelfRAGModel",
    "SelfRAGOutput",
    "SelfRAGTransformer",
    "info_nce",
]

AutoConfig.register(SelfRAGConfig.model_type, SelfRAGConfig, exist_ok=True)
# One configuration, two models: the folder's "architectures" says which it holds.
for _auto in (AutoModel, AutoModelForCausalLM):
    _auto._model_mapping.register(SelfRAGConfig, (SelfRAGTransformer, SelfRAGModel), exist_ok=True)
