"""Language models that read documents far longer than their context, in constant memory."""

__version__ = "0.1.0"
