"""Documents, tokens, lanes: what a model reads, and in which order. It knows no model."""

from infformer.data.options import DataConfig
from infformer.data.segments import IGNORE_INDEX, Lanes, Segment, read_once
from infformer.data.sources import Document, check_sources, read_documents
from infformer.data.tokenization import TokenizedDocuments, tokenize_documents
from infformer.errors import DataError

__all__ = [
    "IGNORE_INDEX",
    "DataConfig",
    "DataError",
    "Document",
    "Lanes",
    "Segment",
    "TokenizedDocuments",
    "check_sources",
    "read_documents",
    "read_once",
    "tokenize_documents",
]
