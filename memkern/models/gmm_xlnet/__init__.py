"""GMM-XLNet: XLNet with a gated mixture of memory experts. Importing it registers the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForQuestionAnswering

from memkern.models.gmm_xlnet.configuration_gmm_xlnet import GMMXLNetConfig
from memkern.models.gmm_xlnet.modeling_gmm_xlnet import GMMXLNetForQA

AutoConfig.register(GMMXLNetConfig.model_type, GMMXLNetConfig, exist_ok=True)
AutoModel.register(GMMXLNetConfig, GMMXLNetForQA, exist_ok=True)
AutoModelForQuestionAnswering.register(GMMXLNetConfig, GMMXLNetForQA, exist_ok=True)

__all__ = ["GMMXLNetConfig", "GMMXLNetForQA"]
