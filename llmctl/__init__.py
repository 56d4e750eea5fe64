"""llmctl: take a language model through its whole life, from tokenizer to serving.

Importing this package is light on purpose: it loads no torch and no transformers.
"""

__version__ = "0.1.0"
