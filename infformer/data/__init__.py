"""Documents, tokens, lanes: what a model reads, and in which order. It knows no model."""

from infformer.data.errors import DataError
from infformer.data.lanes import IGNORE_INDEX, Lanes, Segment
from infformer.data.options import DataConfig
from infformer.data.reading import read_once
from infformer.data.sources import Document, check_sources, read_documents
from infformer.data.tokenization import TokenizedDocuments, tokenize_documents

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
