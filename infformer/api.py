"""What `import infformer` offers by name; everything else may change its place."""

from infformer.config import RunConfig
from infformer.data.options import DataConfig
from infformer.data.tokenization import TokenizedDocuments, tokenize_documents
from infformer.errors import UserError
from infformer.evaluation.perplexity import evaluate, measure
from infformer.evaluation.streaming import Evaluator, ReadingProtocol
from infformer.memory.compressive import CompressiveMemoryConfig
from infformer.memory.long_term_options import LongTermMemoryConfig
from infformer.memory.options import MemoryConfig
from infformer.memory.state import ModelState
from infformer.models.adapters import LoraConfig
from infformer.models.decoder import DecoderConfig, DecoderForCausalLM
from infformer.models.generation import ReadText, read_text, sample_tokens
from infformer.models.loading import load_pretrained, load_tokenizer, load_trained
from infformer.models.memories import attach_memories, save_memories
from infformer.models.pretrained import InfformerConfig, InfformerForCausalLM
from infformer.models.read_files import load_read_text, save_read_text
from infformer.training.trainer import train

__all__ = [
    "CompressiveMemoryConfig",
    "DataConfig",
    "DecoderConfig",
    "DecoderForCausalLM",
    "Evaluator",
    "InfformerConfig",
    "InfformerForCausalLM",
    "LongTermMemoryConfig",
    "LoraConfig",
    "MemoryConfig",
    "ModelState",
    "ReadText",
    "ReadingProtocol",
    "RunConfig",
    "TokenizedDocuments",
    "UserError",
    "attach_memories",
    "evaluate",
    "load_pretrained",
    "load_read_text",
    "load_tokenizer",
    "load_trained",
    "measure",
    "read_text",
    "sample_tokens",
    "save_memories",
    "save_read_text",
    "tokenize_documents",
    "train",
]
